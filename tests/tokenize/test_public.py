"""Public 4M tokenizers: what their configs say, what their files hold, and ours in their format."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from fourmill.core.safe_load import UnsafeFileError
from fourmill.core.sequences import SequenceError
from fourmill.core.store import LocalStore, Store
from fourmill.tokenize.config import ImageTokenizerConfig
from fourmill.tokenize.exchange import (
    Origin,
    export_image_tokenizer,
    import_image_tokenizer,
    import_text_tokenizer,
    read_origin,
)
from fourmill.tokenize.image_tokenizer import ImageTokenizer
from fourmill.tokenize.load import ModelError, load_image_tokenizer, save_image_tokenizer
from fourmill.tokenize.presets import smallest_tokenizers
from fourmill.tokenize.public import PublicConfigError, from_public, to_public
from fourmill.tokenize.released import label_of_name
from fourmill.tokenize.served import report_tokenizer
from fourmill.tokenize.train_set import TrainSet

ORIGIN = Origin("a test", "ours")
SMALL = smallest_tokenizers(feature_dim=12)
# What the released config.json files hold; `[U]` in the spec: the 448 of image_size.
COMMON: dict[str, Any] = {
    "image_size": 448,
    "enc_type": "vit_b_enc",
    "post_mlp": True,
    "patch_size": 16,
    "quant_type": "lucid",
    "latent_dim": 32,
    "norm_codes": True,
    "sync_codebook": True,
    "threshold_ema_dead_code": 0.5,
    "n_labels": None,
}
DIFFUSION = {"dec_type": "unet_patched", "beta_schedule": "linear", "prediction_type": "sample"}
PLAIN = {"dec_type": "vit_b_dec"}
RELEASED: dict[str, dict[str, Any]] = {
    "rgb": {**COMMON, **DIFFUSION, "n_channels": 3, "codebook_size": 16384},
    "depth": {**COMMON, **DIFFUSION, "n_channels": 1, "codebook_size": 8192, "thresholding": False},
    "normal": {**COMMON, **DIFFUSION, "n_channels": 3, "codebook_size": 8192},
    "semseg": {**COMMON, **PLAIN, "n_channels": 64, "n_labels": 134, "codebook_size": 4096},
    "clip": {**COMMON, **PLAIN, "n_channels": 512, "patch_proj": False, "codebook_size": 8192},
}


def tiny(label: str, **encoder: Any) -> ImageTokenizer:
    values = SMALL[label].model_dump()
    values["encoder"] |= {"width": 32, "depth": 1, "heads": 2, **encoder}
    values["quantizer"] |= {"codebook_size": 32, "kmeans_init": False}
    if values["decoder"]["kind"] == "vit":
        values["decoder"] |= {"width": 32, "depth": 1, "heads": 2}
    torch.manual_seed(1)
    model = ImageTokenizer(ImageTokenizerConfig.model_validate(values), (-2.5, 3.0)).eval()
    for parameter in model.parameters():  # the last layers start at zero, which would hide what is before them
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def batch(label: str, num: int = 3, side: int = 64) -> np.ndarray:
    rng = np.random.default_rng(5)
    if label == "rgb":
        return rng.integers(0, 256, (num, side, side, 3), dtype=np.uint8)
    if label == "semseg":
        return rng.choice(np.array([0, 28, 132, 255], np.uint8), (num, side, side))
    if label == "depth":
        return rng.random((num, side, side), dtype=np.float32)
    if label == "normal":
        normal = rng.normal(size=(num, side, side, 3)).astype(np.float32)
        return normal / np.linalg.norm(normal, axis=-1, keepdims=True)
    return rng.normal(size=(num, side // 8, side // 8, 12)).astype(np.float32)


@pytest.fixture
def exported(store: Store, tmp_path: Path) -> Path:
    """A tiny semseg tokenizer in the public format."""
    return export(store, tiny("semseg"), tmp_path / "exported")


def export(store: Store, model: ImageTokenizer, target: Path) -> Path:
    _, folder = save_image_tokenizer(store, f"tokenizer_{model.config.label}", model, "card {digest}")
    export_image_tokenizer(store, folder, target)
    assert {path.stat().st_mode & 0o777 for path in target.iterdir()} == {0o666 & ~_umask()}
    return target


def test_the_released_tokenizers_have_the_public_keys_shapes_and_sizes() -> None:
    with torch.device("meta"):
        models = {k: ImageTokenizer(from_public(RELEASED[k], label_of_name(f"tokenizer_{k}"), k)) for k in RELEASED}
    shapes = {k: {key: tuple(v.shape) for key, v in m.state_dict().items()} for k, m in models.items()}
    numbers = {k: len(found) for k, found in shapes.items()}
    assert numbers == {"rgb": 604, "normal": 604, "depth": 604, "semseg": 314, "clip": 313}
    totals = {k: round(sum(p.numel() for p in m.parameters()) / 1e6, 2) for k, m in models.items()}
    assert totals == {"rgb": 287.35, "normal": 287.35, "depth": 286.81, "semseg": 219.78, "clip": 181.60}
    for label, channels in (("rgb", 3), ("depth", 1)):
        assert shapes[label]["encoder.pos_emb"] == (1, 768, 28, 28)
        assert shapes[label]["encoder.proj.weight"] == (768, channels, 16, 16)
        assert shapes[label]["decoder.input_blocks.0.0.weight"] == (256, 16 * channels + 32, 3, 3)
        assert shapes[label]["decoder.input_blocks.9.1.qkv.weight"] == (1536, 512, 1)
        assert shapes[label]["decoder.output_blocks.11.0.in_layers.2.weight"] == (512, 768, 3, 3)
        assert shapes[label]["decoder.output_blocks.3.2.conv.weight"] == (512, 512, 3, 3)
        assert shapes[label]["decoder.out.2.weight"] == (16 * channels, 256, 3, 3)
    assert not models["depth"].config.model_dump()["decoder"]["clamp"]
    assert models["rgb"].config.model_dump()["decoder"]["clamp"]


@pytest.mark.parametrize("label", SMALL)
@pytest.mark.parametrize("kind", ["vit", "patch"])
def test_what_is_exported_and_imported_again_gives_equal_tokens_and_equal_labels(
    store: Store, tmp_path: Path, label: str, kind: str
) -> None:
    model, x = tiny(label, kind=kind), batch(label)
    made = import_image_tokenizer(store, f"tokenizer_{label}", export(store, model, tmp_path / "public"), ORIGIN)
    again = load_image_tokenizer(store, made.path)
    tokens = model.tokenize(x)
    assert len(np.unique(tokens)) > 1
    assert np.array_equal(again.tokenize(x), tokens)
    assert np.array_equal(again.detokenize(tokens), model.detokenize(tokens))
    assert read_origin(store, made.path) == ORIGIN and made.digest in store.read(f"{made.path}/card.md").decode()
    assert import_image_tokenizer(store, made.name, tmp_path / "public", ORIGIN) == made


def test_the_card_of_an_imported_tokenizer_has_its_figures_once_it_is_scored(
    store: Store, exported: Path, train_set: TrainSet
) -> None:
    made = import_image_tokenizer(store, "tokenizer_semseg", exported, ORIGIN)
    card = store.read(f"{made.path}/card.md").decode()
    for said in (
        "- eats COCO panoptic class ids",
        "- gives 8 x 8 tokens",
        "- training data: not known here",
        "- origin: a test",
    ):
        assert said in card
    assert "## Figures" not in card
    config = load_image_tokenizer(store, made.path).config

    def scored() -> tuple[dict[str, Any], str]:
        path = report_tokenizer(store, made.name, made.path, config, train_set.path, train_set.digest)
        return json.loads(store.read(path)), store.read(f"{made.path}/card.md").decode()

    report, with_figures = scored()
    assert with_figures.startswith(card) and train_set.digest in with_figures
    assert f"| miou | {report['figures']['miou']} | {report['baseline']['miou']} |" in with_figures
    assert f"perplexity {report['perplexity']}" in with_figures
    import_image_tokenizer(store, "tokenizer_semseg", exported, ORIGIN)
    assert scored() == (report, with_figures)


@pytest.mark.parametrize("label", RELEASED)
def test_a_public_config_comes_back_as_it_was(label: Any) -> None:
    config = from_public(RELEASED[label], label, "here")
    values = to_public(config, 448, (-4.0, 4.0))
    assert {k: v for k, v in values.items() if k in RELEASED[label]} == {
        **RELEASED[label],
        "sync_codebook": False,  # else the public code waits for other processes
        "threshold_ema_dead_code": config.stale_threshold,
    }
    assert from_public(values, label, "here") == config


def test_positions_are_interpolated_from_the_stored_grid(store: Store, tmp_path: Path) -> None:
    model, x = tiny("semseg"), batch("semseg", side=32)
    made = import_image_tokenizer(store, "tokenizer_semseg", export(store, model, tmp_path / "public"), ORIGIN)
    again = load_image_tokenizer(store, made.path)
    stored = load_file(tmp_path / "public" / "model.safetensors")["encoder.pos_emb"]
    assert stored.shape[-2:] == (8, 8)
    fitted = ImageTokenizer(model.config.model_copy(update={"input_px": 32}))
    state = model.state_dict()
    for key in ("encoder.pos_emb", "decoder.pos_emb"):
        state[key] = F.interpolate(state[key], size=(4, 4), mode="bicubic", align_corners=False)
    fitted.load_state_dict(state)
    tokens = again.tokenize(x)
    assert tokens.shape == (3, 16) and np.array_equal(tokens, fitted.eval().tokenize(x))
    assert np.array_equal(again.detokenize(tokens), fitted.detokenize(tokens))


def test_codewords_are_decoded_as_stored_and_compared_by_direction(store: Store, tmp_path: Path) -> None:
    target = export(store, tiny("clip"), tmp_path / "public")
    state = load_file(target / "model.safetensors")
    state["quantize._codebook.embed"] *= torch.linspace(0.2, 1, 32)[:, None]  # averages of unit vectors are shorter
    save_file(state, target / "model.safetensors")
    again = load_image_tokenizer(store, import_image_tokenizer(store, "tokenizer_clip", target, ORIGIN).path)
    x = batch("clip")
    tokens = again.tokenize(x)
    assert np.array_equal(tokens, tiny("clip").tokenize(x))
    wanted = state["quantize._codebook.embed"][torch.from_numpy(tokens).long()]
    found = again.quantize.lookup(torch.from_numpy(tokens.astype(np.int64)).view(3, 8, 8))
    assert torch.equal(found, wanted.view(3, 8, 8, 32).movedim(-1, 1))


def test_a_file_of_the_public_training_program_is_read_without_running_it(store: Store, tmp_path: Path) -> None:
    model = tiny("semseg")
    target = export(store, model, tmp_path / "public")
    values = json.loads((target / "config.json").read_text())
    arguments = argparse.Namespace(
        domain="semseg_coco",
        quantizer_type="lucid",
        encoder_type=values["enc_type"],
        decoder_type=values["dec_type"],
        input_size_min=32,
        input_size_max=64,
        patch_size=8,
        patch_size_dec=None,
        codebook_size=32,
        latent_dim=32,
        post_mlp=True,
        quantizer_ema_decay=0.95,
        opt_betas=[0.9, 0.99],
    )
    torch.save({"model": model.state_dict(), "args": arguments, "epoch": 3}, tmp_path / "old.pth")
    made = import_image_tokenizer(store, "tokenizer_semseg", tmp_path / "old.pth", ORIGIN)
    config = load_image_tokenizer(store, made.path).config
    assert (config.input_px, config.patch_px, config.quantizer.ema_decay) == (64, 8, 0.95)
    x = batch("semseg")
    assert np.array_equal(load_image_tokenizer(store, made.path).tokenize(x), model.tokenize(x))


def test_a_file_that_asks_for_more_than_arrays_is_refused(store: Store, tmp_path: Path) -> None:
    torch.save({"model": {}, "args": Path("x")}, tmp_path / "evil.pth")
    with pytest.raises(UnsafeFileError, match="nothing in it was run"):
        import_image_tokenizer(store, "tokenizer_rgb", tmp_path / "evil.pth", ORIGIN)


def test_the_config_may_be_in_the_metadata_of_the_weights(store: Store, exported: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.safetensors"
    (exported / "model.safetensors").rename(alone)
    made = import_image_tokenizer(store, "tokenizer_semseg", alone, ORIGIN)
    x = batch("semseg")
    assert np.array_equal(load_image_tokenizer(store, made.path).tokenize(x), tiny("semseg").tokenize(x))
    save_file(load_file(alone), alone)
    with pytest.raises(PublicConfigError, match="has no config"):
        import_image_tokenizer(store, "tokenizer_semseg", alone, ORIGIN)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        import_image_tokenizer(store, "tokenizer_semseg", exported, ORIGIN)


KEYS = sorted(tiny("depth").state_dict())


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(KEYS), harm=st.sampled_from(["missing", "unknown", "shape", "nan"]))
def test_any_key_that_does_not_fit_is_refused_by_its_name(tmp_path: Path, key: str, harm: str) -> None:
    store = LocalStore(tmp_path / "harmed")
    target = tmp_path / "public"
    if not target.exists():
        export(store, tiny("depth"), target)
        save_file(load_file(target / "model.safetensors"), tmp_path / "whole.safetensors")
    state = load_file(tmp_path / "whole.safetensors")
    value = state[key]
    if harm in ("missing", "unknown"):
        del state[key]
    if harm == "unknown":
        state[f"{key}.more"] = value
    if harm == "shape":
        state[key] = torch.cat([value, value])
    if harm == "nan":
        state[key] = torch.full_like(value, torch.nan)
    save_file(state, target / "model.safetensors")
    with pytest.raises(ModelError) as error:
        import_image_tokenizer(store, "tokenizer_depth", target, ORIGIN)
    said = str(error.value)
    assert f"{key}.more: unknown" in said if harm == "unknown" else key in said


WRONG: dict[str, Any] = {
    "quant_type": "memcodes",
    "num_codebooks": 2,
    "norm_codes": False,
    "norm_latents": True,
    "undo_std": True,
    "post_mlp": False,
    "out_conv": True,
    "n_channels": 5,
    "n_labels": 150,
    "patch_proj": False,
    "enc_type": "MLP_enc",
    "dec_type": "uvit_b_p4_f16",
    "image_size_enc": 224,
    "image_size_dec": 224,
    "patch_size_dec": 8,
    "codebook_size": 65536,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "zero_terminal_snr": False,
    "image_size": "large",
}
ONLY_PLAIN, ONLY_DIFFUSION = {"out_conv", "patch_size_dec"}, {"beta_schedule", "prediction_type", "zero_terminal_snr"}


@given(names=st.sets(st.sampled_from(sorted(WRONG)), min_size=1), label=st.sampled_from(["rgb", "semseg"]))
def test_every_value_that_no_network_here_computes_is_named(names: set[str], label: Any) -> None:
    names -= ONLY_PLAIN if label == "rgb" else ONLY_DIFFUSION
    if "dec_type" in names:
        names -= ONLY_PLAIN | ONLY_DIFFUSION
    if "image_size" in names:
        names = {"image_size"}  # of a wrong type: nothing else is looked at
    if not names:
        return
    with pytest.raises(PublicConfigError) as error:
        from_public(RELEASED[label] | {name: WRONG[name] for name in names}, label, "config.json")
    assert all(name in str(error.value) for name in names) and "config.json" in str(error.value)


def test_what_a_config_leaves_out_is_the_public_default_and_not_ours() -> None:
    for name in ("post_mlp", "beta_schedule", "prediction_type"):
        values = {k: v for k, v in RELEASED["rgb"].items() if k != name}
        with pytest.raises(PublicConfigError, match=rf"{name} is .* \(the public default\), supported is"):
            from_public(values, "rgb", "here")
    unsaid = from_public({k: v for k, v in RELEASED["depth"].items() if k != "thresholding"}, "depth", "here")
    assert unsaid.model_dump()["decoder"]["clamp"] is True


@pytest.mark.parametrize("name", ["tokenizer_det", "rgb", "tokenizer_", "tokenizer_text"])
def test_only_image_tokenizers_have_their_names(name: str) -> None:
    with pytest.raises(ValueError, match=r"there are tokenizer_rgb, tokenizer_depth"):
        label_of_name(name)


def test_an_export_does_not_mix_with_other_files(store: Store, tmp_path: Path) -> None:
    target = tmp_path / "full"
    target.mkdir()
    (target / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError, match=r"holds mine\.txt"):
        export(store, tiny("clip"), target)
    assert export(store, tiny("clip"), tmp_path / "twice") == export(store, tiny("clip"), tmp_path / "twice")


def test_a_vocabulary_of_another_layout_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SequenceError, match=r"not a tokenizer\.json"):
        import_text_tokenizer(store, tmp_path / "other.json", ORIGIN)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
