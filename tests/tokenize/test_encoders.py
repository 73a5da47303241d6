"""Encoders without their decoders, in float32 and in half precision."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fourmill.core.store import Store
from fourmill.tokenize.config import MOST_DIFFERENT, ImageTokenizerConfig
from fourmill.tokenize.image_tokenizer import ImageTokenizer
from fourmill.tokenize.load import load_image_tokenizer
from fourmill.tokenize.presets import smallest_tokenizers

SMALL = smallest_tokenizers(feature_dim=12)


@pytest.mark.parametrize("label", ["rgb", "depth", "normal", "semseg", "clip"])
def test_an_encoder_alone_gives_the_tokens_of_the_whole(store: Store, chain: Any, label: str) -> None:
    path, _ = chain.tokenizer(label)
    whole, encoder = load_image_tokenizer(store, path), load_image_tokenizer(store, path, with_decoder=False)
    kept = set(encoder.state_dict())
    assert kept < set(whole.state_dict()) and not any(k.startswith(("decoder.", "post_quant_proj.")) for k in kept)
    rng = np.random.default_rng(0)
    batches: dict[str, Callable[[], np.ndarray]] = {
        "rgb": lambda: rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8),
        "depth": lambda: rng.random((2, 64, 64), dtype=np.float32),
        "normal": lambda: np.full((2, 64, 64, 3), 0.5, np.float32),
        "semseg": lambda: rng.integers(0, 133, (2, 64, 64), dtype=np.uint8),
        "clip": lambda: rng.normal(size=(2, 8, 8, 12)).astype(np.float32),
    }
    batch = batches[label]()
    assert np.array_equal(encoder.tokenize(batch), whole.tokenize(batch))
    with pytest.raises(ValueError, match="without its decoder"):
        encoder.detokenize(whole.tokenize(batch))


def deep_encoder(label: str = "rgb") -> ImageTokenizer:
    """Of 12 blocks, untrained: its latents lie closer to the borders between codewords than a trained one's."""
    values = SMALL[label].model_dump()
    values["encoder"] |= {"kind": "vit", "width": 128, "depth": 12, "heads": 2}
    values["quantizer"] |= {"codebook_size": 512}
    torch.manual_seed(0)
    return ImageTokenizer(ImageTokenizerConfig.model_validate(values), with_decoder=False).eval()


def smooth_images(number: int) -> np.ndarray:
    return smooth("rgb", number)


def smooth(label: str, number: int) -> np.ndarray:
    """Maps of blocks of 4 pixels; features of one patch are noise."""
    rng = np.random.default_rng(0)
    drawn: dict[str, Callable[[], np.ndarray]] = {
        "rgb": lambda: rng.integers(0, 256, (number, 16, 16, 3), dtype=np.uint8),
        "depth": lambda: rng.random((number, 16, 16), dtype=np.float32),
        "normal": lambda: rng.uniform(-1, 1, (number, 16, 16, 3)).astype(np.float32),
        "semseg": lambda: rng.integers(0, 133, (number, 16, 16), dtype=np.uint8),
        "clip": lambda: rng.normal(size=(number, 8, 8, 12)).astype(np.float32),
    }
    found = drawn[label]()
    return found if label == "clip" else found.repeat(4, 1).repeat(4, 2)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])  # measured: up to 2.3 and 0.3 %
@pytest.mark.parametrize("label", SMALL)
def test_half_precision_disagrees_with_float32_on_few_tokens(label: str, precision: Any) -> None:
    model, x = deep_encoder(label), smooth(label, 8)
    full, half = model.tokenize(x), model.tokenize(x, precision)
    assert len(np.unique(full)) > 15
    different = float(np.mean(full != half))
    assert different <= MOST_DIFFERENT[precision]


def test_images_that_half_precision_cannot_hold_are_encoded_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = deep_encoder(), smooth_images(5)
    full, half = model.tokenize(x), model.tokenize(x, "bf16")
    one = int((full != half).any(1).argmax())
    assert not np.array_equal(half[one], full[one])
    real = type(model.encoder).forward

    def overflown(self: torch.nn.Module, x_BCHW: torch.Tensor) -> torch.Tensor:
        features = real(self, x_BCHW).clone()  # type: ignore[arg-type]
        if torch.is_autocast_enabled("cpu"):
            features[one, :, 2, 2] = torch.inf
        return features

    monkeypatch.setattr(type(model.encoder), "forward", overflown)
    found = model.tokenize(x, "bf16")
    assert np.array_equal(found[one], full[one])
    assert np.array_equal(np.delete(found, one, 0), np.delete(half, one, 0))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_damaged_weights_are_told_and_never_make_tokens(precision: Any) -> None:
    model = deep_encoder()
    with torch.no_grad():
        model.quant_proj.weight[0] = torch.nan
    with pytest.raises(ValueError, match="latents of the rgb tokenizer are no numbers"):
        model.tokenize(smooth_images(1), precision)
