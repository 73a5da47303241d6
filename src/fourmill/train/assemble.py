"""Samples and budgets to a batch of chosen tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fourmill.train.batch import PADDING, Batch, Inputs, Targets
from fourmill.train.masking import Ids, Mixture, Rng, mask_image, mask_text, text_positions_of, visible_counts


@dataclass(frozen=True)
class Part:
    """Chosen tokens of one modality, on one side of one sample."""

    modality: int
    positions: Ids
    ids: Ids
    given: Ids | None = None  # of a text that is a target: the token before each


@dataclass(frozen=True)
class Sample:
    """One sample as it is stored, by modality name."""

    tokens: dict[str, NDArray[np.int16]]  # (L,)
    texts: dict[str, NDArray[np.int32]]
    patches: dict[str, NDArray[np.uint8]]  # (L, K)


def mask_sample(sample: Sample, mixture: Mixture, rng: Rng) -> tuple[list[Part], list[Part]]:
    """Inputs and targets of one sample, by budgets drawn from the mixture."""
    budgets = mixture.draw(rng)
    inputs: list[Part] = []
    targets: list[Part] = []
    for i, modality in enumerate(mixture.modalities):
        num_inputs, num_targets = int(budgets.inputs[i]), int(budgets.targets[i])
        if not num_inputs and not num_targets:
            continue
        if modality.kind == "text":
            visible, target = mask_text(
                sample.texts[modality.name].tolist(), num_inputs, num_targets, budgets.keep, rng
            )
            inputs.append(Part(i, text_positions_of(len(visible)), visible))
            targets.append(text_target(i, target))
        else:
            seen, hidden = mask_image(modality.max_tokens, num_inputs, num_targets, rng)
            tokens = sample.tokens.get(modality.name)
            inputs.append(
                Part(i, seen, np.zeros(len(seen), np.int64) if tokens is None else tokens[seen].astype(np.int64))
            )
            if tokens is not None:
                targets.append(Part(i, hidden, tokens[hidden].astype(np.int64)))
    return inputs, targets


def text_target(modality: int, target: Ids) -> Part:
    """A text's target part, taught by shift: n tokens give n - 1 predictions."""
    return Part(modality, text_positions_of(max(0, len(target) - 1)), target[1:], target[:-1])


def assemble_inputs(rows: Sequence[Sequence[Part]], width: int, patches: NDArray[np.uint8]) -> Inputs:
    """Pad rows of parts to a width.

    Args:
        patches: of every visible pixel token, sample by sample, (P, K).
    """
    modality = np.full((len(rows), width), PADDING, np.int16)
    position, ids = np.zeros((len(rows), width), np.int16), np.zeros((len(rows), width), np.int32)
    for row, parts in enumerate(rows):
        end = 0
        for part in parts:
            start, end = end, end + len(part.positions)
            modality[row, start:end], position[row, start:end], ids[row, start:end] = (
                part.modality,
                part.positions,
                part.ids,
            )
    return Inputs(modality, position, ids, patches)


def assemble_targets(rows: Sequence[Sequence[Part]], width: int) -> Targets:
    """Pad rows of parts to a width."""
    modality = np.full((len(rows), width), PADDING, np.int16)
    position = np.zeros((len(rows), width), np.int16)
    given, ids, visible = (np.zeros((len(rows), width), np.int32) for _ in range(3))
    for row, parts in enumerate(rows):
        end = 0
        for part in parts:
            start, end = end, end + len(part.positions)
            modality[row, start:end], position[row, start:end], ids[row, start:end] = (
                part.modality,
                part.positions,
                part.ids,
            )
            visible[row, start:end] = visible_counts(part.given is not None, end - start)
            if part.given is not None:
                given[row, start:end] = part.given
    return Targets(modality, position, given, ids, visible)


def assemble(samples: Sequence[Sample], mixture: Mixture, rngs: Sequence[Rng], patch_bytes: int) -> Batch:
    """Mask every sample with its own generator."""
    masked = [mask_sample(sample, mixture, rng) for sample, rng in zip(samples, rngs, strict=True)]
    names = [m.name for m in mixture.modalities]
    patches = [
        sample.patches[names[part.modality]][part.positions]
        for sample, (inputs, _) in zip(samples, masked, strict=True)
        for part in inputs
        if names[part.modality] in sample.patches
    ]
    table = np.concatenate(patches) if patches else np.zeros((0, patch_bytes), np.uint8)
    config = mixture.config
    return Batch(
        assemble_inputs([inputs for inputs, _ in masked], config.num_input_tokens[1], table),
        assemble_targets([targets for _, targets in masked], config.num_target_tokens[1]),
    )
