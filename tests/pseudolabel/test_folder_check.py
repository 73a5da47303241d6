"""A weights folder that would make transformers run or fetch something is refused by name, when it is added and when it is loaded."""

import json
import re
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest

from fourmill.core.safe_load import UnsafeFileError
from fourmill.core.store import Store
from fourmill.pseudolabel.choices import seeded_labellers
from fourmill.pseudolabel.config import ClipConfig, DptConfig
from fourmill.pseudolabel.convert import add_weights
from fourmill.pseudolabel.folder_check import check_folder
from fourmill.pseudolabel.make import make_features, make_labeller
from fourmill.pseudolabel.stored import WeightsMissingError

pytestmark = pytest.mark.usefixtures("one_thread")
KERNEL = "somebody/attention"


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    made: Any = make_features(seeded_labellers(0)["clip"])
    made._network.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(clip_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "net"
    folder.mkdir()
    for path in clip_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*given: Any, **named: Any) -> NoReturn:
        raise AssertionError("something was to be fetched")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, connect)
    monkeypatch.setattr(socket.socket, "connect", connect)


def change(folder: Path, entries: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def load(folder: Path) -> None:
    facts = json.loads((folder / "config.json").read_text())
    config = ClipConfig(weights=str(folder), patch_px=facts["patch_size"], channels=facts["projection_dim"])
    make_features(config)


NESTED: list[tuple[dict[str, Any], str]] = [
    ({"attn_implementation": KERNEL}, "attn_implementation is 'somebody/attention', expected eager or sdpa or flex"),
    ({"_attn_implementation": f"{KERNEL}@v1:run"}, "_attn_implementation is 'somebody/attention@v1:run'"),
    ({"_attn_implementation_internal": KERNEL}, "_attn_implementation_internal is"),
    ({"attn_implementation": {"": "sdpa", "text_config": KERNEL}}, "attn_implementation is 'somebody/attention'"),
    ({"attn_implementation": "flash_attention_2"}, "attn_implementation is 'flash_attention_2'"),
    ({"experts_implementation": "sonicmoe"}, "experts_implementation is 'sonicmoe', expected eager or batched_mm"),
    ({"attribute_map": {"a": "_attn_implementation"}, "a": KERNEL}, "any of them could hide: attribute_map"),
    ({"auto_map": {"AutoBackbone": "somebody/net--code.Net"}}, "a program of its own: auto_map"),
    ({"use_kernels": True}, "programs from a hub: use_kernels"),
    ({"quantization_config": {"quant_method": "fp8"}}, "loaders fetch programs: quantization_config"),
    ({"use_pretrained_backbone": True}, r"not the folder's \(false is enough.*: use_pretrained_backbone"),
    ({"transformers_weights": "../other.safetensors"}, "files that are not the folder's: transformers_weights"),
    ({"configuration_files": ["config.5.0.0.json"]}, "files that are not the folder's: configuration_files"),
    ({"backbone": "somebody/backbone"}, "a backbone to fetch: backbone is 'somebody/backbone'"),
]
"""What is refused at any depth of config.json, and how it is named."""


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(("entries", "named"), NESTED)
@pytest.mark.parametrize("is_added", [True, False], ids=["added", "loaded"])
def test_what_would_be_run_or_fetched_is_refused_by_name(
    is_added: bool, entries: dict[str, Any], named: str, copied: Path, store: Store
) -> None:
    change(copied, entries)
    with pytest.raises(
        UnsafeFileError, match=rf"clip labeller: {re.escape(str(copied))} is refused.*config\.json.*{named}"
    ):
        add_weights(store, "clip", copied, "here") if is_added else load(copied)
    assert store.list("weights") == []


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(("entries", "named"), NESTED)
def test_it_is_refused_in_the_config_of_a_part_too(
    entries: dict[str, Any], named: str, tmp_path: Path, store: Store
) -> None:
    seeded: Any = make_labeller("depth", seeded_labellers(0)["depth"])
    facts = seeded._network.config.to_dict()
    facts["backbone_config"] |= entries
    (tmp_path / "config.json").write_text(json.dumps(facts, default=str))
    (tmp_path / "model.safetensors").touch()
    named = named.replace(": ", r": backbone_config\.", 1) if ": " in named else rf"backbone_config\.{named}"
    with pytest.raises(UnsafeFileError, match=rf"depth labeller: .*{named}"):
        make_labeller("depth", DptConfig(weights=str(tmp_path)))
    with pytest.raises(UnsafeFileError, match=rf"depth labeller: .*{named}"):
        add_weights(store, "depth", tmp_path, "here")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("has_config", [True, False])
def test_an_adapter_beside_the_weights_is_refused(has_config: bool, copied: Path, store: Store) -> None:
    """With peft installed it would be merged; without a config.json the network that it names would be fetched."""
    (copied / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/net"}')
    if not has_config:
        (copied / "config.json").unlink()
    with pytest.raises(UnsafeFileError, match=r"it holds an adapter \(adapter_config\.json\)"):
        add_weights(store, "clip", copied, "here")
    with pytest.raises(UnsafeFileError, match=r"it holds an adapter \(adapter_config\.json\)"):
        check_folder("clip", copied)


@pytest.mark.parametrize("name", ["../other.safetensors", ".hidden.safetensors", "part/one.safetensors"])
def test_parts_that_the_folders_digest_does_not_cover_are_refused(name: str, copied: Path, store: Store) -> None:
    (copied / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"visual_projection.weight": name}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    (copied / name).parent.mkdir(exist_ok=True)
    (copied / name).touch()
    with pytest.raises(UnsafeFileError, match=rf"its model\.safetensors\.index\.json names '{re.escape(name)}'"):
        load(copied)
    with pytest.raises(UnsafeFileError, match=rf"its model\.safetensors\.index\.json names '{re.escape(name)}'"):
        add_weights(store, "clip", copied, "here")


@pytest.mark.parametrize("left", [0, 5, 200])
def test_weights_cut_off_are_told_with_their_folder(left: int, copied: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:left])
    with pytest.raises(WeightsMissingError, match=rf"clip labeller: {re.escape(str(copied))} does not load"):
        load(copied)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "entries",
    [
        {"attn_implementation": "eager"},
        {"_attn_implementation": "sdpa"},
        {"attn_implementation": {"": "sdpa"}},
        {"attn_implementation": None, "experts_implementation": "eager"},
        {"auto_map": None, "quantization_config": None, "use_kernels": False, "backbone": None},
        {"_name_or_path": "openai/clip-vit-base-patch16", "use_pretrained_backbone": False},
    ],
)
def test_ordinary_entries_are_not(entries: dict[str, Any], copied: Path) -> None:
    change(copied, entries)
    load(copied)


