import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import TypeAdapter, ValidationError

from fourmill.pseudolabel.choices import demo_labellers, labellers_from, paper_labellers, seeded_labellers
from fourmill.pseudolabel.config import (
    DETECTORS,
    ClipConfig,
    DetectorConfig,
    DptConfig,
    LabellerConfig,
    SceneConfig,
    VitDetConfig,
    config_digest,
    feature_dim,
    weights_digest,
)
from fourmill.pseudolabel.named_weights import require_weights
from fourmill.pseudolabel.stored import WeightsMissingError

ADAPTER: TypeAdapter[LabellerConfig] = TypeAdapter(LabellerConfig)


@pytest.mark.parametrize(
    "labellers",
    [demo_labellers(), seeded_labellers(3), paper_labellers(Path("/weights")), paper_labellers(precision="bf16")],
)
def test_every_set_covers_all_labels_and_comes_back_from_json(labellers: dict[str, LabellerConfig]) -> None:
    assert sorted(labellers) == ["clip", "depth", "det", "normal", "semseg"]
    for config in labellers.values():
        assert ADAPTER.validate_json(ADAPTER.dump_json(config)) == config


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_papers_set_has_the_papers_sizes_colours_and_threshold(precision: Literal["fp32", "bf16"]) -> None:
    """Sides of multiples of 32 below 768; 800 and 1333 pixels as Mask2Former's own test; boxes with a score of 0.6 or more."""
    imagenet = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    expected: dict[str, dict[str, Any]] = {
        "depth": {"kind": "dpt", "longer_px": 736},
        "normal": {"kind": "dpt", "longer_px": 736},
        "semseg": {"kind": "mask2former", "shorter_px": 800, "longer_px": 1333, **imagenet},
        "det": {"kind": "vitdet", "score_threshold": 0.6},
        "clip": {"kind": "clip", "input_px": None, "patch_px": 16, "channels": 512, **imagenet},
    }
    found = {label: config.model_dump() for label, config in paper_labellers(precision=precision).items()}
    assert {label: {key: found[label][key] for key in expected[label]} for label in found} == expected


def test_the_config_and_its_digests_need_no_torch() -> None:
    code = (
        "import sys; from fourmill.pseudolabel import choices, config; "
        "[config.weights_digest(c) for s in (choices.demo_labellers(), choices.paper_labellers()) for c in s.values()]; "
        "assert not {'torch', 'transformers', 'dagster', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_key_and_an_unknown_kind_are_refused() -> None:
    with pytest.raises(ValidationError, match="extra"):
        ADAPTER.validate_python({"kind": "dpt", "weights": "seeded:0", "threshold": 1})
    with pytest.raises(ValidationError, match="kind"):
        ADAPTER.validate_python({"kind": "sam", "weights": "seeded:0"})


def test_seeded_weights_differ_by_seed_and_kind_only_of_what_matters() -> None:
    one = weights_digest(DptConfig(weights="seeded:1"))
    assert one != weights_digest(DptConfig(weights="seeded:2"))
    assert one != weights_digest(DetectorConfig(weights="seeded:1"))
    assert one == weights_digest(DptConfig(weights="seeded:1", batch_size=3))


def test_the_config_digest_leaves_out_where_weights_lie_and_how_many_images_go_at_once() -> None:
    config = DptConfig(weights="/a")
    assert config_digest(config) == config_digest(DptConfig(weights="/b", batch_size=1))
    assert config_digest(config) != config_digest(DptConfig(weights="/a", longer_px=256))


def test_a_folders_digest_follows_the_bytes_and_names_of_its_files_not_its_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"12345678")
    a, b = (DptConfig(weights=str(tmp_path / name)) for name in ("a", "b"))
    before = weights_digest(a)
    assert before == weights_digest(b)
    (tmp_path / "b" / "model.safetensors").write_bytes(b"123456789")
    assert weights_digest(b) != before
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "a" / "other.safetensors")
    assert weights_digest(a) != before


def test_missing_weights_have_a_digest_but_stop_the_work_with_the_next_step(tmp_path: Path) -> None:
    config = paper_labellers(tmp_path)["depth"]
    assert len(weights_digest(config)) == 64
    with pytest.raises(WeightsMissingError, match=rf"depth labeller: nothing at {tmp_path}/depth.*--labellers seeded"):
        require_weights("depth", config)


