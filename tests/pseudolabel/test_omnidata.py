"""Tiny seeded DPTs in the layouts of Omnidata's files: they load as what they were, and wrong keys are named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import Block

from fourmill.core.labels import Picture
from fourmill.core.safe_load import UnsafeFileError
from fourmill.core.store import Store
from fourmill.pseudolabel import dpt, omnidata
from fourmill.pseudolabel.config import DptConfig
from fourmill.pseudolabel.convert import add_weights
from fourmill.pseudolabel.labeller import Labelled, NetworkError
from fourmill.pseudolabel.make import make_labeller

pytestmark = pytest.mark.usefixtures("one_thread")
CHANNELS = {"depth": 1, "normal": 3}


@pytest.fixture(scope="module")
def networks() -> dict[str, Any]:
    """One seeded network a label."""
    made = {}
    for label, channels in CHANNELS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            made[label] = dpt._seeded(channels)
    return made


@pytest.fixture
def original(tmp_path: Path, networks: dict[str, Any]) -> Callable[..., Path]:
    """Write a network in an original layout; `change` may spoil its keys."""

    def write(label: str, suffix: str, change: Callable[[dict[str, Any]], None] = lambda state: None) -> Path:
        state: dict[str, Any] = {
            **omnidata.to_omnidata(networks[label]),
            "pretrained.model.head.weight": torch.zeros(1000, 4),
            "pretrained.model.head.bias": torch.zeros(1000),
        }
        change(state)
        path = tmp_path / f"omnidata_dpt_{label}_v2.{suffix}"
        if suffix == "ckpt":
            content: Any = {"state_dict": {f"model.{key}": value for key, value in state.items()}, "epoch": 7}
        else:
            content = state
        torch.save(content, path)
        return path

    return write


@pytest.mark.parametrize("label", ["depth", "normal"])
def test_lightnings_file_and_the_flat_one_give_the_network_they_were_made_from(
    label: str, original: Callable[..., Path], networks: dict[str, Any], store: Store, photo: Callable[..., np.ndarray]
) -> None:
    config = networks[label].config
    added = [add_weights(store, label, original(label, suffix), suffix, None, config) for suffix in ("ckpt", "pth")]
    assert added[0].digest == added[1].digest
    stored = DptConfig(weights=f"stored:{label}/{added[0].digest}", longer_px=96)
    labeller: Any = make_labeller(label, stored, store)
    assert labeller.weights_digest == added[0].digest
    before, after = networks[label].state_dict(), labeller._network.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key].cpu()) for key in before)
    for size in ((64, 64), (90, 40), (20, 200)):
        (found,) = labeller.label_pictures([Picture(photo(*size))])
        assert isinstance(found, Labelled) and np.asarray(found.label).shape[:2] == size


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("dpt.embeddings.position_embeddings", "pretrained.model.pos_embed"),
        (
            "dpt.embeddings.backbone.bit.encoder.stages.2.layers.8.norm3.bias",
            "pretrained.model.patch_embed.backbone.stages.2.blocks.8.norm3.bias",
        ),
        (
            "dpt.embeddings.backbone.bit.encoder.stages.0.layers.0.downsample.conv.weight",
            "pretrained.model.patch_embed.backbone.stages.0.blocks.0.downsample.conv.weight",
        ),
        ("dpt.encoder.layer.11.layernorm_after.weight", "pretrained.model.blocks.11.norm2.weight"),
        ("dpt.encoder.layer.3.attention.attention.value.bias", "pretrained.model.blocks.3.attn.qkv.bias"),
        ("dpt.encoder.layer.3.attention.output.dense.bias", "pretrained.model.blocks.3.attn.proj.bias"),
        ("dpt.encoder.layer.3.intermediate.dense.bias", "pretrained.model.blocks.3.mlp.fc1.bias"),
        ("dpt.encoder.layer.3.output.dense.bias", "pretrained.model.blocks.3.mlp.fc2.bias"),
        ("neck.reassemble_stage.readout_projects.2.0.weight", "pretrained.act_postprocess3.0.project.0.weight"),
        ("neck.reassemble_stage.layers.3.resize.weight", "pretrained.act_postprocess4.4.weight"),
        ("neck.convs.0.weight", "scratch.layer1_rn.weight"),
        ("neck.fusion_stage.layers.0.projection.bias", "scratch.refinenet4.out_conv.bias"),
        (
            "neck.fusion_stage.layers.3.residual_layer2.convolution1.weight",
            "scratch.refinenet1.resConfUnit2.conv1.weight",
        ),
        ("head.head.4.bias", "scratch.output_conv.4.bias"),
    ],
)
def test_keys_are_those_of_the_published_code(ours: str, theirs: str) -> None:
    assert omnidata.original_name(ours) == theirs


def test_a_fused_projection_is_queries_then_keys_then_values(networks: dict[str, Any]) -> None:
    state, network = omnidata.to_omnidata(networks["depth"]), networks["depth"].state_dict()
    thirds = state["pretrained.model.blocks.2.attn.qkv.weight"].chunk(3)
    for third, name in zip(thirds, ("query", "key", "value"), strict=True):
        assert torch.equal(third, network[f"dpt.encoder.layer.2.attention.attention.{name}.weight"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda s: s.pop("scratch.layer2_rn.weight"),
            r"scratch\.layer2_rn\.weight: missing, expected \(24, 24, 3, 3\)",
        ),
        (lambda s: s.update({"scratch.extra": torch.zeros(2)}), r"scratch\.extra: unknown"),
        (
            lambda s: s.update({"pretrained.model.blocks.0.attn.qkv.weight": torch.zeros(64, 32)}),
            r"pretrained\.model\.blocks\.0\.attn\.qkv\.weight: shape \(64, 32\), expected \(96, 32\)",
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["ckpt", "pth"])
def test_a_key_that_does_not_fit_is_named_as_the_file_names_it(
    suffix: str,
    spoil: Callable[[dict[str, Any]], None],
    message: str,
    original: Callable[..., Path],
    networks: dict[str, Any],
    store: Store,
) -> None:
    with pytest.raises(NetworkError, match=rf"omnidata_dpt_depth_v2\.{suffix} does not fit .*{message}"):
        add_weights(store, "depth", original("depth", suffix, spoil), "here", None, networks["depth"].config)
    assert store.list("weights") == []


def test_numbers_that_are_none_are_found_when_weights_are_added(
    original: Callable[..., Path], networks: dict[str, Any], store: Store
) -> None:
    def spoil(state: dict[str, Any]) -> None:
        state["scratch.layer2_rn.weight"] = state["scratch.layer2_rn.weight"].clone()
        state["scratch.layer2_rn.weight"][3, 2, 1, 0] = float("nan")

    with pytest.raises(NetworkError, match=r"v2\.pth holds NaN in neck\.convs\.1\.weight: "):
        add_weights(store, "depth", original("depth", "pth", spoil), "here", None, networks["depth"].config)
    assert store.list("weights") == []


def test_a_depth_file_is_not_taken_for_normals(
    original: Callable[..., Path], networks: dict[str, Any], store: Store
) -> None:
    with pytest.raises(NetworkError, match=r"scratch\.output_conv\.4\.bias: shape \(1,\), expected \(3,\)"):
        add_weights(store, "normal", original("depth", "pth"), "here", None, networks["normal"].config)


def test_a_checkpoint_that_runs_a_program_is_refused(
    original: Callable[..., Path], store: Store, tmp_path: Path
) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "it ran",))

    path = original("depth", "pth", lambda state: state.update({"scratch.evil": Evil()}))
    with pytest.raises(UnsafeFileError, match="nothing in it was run"):
        add_weights(store, "depth", path, "here")
    assert not (tmp_path / "it ran").exists()


def test_the_public_architecture_is_the_paper_codes() -> None:
    config = omnidata.omnidata_config()
    assert config.is_hybrid and config.layer_norm_eps == 1e-6
    assert (config.hidden_size, config.num_hidden_layers, config.backbone_out_indices) == (768, 12, [2, 5, 8, 11])
    assert config.backbone_config.depths == [3, 4, 9]


def test_the_public_network_bends_as_timms_blocks_that_its_weights_were_trained_in() -> None:
    """Exactly: GELU's approximations are 2e-4 and more away."""
    config = omnidata.omnidata_config()
    with torch.device("meta"):
        network: Any = dpt.model_class(1)(config)
        theirs: Any = Block(config.hidden_size, config.num_attention_heads).mlp.act
    x = torch.linspace(-6, 6, 101)
    for layer in network.dpt.encoder.layer:
        assert torch.allclose(layer.intermediate.intermediate_act_fn(x), theirs(x), atol=1e-6)
