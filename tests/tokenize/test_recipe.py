"""What a tokenizer is trained on and by, each part beside its formula, written out here (Table 3, appendix B.3)."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fourmill.tokenize.config import ImageTokenizerConfig
from fourmill.tokenize.conversions import to_network, to_store
from fourmill.tokenize.image_tokenizer import ImageTokenizer
from fourmill.tokenize.presets import paper_tokenizers, smallest_tokenizers
from fourmill.tokenize.state import start
from fourmill.tokenize.train_set import LabelArrays

SMALL = smallest_tokenizers(feature_dim=12)
PLAIN, DIFFUSION = ("semseg", "clip"), ("rgb", "depth", "normal")
COMMITMENT = 0.25  # another weight than 1, so that it shows


def tokenizer(label: str, **training: Any) -> ImageTokenizer:
    values = SMALL[label].model_dump()
    values["quantizer"]["commitment_weight"] = COMMITMENT
    values["training"] |= training
    torch.manual_seed(0)
    return ImageTokenizer(ImageTokenizerConfig.model_validate(values)).eval()


def batch(label: str, number: int = 3) -> Tensor:
    rng = np.random.default_rng(1)
    if label == "semseg":
        return to_network(rng.integers(0, 133, (number, 64, 64)).astype(np.uint8), label, "cpu")
    if label == "clip":
        return to_network(3 * rng.normal(size=(number, 8, 8, 12)).astype(np.float32), label, "cpu")
    channels = 1 if label == "depth" else 3
    return torch.from_numpy(rng.uniform(-1, 1, (number, channels, 64, 64)).astype(np.float32))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_formula(loss: str, predicted: Tensor, target: Tensor) -> Tensor:
    if loss == "cross_entropy":
        logits_BHWK = predicted.movedim(1, -1)
        chosen = logits_BHWK.gather(-1, target[..., None])[..., 0]
        return (logits_BHWK.logsumexp(-1) - chosen).mean()
    distance = (predicted - target).abs()
    return (distance**2 if loss == "mse" else torch.where(distance < 1, distance**2 / 2, distance - 0.5)).mean()


@pytest.mark.parametrize("label", PLAIN)
@torch.no_grad()
def test_a_plain_decoder_is_scored_on_every_pixel_of_its_own(label: str) -> None:
    model, x = tokenizer(label, scored_share=1.0), batch(label)
    found, quantized = model.loss(x, generator())
    predicted = model.decoder(model.post_quant_proj(model.quantize.lookup(quantized.tokens_Bhw)))
    expected = by_formula(model.config.training.loss, predicted, x)
    assert found.item() == pytest.approx((expected + COMMITMENT * quantized.commitment).item(), rel=1e-5)


@torch.no_grad()
def test_a_share_of_tokens_is_compared_with_the_pixels_of_these_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tokenizer("semseg", scored_share=0.25)
    place = torch.arange(64).view(1, 8, 8)  # each patch of a class of its own
    x = place.repeat_interleave(8, 1).repeat_interleave(8, 2).expand(2, -1, -1)
    asked: list[Tensor] = []

    def knows_all(places_BND: Tensor) -> Tensor:
        asked.append(places_BND)
        like = model_pixel_values(places_BND.expand(-1, -1, model.config.decoder.width))  # type: ignore[union-attr]
        return 50.0 * F.one_hot(places_BND.long(), like.shape[-1]).float().expand_as(like)

    model_pixel_values = model.decoder.pixel_values
    monkeypatch.setattr(model.decoder, "features", lambda latent: torch.arange(64.0).view(1, 64, 1).expand(2, 64, 1))
    monkeypatch.setattr(model.decoder, "pixel_values", knows_all)
    found, quantized = model.loss(x, generator())
    assert found.item() == pytest.approx(COMMITMENT * quantized.commitment.item(), abs=1e-4)
    (some,) = asked
    assert some.shape == (2, 16, 1) and not torch.equal(some[0], some[1])


@pytest.mark.parametrize("label", DIFFUSION)
def test_a_diffusion_decoder_predicts_the_image_itself_at_any_step(label: str) -> None:
    model, x = tokenizer(label), batch(label, 8)
    steps: list[Tensor] = []

    class Knows(nn.Module):
        def forward(self, noised: Tensor, step_B: Tensor, latent: Tensor) -> Tensor:
            steps.append(step_B)
            assert not torch.equal(noised, x)
            return x + 0.5

    model.decoder = Knows()  # type: ignore[assignment]
    for seed in range(16):
        found, quantized = model.loss(x, generator(seed))
        loss = by_formula(model.config.training.loss, x + 0.5, x)
        assert found.item() == pytest.approx((loss + COMMITMENT * quantized.commitment).item(), rel=1e-5)
    drawn = torch.cat(steps)
    assert 0 <= drawn.min() < 100 and 900 < drawn.max() < 1000


def test_what_decoders_give_is_brought_to_what_is_stored() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0]).view(1, 1, 1, 6)
    rgb = to_store(torch.cat([values, -values, torch.zeros_like(values)], 1), "rgb", (0.0, 0.0))
    assert rgb.dtype == np.uint8 and rgb[0, 0, :, 0].tolist() == [0, 0, 128, 191, 255, 255]
    assert rgb[0, 0, :, 1].tolist() == [255, 255, 128, 64, 0, 0] and set(rgb[..., 2].ravel().tolist()) == {128}
    assert to_store(values, "depth", (-1.0, 3.0))[0, 0].tolist() == [0, 0, 0.25, 0.375, 0.5, 0.75]
    normal = to_store(torch.tensor([3.0, 0.0, -4.0]).view(1, 3, 1, 1), "normal", (0.0, 0.0))
    assert normal[0, 0, 0].tolist() == pytest.approx([0.6, 0, -0.8])


def test_the_optimiser_is_the_recipes() -> None:
    config = SMALL["semseg"]
    training = config.training.model_copy(update={"betas": (0.7, 0.8), "weight_decay": 0.3})
    maps = np.zeros((2, 64, 64), np.uint8)
    state = start(config.model_copy(update={"training": training}), LabelArrays(maps, maps, maps, 2), "cpu")
    decays = {id(p): group["weight_decay"] for group in state.optimizer.param_groups for p in group["params"]}
    assert all(group["betas"] == (0.7, 0.8) for group in state.optimizer.param_groups)
    trained = [p for p in state.model.parameters() if p.requires_grad]
    assert [decays[id(p)] for p in trained] == [0.3 if p.ndim > 1 else 0.0 for p in trained]


def test_codewords_go_stale_below_the_papers_threshold_at_the_mean_side() -> None:
    config = paper_tokenizers()["rgb"]
    assert config.training.sides_px[0] == 224 and config.training.sides_px[-1] == 448
    tokens = config.training.batch_size * 21**2  # at 336 pixels
    quantizer = config.quantizer
    assert quantizer.stale_coefficient
    assert config.stale_threshold == pytest.approx(tokens / (quantizer.stale_coefficient * 16_384))


@pytest.mark.parametrize("label", sorted(SMALL))
def test_the_encoders_last_layer_is_the_public_ones(label: str) -> None:
    encoder = tokenizer(label).encoder
    assert isinstance(encoder.post_mlp.act, nn.Tanh)
    assert {module.eps for module in encoder.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}


def test_the_last_layer_and_the_codebook_are_computed_in_float32() -> None:
    """Under bfloat16, whose seven bits do not tell codewords apart."""
    model = tokenizer("rgb")
    seen: dict[str, torch.dtype] = {}
    model.encoder.post_mlp.fc1.register_forward_hook(lambda *call: seen.update(last=call[2].dtype))
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    model.tokenize(image, "bf16")
    assert seen == {"last": torch.float32}

    quantize = tokenizer("semseg").quantize
    latent = torch.randn(4, quantize.config.latent_dim, 16, 16, generator=generator())
    exact = quantize(latent).tokens_Bhw
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantize(latent).tokens_Bhw, exact)


@torch.no_grad()
def test_codewords_restart_by_how_often_they_were_used_lately_from_drawn_latents() -> None:
    quantize = tokenizer("semseg").quantize.train()
    quantize.stale_threshold = 1.0
    book = quantize._codebook
    book.initted.fill_(1)
    book.cluster_size.fill_(100.0)  # used much, if not by this batch
    before = book.embed.clone()
    latent = torch.randn(1, quantize.config.latent_dim, 1, 1, generator=generator()).expand(1, -1, 4, 4)
    used = int(quantize(latent, generator()).tokens_Bhw[0, 0, 0])
    others = torch.arange(len(before)) != used
    assert torch.allclose(book.embed[others], before[others], atol=0.02)

    restarted = []
    many = torch.randn(8, quantize.config.latent_dim, 16, 16, generator=generator(1))
    for seed in (0, 1):
        fresh = tokenizer("semseg").quantize.train()
        fresh.stale_threshold = 1e9
        fresh(many, generator(seed))
        restarted.append(fresh.codewords_KD.clone())
    assert not torch.equal(*restarted)
