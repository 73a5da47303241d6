from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from fourmill.core.labels import decode_depth, decode_normal, encode_depth, encode_normal, encode_semseg
from fourmill.core.metrics import standardise_depth
from fourmill.pipelines.profiles import smallest
from fourmill.runtime.project import Project
from fourmill.tokenize.config import ImageTokenizerConfig
from fourmill.tokenize.conversions import standardised
from fourmill.tokenize.image_tokenizer import ImageTokenizer
from fourmill.tokenize.load import ModelError, check_keys
from fourmill.tokenize.presets import paper_tokenizers, smallest_tokenizers
from fourmill.tokenize.samples import LabelError
from fourmill.tokenize.train_set import unpack
from fourmill.tokenize.unet import PatchedUNet
from fourmill.tokenize.vit import VitDecoder

rng = np.random.default_rng(0)
SMALL = smallest_tokenizers(feature_dim=12)


def _labels(label: str, number: int, side: int = 64) -> np.ndarray:
    if label == "rgb":
        return rng.integers(0, 256, (number, side, side, 3), dtype=np.uint8)
    if label == "depth":
        return rng.random((number, side, side), dtype=np.float32)
    if label == "normal":
        normal = rng.normal(size=(number, side, side, 3)).astype(np.float32)
        return normal / np.linalg.norm(normal, axis=-1, keepdims=True)
    if label == "semseg":
        return rng.choice(np.array([0, 28, 132, 255], np.uint8), (number, side, side))
    return rng.normal(size=(number, side // 8, side // 8, 12)).astype(np.float32)


def _tokenizer(label: str, **encoder: object) -> ImageTokenizer:
    torch.manual_seed(0)
    values = SMALL[label].model_dump()
    values["encoder"] |= encoder
    return ImageTokenizer(ImageTokenizerConfig.model_validate(values)).eval()


@pytest.mark.parametrize("label", SMALL)
def test_labels_become_tokens_and_labels_of_the_same_kind_again(label):
    tokenizer, batch = _tokenizer(label), _labels(label, 3)
    tokens = tokenizer.tokenize(batch)
    assert tokens.shape == (3, 64) and tokens.dtype == np.int16
    assert 0 <= tokens.min() and tokens.max() < 512
    decoded = tokenizer.detokenize(tokens, seed=1)
    assert decoded.shape == batch.shape and decoded.dtype == batch.dtype
    assert np.array_equal(decoded, tokenizer.detokenize(tokens, seed=1))
    assert tokenizer.tokenize(decoded).shape == tokens.shape
    nothing = tokenizer.detokenize(tokens[:0])
    assert nothing.shape == (0, *batch.shape[1:]) and nothing.dtype == batch.dtype


@pytest.mark.parametrize("label", ["semseg", "depth"])
def test_tokens_do_not_depend_on_what_else_is_in_the_batch(label):
    tokenizer, batch = _tokenizer(label, kind="vit"), _labels(label, 70)
    whole = tokenizer.tokenize(batch)
    assert np.array_equal(whole[[5, 66]], tokenizer.tokenize(batch[[5, 66]]))
    decoded = tokenizer.detokenize(whole[:5])
    assert np.allclose(decoded[3], tokenizer.detokenize(whole[3:4])[0], atol=1e-4)


@pytest.mark.parametrize(
    ("label", "batch", "reason"),
    [
        (
            "rgb",
            np.zeros((1, 64, 64, 3), np.float32),
            r"rgb is float32 \(1, 64, 64, 3\), expected uint8 \(B, S, S, 3\)",
        ),
        ("rgb", np.zeros((1, 64, 32, 3), np.uint8), r"rgb is uint8 \(1, 64, 32, 3\), expected uint8 \(B, S, S, 3\)"),
        ("rgb", np.zeros((1, 60, 60, 3), np.uint8), "rgb crops of 60 pixels: .* multiple of 8; it was trained on 64"),
        (
            "depth",
            np.full((1, 64, 64), 1.5, np.float32),
            r"depth spans 1\.5\.\.1\.5, expected finite numbers in 0\.0\.\.1\.0",
        ),
        ("depth", np.full((1, 64, 64), np.nan, np.float32), "finite"),
        (
            "depth",
            np.zeros((1, 64, 64), np.uint8),
            r"depth is uint8 \(1, 64, 64\), expected float32 or uint16 \(B, S, S\)",
        ),
        ("normal", np.full((1, 64, 64, 3), -2, np.float32), r"in -1\.0\.\.1\.0"),
        ("semseg", np.full((1, 64, 64), 133, np.uint8), r"class 133, expected 0\.\.132, or 255"),
        ("clip", np.zeros((1, 8, 8, 13), np.float32), r"\(B, S, S, 12\)"),
        (
            "clip",
            np.full((1, 8, 8, 12), np.nan, np.float32),
            r"clip spans nan\.\.nan, expected finite numbers of any size",
        ),
    ],
)
def test_what_a_tokenizer_cannot_take_is_said_with_what_it_takes(label, batch, reason):
    with pytest.raises(LabelError, match=reason):
        _tokenizer(label).tokenize(batch)


@pytest.mark.parametrize(("label", "kind"), [("depth", np.uint16), ("normal", np.uint8)])
def test_labels_as_files_hold_them_have_the_tokens_of_their_floats(label, kind):
    shape = (3, 64, 64) if label == "depth" else (3, 64, 64, 3)
    stored = rng.integers(0, np.iinfo(kind).max + 1, shape).astype(kind)
    png = [cv2.imencode(".png", one if label == "depth" else one[..., ::-1])[1].tobytes() for one in stored]
    floats = np.stack([decode_depth(data) if label == "depth" else decode_normal(data) for data in png])
    tokenizer = _tokenizer(label, kind="vit")
    assert np.array_equal(tokenizer.tokenize(stored), tokenizer.tokenize(floats))


ENCODERS = {"depth": encode_depth, "normal": encode_normal, "semseg": encode_semseg}
STORED = {"depth": np.uint16, "normal": np.uint8}


@pytest.mark.parametrize("label", SMALL)
def test_labels_come_back_as_files_hold_them_and_are_taken_again(label):
    tokenizer, tokens = decoding(label), _tokens(label, 3)
    decoded, stored = (tokenizer.detokenize(tokens, as_stored=kept) for kept in (False, True))
    assert stored.dtype == STORED.get(label, decoded.dtype) and stored.shape == decoded.shape
    assert len(np.unique(stored)) > 2
    if label in ENCODERS:  # images are stored as they come, features are not
        pngs = [np.frombuffer(ENCODERS[label](one), np.uint8) for one in decoded]
        in_files = np.stack([np.asarray(cv2.imdecode(png, cv2.IMREAD_UNCHANGED)) for png in pngs])
        assert np.array_equal(stored, in_files[..., ::-1] if label == "normal" else in_files)  # OpenCV has BGR
    else:
        assert np.array_equal(stored, decoded)
    assert np.array_equal(tokenizer.tokenize(stored), tokenizer.tokenize(unpack(stored, label)))


def decoding(label: str) -> ImageTokenizer:
    """A new U-Net gives zeros whatever its latents are; this one does not."""
    tokenizer = _tokenizer(label)
    if isinstance(tokenizer.decoder, PatchedUNet):
        torch.nn.init.normal_(tokenizer.decoder.get_parameter("out.2.weight"))
    return tokenizer


def _tokens(label: str, number: int) -> np.ndarray:
    return rng.integers(0, SMALL[label].codebook_size, (number, SMALL[label].num_tokens))


@pytest.mark.parametrize("label", SMALL)
def test_a_damaged_decoder_is_told_and_never_makes_labels(label):
    tokenizer = decoding(label)
    with torch.no_grad():
        next(tokenizer.decoder.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match=f"the {label} tokenizer decodes to no numbers: its weights are damaged"):
        tokenizer.detokenize(_tokens(label, 1))


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_as_many_sampling_steps_as_the_schedule_does_not_have_are_refused(steps):
    tokenizer = _tokenizer("rgb").train()
    with pytest.raises(ValueError, match=rf"{steps} sampling steps, expected 1\.\.1000: the schedule has 1000"):
        tokenizer.detokenize(_tokens("rgb", 1), sample_steps=steps)
    assert tokenizer.training  # as it was


@pytest.mark.parametrize("tokens", [np.full((1, 64), 3.7), np.ones((1, 64), bool)])
def test_tokens_that_are_no_integers_are_refused(tokens):
    with pytest.raises(LabelError, match=rf"clip tokens are {tokens.dtype}, expected integers in 0\.\.511"):
        _tokenizer("clip").detokenize(tokens)


def test_tokens_outside_the_codebook_are_refused():
    tokenizer = _tokenizer("clip")
    with pytest.raises(LabelError, match=r"0\.\.511"):
        tokenizer.detokenize(np.full((1, 64), 512))
    with pytest.raises(LabelError, match="N a square number, 64 at the training's 64 pixels"):
        tokenizer.detokenize(np.zeros((1, 48), np.int16))


@pytest.mark.parametrize("label", SMALL)
@pytest.mark.parametrize("side", [32, 96])
def test_other_sizes_become_grids_of_their_own_and_maps_of_their_side_again(label, side):
    tokenizer, batch = _tokenizer(label, kind="vit"), _labels(label, 2, side)
    tokens = tokenizer.tokenize(batch)
    assert tokens.shape == (2, (side // 8) ** 2) and tokens.dtype == np.int16
    decoded = tokenizer.detokenize(tokens)
    assert decoded.shape == batch.shape and decoded.dtype == batch.dtype


def test_a_patch_has_the_same_token_in_a_crop_of_any_size():
    tokenizer, batch = _tokenizer("rgb"), _labels("rgb", 2)  # the patch encoder sees one patch at a time
    whole = tokenizer.tokenize(batch).reshape(2, 8, 8)
    assert np.array_equal(tokenizer.tokenize(batch[:, :32, :32].copy()), whole[:, :4, :4].reshape(2, 16))


def test_a_unet_with_more_levels_takes_fewer_sizes():
    decoder = SMALL["rgb"].decoder.model_dump() | {"multipliers": (1, 1, 1), "attention_levels": ()}
    tokenizer = ImageTokenizer(ImageTokenizerConfig.model_validate(SMALL["rgb"].model_dump() | {"decoder": decoder}))
    assert tokenizer.config.side_multiple == 16 and SMALL["rgb"].side_multiple == SMALL["semseg"].side_multiple == 8
    with pytest.raises(LabelError, match=r"rgb crops of 40 pixels: .* a multiple of 16"):
        tokenizer.tokenize(_labels("rgb", 1, 40))
    with pytest.raises(LabelError, match=r"rgb crops of 40 pixels: .* a multiple of 16"):
        tokenizer.detokenize(np.zeros((1, 25), np.int16))


def test_semseg_ids_are_shifted_by_one_and_255_is_row_0():
    from fourmill.tokenize.conversions import to_network, to_store

    stored = np.array([[[0, 1, 132, 255]]], np.uint8)
    rows = to_network(stored, "semseg")
    assert rows.tolist() == [[[1, 2, 133, 0]]]
    logits = torch.nn.functional.one_hot(rows, 134).movedim(-1, 1)
    assert np.array_equal(to_store(logits, "semseg", (0, 1)), stored)


def test_pixels_are_ordered_alike_in_scoring_and_in_decoding():
    tokenizer = _tokenizer("semseg")
    latent = torch.randn(2, 32, 8, 8)
    with torch.no_grad():
        features = tokenizer.post_quant_proj(latent)
        values = tokenizer.decoder(features)
        assert isinstance(tokenizer.decoder, VitDecoder)
        flat = tokenizer.decoder.out_proj(tokenizer.decoder.features(features))
    # Rows of out_proj are ordered class, row, column: token 9 is the patch in row 1, column 1.
    patch = flat[0, 9].view(134, 8, 8)
    assert torch.allclose(values[0, :, 8:16, 8:16], patch, atol=1e-5)


def test_the_papers_tokenizers_have_the_public_names_and_shapes():
    config = paper_tokenizers()
    with torch.device("meta"):
        models = {label: ImageTokenizer(config[label]) for label in ("rgb", "semseg", "clip")}
    shapes = {label: {k: tuple(v.shape) for k, v in m.state_dict().items()} for label, m in models.items()}
    assert {label: len(found) for label, found in shapes.items()} == {"rgb": 604, "semseg": 314, "clip": 313}
    semseg = {
        "cls_emb.weight": (134, 64),
        "encoder.pos_emb": (1, 768, 14, 14),
        "encoder.proj.weight": (768, 64, 16, 16),
        "encoder.blocks.11.attn.qkv.weight": (2304, 768),
        "encoder.blocks.0.mlp.fc1.bias": (3072,),
        "encoder.norm_mlp.weight": (768,),
        "encoder.post_mlp.fc2.weight": (768, 3072),
        "quant_proj.weight": (32, 768, 1, 1),
        "quantize._codebook.initted": (1,),
        "quantize._codebook.cluster_size": (4096,),
        "quantize._codebook.embed": (4096, 32),
        "post_quant_proj.weight": (768, 32, 1, 1),
        "decoder.pos_emb": (1, 768, 14, 14),
        "decoder.blocks.11.norm2.bias": (768,),
        "decoder.post_mlp.fc1.weight": (3072, 768),
        "decoder.out_proj.weight": (34304, 768),
    }
    assert {key: shapes["semseg"].get(key) for key in semseg} == semseg
    assert shapes["clip"]["encoder.proj.weight"] == (768, 512, 1, 1)
    assert shapes["clip"]["decoder.out_proj.weight"] == (512, 768)
    assert "post_quant_proj.weight" not in shapes["rgb"]
    # The public weights are counted with their stored positions of 28x28, here they are of 14x14.
    positions = {"rgb": 1, "clip": 2}
    counts = {
        k: sum(p.numel() for p in models[k].parameters()) + n * 768 * (28**2 - 14**2) for k, n in positions.items()
    }
    assert counts == {"rgb": pytest.approx(287.35e6, abs=2e4), "clip": pytest.approx(181.60e6, abs=2e4)}


def test_weights_that_do_not_fit_are_named():
    with torch.device("meta"):
        tokenizer = _tokenizer("clip")
        state = dict(tokenizer.state_dict())
        state["decoder.extra"] = state.pop("quant_proj.bias")
        state["quant_proj.weight"] = torch.zeros(32, 9, 1, 1)
        with pytest.raises(ModelError) as error:
            check_keys(state, tokenizer, "here")
    for part in (
        "quant_proj.bias: missing, expected (32,)",
        "decoder.extra: unknown",
        "quant_proj.weight: shape (32, 9, 1, 1)",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("label", "change", "reason"),
    [
        ("rgb", {"patch_px": 7}, "not a multiple of patch_px"),
        ("rgb", {"feature_dim": 8}, "clip needs one"),
        ("clip", {"feature_dim": None}, "clip needs one"),
        ("clip", {"decoder": SMALL["rgb"].decoder.model_dump()}, "no diffusion decoder"),
        (
            "rgb",
            {"input_px": 72, "decoder": SMALL["rgb"].decoder.model_dump() | {"multipliers": (1, 1, 1, 1)}},
            "multiple of 32",
        ),
        ("semseg", {"training": SMALL["rgb"].training.model_dump()}, "cross_entropy is for semseg"),
        ("semseg", {"encoder": {"width": 130, "heads": 4}}, "multiple of 4 and of its 4 heads"),
        ("semseg", {"quantizer": {"codebook_size": 40_000}}, "32768"),
        ("rgb", {"colour": 1}, "Extra inputs"),
    ],
)
def test_a_config_that_cannot_work_is_refused(label, change, reason):
    with pytest.raises(ValueError, match=reason):
        ImageTokenizerConfig.model_validate(SMALL[label].model_dump() | change)


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("decoder", {"attention_levels": (2, 3)}, r"multipliers \(1, 2\) make levels 0 to 1"),
        ("training", {"steps": 20, "warmup_steps": 21}, "would never reach its peak"),
    ],
)
def test_a_training_that_would_not_do_what_it_says_is_refused(part: str, change: dict[str, Any], reason: str):
    values = SMALL["rgb"].model_dump()
    config = ImageTokenizerConfig.model_validate(values | {part: values[part] | change})  # as one that is stored may be
    with pytest.raises(ValueError, match=reason):
        config.require_sound()
    project = smallest(Path("out"))
    with pytest.raises(ValueError, match=reason):
        Project.model_validate(project.model_dump() | {"tokenizers": project.tokenizers | {"rgb": config}})


def test_depth_is_standardised_on_a_device_as_on_the_host():
    depth = rng.random((5, 33, 41), dtype=np.float32)
    depth[1] = 0.3  # flat
    assert np.allclose(standardised(torch.from_numpy(depth)).numpy(), standardise_depth(depth), atol=1e-6)


class _OnDevice:
    """Features that can stay where they are made."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.found = _labels("clip", 3)

    def __call__(self, crops: np.ndarray) -> np.ndarray:
        self.asked.append("host")
        return self.found[: len(crops)]

    def on_device(self, crops: np.ndarray) -> torch.Tensor:
        self.asked.append("device")
        return torch.from_numpy(self.found[: len(crops)])


def test_features_that_stay_on_the_device_become_the_same_tokens():
    tokenizer, features, crops = _tokenizer("clip"), _OnDevice(), _labels("rgb", 3)
    there = tokenizer.tokenize_features(features, crops)
    assert np.array_equal(there, tokenizer.tokenize_features(features.__call__, crops))
    assert features.asked == ["device", "host"]


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (torch.zeros(1, 8, 8, 11), r"\(1, 8, 8, 11\), expected float32 \(B, S, S, 12\)"),
        (torch.zeros(1, 8, 7, 12), "of square crops"),
        (torch.zeros(1, 8, 8, 12).half(), "torch.float16"),
        (torch.full((1, 8, 8, 12), torch.inf), r"clip spans inf\.\.inf, expected finite numbers of any size"),
    ],
)
def test_features_on_a_device_that_do_not_fit_are_refused(found: torch.Tensor, reason: str):
    with pytest.raises(LabelError, match=reason):
        _tokenizer("clip").tokenize(found)
    with pytest.raises(LabelError, match="only features may be tensors"):
        _tokenizer("rgb").tokenize(found)


def test_features_are_rounded_to_16_bits_wherever_they_are(monkeypatch: pytest.MonkeyPatch):
    """As training sets hold them."""
    tokenizer, features, crops = _tokenizer("clip"), _OnDevice(), _labels("rgb", 3)
    seen: list[np.ndarray] = []
    monkeypatch.setattr(tokenizer, "tokenize", lambda batch, precision: seen.append(np.asarray(batch)))
    tokenizer.tokenize_features(features, crops)
    tokenizer.tokenize_features(features.__call__, crops)
    rounded = features.found.astype(np.float16).astype(np.float32)
    assert not np.array_equal(rounded, features.found)
    assert len(seen) == 2 and all(np.array_equal(one, rounded) for one in seen)
