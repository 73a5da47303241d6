"""Losses on held-out samples, with masks that are the same for every model."""

import numpy as np
import torch

from fourmill.train.assemble import assemble
from fourmill.train.config import PretrainConfig
from fourmill.train.data import SampleSet
from fourmill.train.masking import Mixture
from fourmill.train.model import FourM, mean_losses

_SEED = 2**31  # apart from any training seed


def validation_losses(model: FourM, samples: SampleSet, mixture: Mixture, config: PretrainConfig) -> dict[str, float]:
    """Mean cross-entropy in nats by modality; empty when there is no held-out sample."""
    found = []
    patch_bytes = model.patch_px**2 * 3
    for first in range(0, len(samples), config.batch_size):
        indices = range(first, min(first + config.batch_size, len(samples)))
        rngs = [np.random.default_rng([_SEED, i]) for i in indices]
        batch = assemble([samples.sample(i) for i in indices], mixture, rngs, patch_bytes)
        with torch.inference_mode():
            found.append({name: float(value) for name, value in model.losses(batch).items()})
    return {name: round(value, 5) for name, value in mean_losses(found).items()}


def chance_losses(model: FourM) -> dict[str, float]:
    """What guessing every id alike would score: ln(vocabulary)."""
    return {m.name: round(float(np.log(m.vocab_size)), 5) for m in model.modalities if m.vocab_size is not None}