def test_only_the_card_of_a_folder_is_not_part_of_its_digest(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    before = weights_digest(DptConfig(weights=str(tmp_path)))
    (tmp_path / "card.md").write_text("where it is from")
    assert weights_digest(DptConfig(weights=str(tmp_path))) == before
    (tmp_path / "config.json").write_text("{}")
    assert weights_digest(DptConfig(weights=str(tmp_path))) != before


def test_how_a_network_is_run_is_part_of_what_its_labels_depend_on() -> None:
    before = DptConfig(weights="/a")
    for change in ({"precision": "bf16"}, {"channels_last": True}, {"compile_backend": "inductor"}):
        assert config_digest(before.model_copy(update=change)) != config_digest(before)


def test_a_network_is_not_asked_for_another_networks_label() -> None:
    for label, config in (
        ("depth", DetectorConfig(weights="seeded:0")),
        ("clip", SceneConfig()),
        ("edges", SceneConfig()),
    ):
        with pytest.raises(ValueError, match=f"does not make {label}"):
            require_weights(label, config)


def weights_folder(folder: Path, model_type: str, *files: str, **facts: Any) -> Path:
    """A folder that looks like weights, by default in one file; nothing of it can be loaded."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **facts}))
    for name in files or ("model.safetensors",):
        (folder / name).write_text(json.dumps({"weight_map": {"a": "part-1.bin", "b": "part-2.bin"}}))
    return folder


@pytest.mark.parametrize(
    ("files", "is_enough"),
    [
        (["model.safetensors"], True),
        (["pytorch_model.bin"], True),
        (["model.safetensors.index.json", "part-1.bin", "part-2.bin"], True),
        (["pytorch_model.bin.index.json", "part-1.bin"], False),
        (["tf_model.h5", "preprocessor_config.json"], False),
    ],
)
def test_a_folder_without_all_of_its_weights_stops_the_work(files: list[str], is_enough: bool, tmp_path: Path) -> None:
    config = DptConfig(weights=str(weights_folder(tmp_path / "net", "dpt", *files)))
    if is_enough:
        require_weights("depth", config)
    else:
        with pytest.raises(
            WeightsMissingError, match=r"depth labeller: a folder without weights at .*weights add depth"
        ):
            require_weights("depth", config)


def test_a_folder_of_another_network_or_with_a_config_that_is_none_stops_the_work(tmp_path: Path) -> None:
    folder = weights_folder(tmp_path / "net", "dpt")
    for kind in (DetectorConfig, VitDetConfig):
        with pytest.raises(WeightsMissingError, match=r"det labeller: a network of model_type 'dpt' at .*expected"):
            require_weights("det", kind(weights=str(folder)))
    (folder / "config.json").write_text("{")
    with pytest.raises(WeightsMissingError, match=r"a folder without a readable config\.json at"):
        require_weights("depth", DptConfig(weights=str(folder)))


def test_every_detector_that_transformers_loads_is_known() -> None:
    """But those of documents, which have none of COCO's classes."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES as KNOWN

    assert {name for name in KNOWN if not name.startswith("pp_")} <= set(DETECTORS)


def test_labellers_are_chosen_by_name_or_folder(tmp_path: Path) -> None:
    assert labellers_from("scene") == demo_labellers()
    assert labellers_from("seeded") == seeded_labellers(0)
    assert labellers_from("seeded:7") == seeded_labellers(7)
    with pytest.raises(ValueError, match="seeded:N"):
        labellers_from("seeded:many")
    types = {"depth": "dpt", "normal": "dpt", "semseg": "mask2former", "clip": "clip_vision_model"}
    for label, model_type in types.items():
        weights_folder(tmp_path / label, model_type, patch_size=16, projection_dim=512)
    with pytest.raises(WeightsMissingError, match="det labeller"):
        labellers_from(str(tmp_path))
    weights_folder(tmp_path / "det", "vitdet")
    assert isinstance(labellers_from(str(tmp_path))["det"], VitDetConfig)
    weights_folder(tmp_path / "det", "d_fine")
    assert isinstance(labellers_from(str(tmp_path))["det"], DetectorConfig)
    chosen = labellers_from(str(tmp_path), grid=8)
    assert chosen["clip"] == ClipConfig(weights=str(tmp_path / "clip"), input_px=128, patch_px=16, channels=512)
    assert feature_dim(chosen["clip"]) == 512


@pytest.mark.parametrize(
    ("label", "said", "problem"),
    [
        ("det", "[]", r"det labeller: a folder without a readable config\.json at .*/det"),
        (
            "clip",
            '{"model_type": "clip", "vision_config": null}',
            r"clip labeller: config\.json of .*/clip gives patch_size None",
        ),
    ],
)
def test_a_config_that_is_no_object_is_said_of_its_folder(label: str, said: str, problem: str, tmp_path: Path) -> None:
    types = {"depth": "dpt", "normal": "dpt", "semseg": "mask2former", "det": "d_fine", "clip": "clip_vision_model"}
    for other, model_type in types.items():
        weights_folder(tmp_path / other, model_type, patch_size=16, projection_dim=512)
    (tmp_path / label / "config.json").write_text(said)
    with pytest.raises(WeightsMissingError, match=problem):
        labellers_from(str(tmp_path))


def test_only_clip_has_features() -> None:
    assert feature_dim(demo_labellers()["clip"]) == 64
    with pytest.raises(ValueError, match="scene labeller"):
        feature_dim(SceneConfig())
