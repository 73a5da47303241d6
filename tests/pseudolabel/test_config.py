import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from fourmill.pseudolabel.choices import demo_labellers, labellers_from, paper_labellers, seeded_labellers
from fourmill.pseudolabel.config import (
    ClipConfig,
    DetectorConfig,
    DptConfig,
    LabellerConfig,
    SceneConfig,
    VitDetConfig,
    WeightsMissingError,
    config_digest,
    feature_dim,
    require_weights,
    weights_digest,
)

ADAPTER: TypeAdapter[LabellerConfig] = TypeAdapter(LabellerConfig)


@pytest.mark.parametrize(
    "labellers",
    [demo_labellers(), seeded_labellers(3), paper_labellers(Path("/weights")), paper_labellers(precision="bf16")],
)
def test_every_set_covers_all_labels_and_comes_back_from_json(labellers: dict[str, LabellerConfig]) -> None:
    assert sorted(labellers) == ["clip", "depth", "det", "normal", "semseg"]
    for config in labellers.values():
        assert ADAPTER.validate_json(ADAPTER.dump_json(config)) == config


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


def test_labellers_are_chosen_by_name_or_folder(tmp_path: Path) -> None:
    assert labellers_from("scene") == demo_labellers()
    assert labellers_from("seeded") == seeded_labellers(0)
    assert labellers_from("seeded:7") == seeded_labellers(7)
    with pytest.raises(ValueError, match="seeded:N"):
        labellers_from("seeded:many")
    for label in ("depth", "normal", "semseg", "clip"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "config.json").write_text('{"patch_size": 16, "projection_dim": 512}')
    with pytest.raises(WeightsMissingError, match="det labeller"):
        labellers_from(str(tmp_path))
    (tmp_path / "det").mkdir()
    (tmp_path / "det" / "config.json").write_text('{"model_type": "vitdet"}')
    assert isinstance(labellers_from(str(tmp_path))["det"], VitDetConfig)
    (tmp_path / "det" / "config.json").write_text("{}")
    assert isinstance(labellers_from(str(tmp_path))["det"], DetectorConfig)
    chosen = labellers_from(str(tmp_path), grid=8)
    assert chosen["clip"] == ClipConfig(weights=str(tmp_path / "clip"), input_px=128, patch_px=16, channels=512)
    assert feature_dim(chosen["clip"]) == 512


def test_only_clip_has_features() -> None:
    assert feature_dim(demo_labellers()["clip"]) == 64
    with pytest.raises(ValueError, match="scene labeller"):
        feature_dim(SceneConfig())
