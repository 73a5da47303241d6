"""Encoders without their decoders, in float32 and in half precision."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from fourmill.core.precision import fast_products
from fourmill.core.store import Store
from fourmill.core.work import no_progress
from fourmill.tokenize.config import MOST_DIFFERENT, MOST_FARTHER, TIE, ImageTokenizerConfig
from fourmill.tokenize.conversions import to_network
from fourmill.tokenize.image_tokenizer import ImageTokenizer
from fourmill.tokenize.load import load_image_tokenizer
from fourmill.tokenize.presets import smallest_tokenizers
from fourmill.tokenize.train import train_tokenizer
from fourmill.tokenize.train_set import read_label, unpack

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
    """Of 12 blocks, untrained."""
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


def farther(model: ImageTokenizer, x: np.ndarray, full_BN: np.ndarray, half_BN: np.ndarray) -> np.ndarray:
    """How much less near each token of half precision is than float32's; 0 where it is the same."""
    with torch.no_grad():
        latent_BDhw = model.quant_proj(model.encoder(model._embedded(to_network(x, model.config.label))))
        cosine_NK = normalize(latent_BDhw.movedim(1, -1).flatten(0, 2)) @ normalize(model.quantize.codewords_KD).T
    full, half = (torch.from_numpy(tokens.reshape(-1, 1)).long() for tokens in (full_BN, half_BN))
    return (cosine_NK.gather(1, full) - cosine_NK.gather(1, half)).where(full != half, 0).numpy()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])  # measured: up to 2.3 and 0.3 %
@pytest.mark.parametrize("label", SMALL)
def test_half_precision_disagrees_with_float32_on_few_tokens(label: str, precision: Any) -> None:
    model, x = deep_encoder(label), smooth(label, 8)
    full, half = model.tokenize(x), model.tokenize(x, precision)
    assert len(np.unique(full)) > 15
    different = float(np.mean(full != half))
    assert different <= MOST_DIFFERENT[precision]
    assert farther(model, x, full, half).max() <= MOST_FARTHER[precision]


@pytest.mark.parametrize("label", ["normal", "semseg", "clip"])
def test_what_half_precision_takes_for_another_token_is_as_near_for_trained_encoders(
    store: Store, tiny: Any, spec: Any, read_report: Any, label: Any
) -> None:
    """A training leaves codewords that are all but equal, and half of an image may lie between two of them: these do not count."""
    model = load_image_tokenizer(store, read_report(train_tokenizer(spec(label, steps=20), no_progress))["path"])
    x = unpack(read_label(store, tiny.train_set.path, tiny.train_set.digest, label).train, label)
    full = model.tokenize(x)
    for precision in ("bf16", "fp16"):
        found = farther(model, x, full, model.tokenize(x, precision))
        assert found.max() <= MOST_FARTHER[precision]
        assert (found > TIE).mean() <= MOST_DIFFERENT[precision]


def test_images_that_half_precision_cannot_hold_are_encoded_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = deep_encoder(), smooth_images(5)
    full, half = model.tokenize(x), model.tokenize(x, "bf16")
    one = int((full != half).any(1).argmax())
    assert not np.array_equal(half[one], full[one])
    real = type(model.encoder).forward

    def overflown(self: Any, *arguments: Any) -> torch.Tensor:
        features = real(self, *arguments).clone()
        if torch.is_autocast_enabled("cpu"):
            features[one, :, 2, 2] = torch.inf
        return features

    monkeypatch.setattr(type(model.encoder), "forward", overflown)
    found = model.tokenize(x, "bf16")
    assert np.array_equal(found[one], full[one])
    assert np.array_equal(np.delete(found, one, 0), np.delete(half, one, 0))


@pytest.mark.parametrize(("precision", "wanted"), [("fp32", "highest"), ("bf16", "high")])
def test_an_encoder_multiplies_as_it_is_asked_whatever_others_in_the_process_do(
    monkeypatch: pytest.MonkeyPatch, precision: Any, wanted: str
) -> None:
    """torch's switch for a GPU's ten bits is of the whole process, and CLIP in half precision turns it on beside this."""
    model = ImageTokenizer(smallest_tokenizers()["depth"], with_decoder=False).eval()
    seen: dict[str, str] = {}
    for name in ("encoder", "quant_proj"):

        def note(module: object, given: object, name: str = name) -> None:
            seen[name] = torch.get_float32_matmul_precision()

        model.get_submodule(name).register_forward_pre_hook(note)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with torch.no_grad(), fast_products(precision == "fp32"):
        model.tokens(torch.rand(1, 1, 32, 32), precision)
    assert seen == {"encoder": wanted, "quant_proj": "highest"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_damaged_weights_are_told_and_never_make_tokens(precision: Any) -> None:
    model = deep_encoder()
    with torch.no_grad():
        model.quant_proj.weight[0] = torch.nan
    with pytest.raises(ValueError, match="latents of the rgb tokenizer are no numbers"):
        model.tokenize(smooth_images(1), precision)