@pytest.mark.parametrize(
    ("facts", "is_safe"),
    [
        ({"model_type": "detr", "backbone": "resnet50", "use_timm_backbone": True}, True),
        ({"model_type": "detr", "backbone_config": {"model_type": "timm_backbone", "backbone": "resnet50"}}, True),
        ({"model_type": "d_fine", "backbone": None, "backbone_config": {"model_type": "hgnet_v2"}}, True),
        ({"model_type": "detr", "backbone": "hf-hub:somebody/net"}, False),
        ({"model_type": "detr", "backbone": "local-dir:net"}, False),
        ({"model_type": "detr", "backbone": "resnet50", "use_timm_backbone": False}, False),
        ({"model_type": "detr", "backbone": "resnet50", "backbone_kwargs": {"trust_remote_code": True}}, False),
        ({"model_type": "mask2former", "backbone": "resnet50"}, False),
    ],
)
def test_a_backbone_may_be_named_where_timm_makes_it_without_asking(
    facts: dict[str, Any], is_safe: bool, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(facts))
    if is_safe:
        check_folder("det", tmp_path)
        return
    with pytest.raises(UnsafeFileError, match="a backbone to fetch: backbone is"):
        check_folder("det", tmp_path)


def test_weights_that_are_no_folder_are_not_taken_for_a_repository_in_the_hubs_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    class Network:
        @staticmethod
        def from_pretrained(folder: Path, **settings: Any) -> NoReturn:
            asked.append(str(folder))
            raise OSError("nothing there")

    from fourmill.pseudolabel.network import from_folder

    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsMissingError, match="clip labeller: somebody/net does not load as Network"):
        from_folder("clip", Path("somebody/net"), Network)
    assert asked == [str(tmp_path / "somebody" / "net")]
