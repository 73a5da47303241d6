"""`labels/*` as Dagster runs them: checks, figures and pictures on the page, and one more label by one more setting."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pytest

from fourmill.assets.labels import DRIFT, _figures, _how_it_went, label_assets
from fourmill.assets.workshop import Workshop
from fourmill.core.ledger import ledger_path, write_ledger
from fourmill.core.names import SPLITS, Layout, sample_key
from fourmill.core.scene import render, sample_scene
from fourmill.core.shards import Item, Recipe, ShardPlace, write_shard
from fourmill.core.store import Store
from fourmill.pipelines.definitions import build_definitions
from fourmill.pipelines.profiles import smallest
from fourmill.pseudolabel.canny import CannyConfig
from fourmill.pseudolabel.checks import CheckReport
from fourmill.pseudolabel.config import DptConfig, Mask2FormerConfig
from fourmill.pseudolabel.members import own_labellers
from fourmill.pseudolabel.statistics import Statistics
from fourmill.runtime import stages
from fourmill.runtime.project import Project
from fourmill.runtime.ray_session import RayConfig, StageShare
from fourmill.runtime.session import Session
from fourmill.runtime.stages import label_stage

pytestmark = pytest.mark.filterwarnings("ignore::dagster.BetaWarning")  # backfill_policy, as `build_definitions` does

LAYOUT = Layout(rows_per_shard=110, shards_per_block=1, num_blocks=2)
Images = Callable[[int], bytes]
Materialize = Callable[[str, str], dg.ExecuteInProcessResult]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    base = smallest(tmp_path)
    return base.model_copy(update={"layout": LAYOUT, "labellers": {**base.labellers, "canny": CannyConfig()}})


@pytest.fixture
def images(store: Store, project: Project) -> Callable[[str, Images], None]:
    """Writes the images of a block, by row, and publishes their ledger; every tenth row is held out."""

    def write(block: str, image: Images) -> None:
        shards = LAYOUT.shards_of(block)
        for shard in shards:
            for split in SPLITS:
                rows = [row for row in LAYOUT.rows_of(shard) if (row % 10 == 0) == (split == "val")]
                items = [Item(sample_key(row), ext="jpg", data=image(row)) for row in rows]
                place = ShardPlace(project.dataset, split, "images", shard)
                write_shard(store, place, Recipe(stage="images", code_version="1"), items, "run")
        write_ledger(store, project.dataset, "images", block, shards, "images", len(shards))

    return write


@pytest.fixture
def materialize(project: Project, shards_here) -> Iterator[Materialize]:
    instance = dg.DagsterInstance.ephemeral()

    def run(label: str, block: str) -> dg.ExecuteInProcessResult:
        assets = label_assets(project, dg.StaticPartitionsDefinition(LAYOUT.block_keys()))
        return dg.materialize(
            assets,
            selection=[dg.AssetKey(["labels", label])],
            partition_key=block,
            resources={"workshop": Workshop(project)},
            instance=instance,
            raise_on_error=False,
        )

    yield run
    instance.dispose()


def checks(result: dg.ExecuteInProcessResult) -> dict[str, dg.AssetCheckEvaluation]:
    return {one.check_name: one for one in result.get_asset_check_evaluations()}


def metadata(result: dg.ExecuteInProcessResult) -> dict[str, dg.MetadataValue]:
    (event,) = result.get_asset_materialization_events()
    return dict(event.materialization.metadata)


def rows(value: dg.MetadataValue) -> list[dict[str, Any]]:
    assert isinstance(value, dg.TableMetadataValue)
    return [dict(record.data) for record in value.records]


def test_a_block_shows_its_figures_and_pictures(images, materialize: Materialize, jpeg) -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(8)]
    drawn = [jpeg(render(scene, 32).rgb_HWC, scene.model_dump_json()) for scene in scenes]
    images("block_00", lambda row: drawn[row % 8] if row else b"no image")
    for label, figure in (("depth", "clamped share"), ("semseg", "share of pixels"), ("det", "boxes by class")):
        result = materialize(label, "block_00")
        assert result.success and all(check.passed for check in checks(result).values())
        shown = metadata(result)
        assert figure in shown and "images" in shown
        assert shown["labeller"].value == "scene"
        (reason,) = rows(shown["rejected"])
        assert "not a readable image" in reason["reason"] and reason["rejected"] == 1
        for picture in ("preview", "contact_sheet"):
            assert "data:image/jpeg;base64," in str(shown[picture].value)
    classes = rows(metadata(materialize("semseg", "block_00"))["share of pixels"])
    assert {"sky-other-merged", "floor-other-merged"} <= {row["class"] for row in classes}


def test_a_histogram_shows_every_class() -> None:
    shares = {f"class {i}": 1 / 133 for i in range(133)}
    shown = _figures(CheckReport({}, Statistics(), {"share of pixels": shares}))
    assert len(rows(shown["share of pixels"])) == 133


def test_the_page_says_how_to_have_rays_dashboard(tmp_path: Path) -> None:
    base = smallest(tmp_path)
    assert _how_it_went(Session(base)) == {}  # nothing was made
    shown = _how_it_went(Session(base, measured={"images_per_second": 2.0}))
    assert shown["images_per_second"] == 2.0 and "ray.dashboard: true" in shown["ray_dashboard"]
    there = base.model_copy(update={"ray": RayConfig(dashboard_url="http://there")})
    assert _how_it_went(Session(there, measured={"images_per_second": 2.0}))["ray_dashboard"].value == "http://there"


def test_a_block_unlike_the_one_before_is_a_warning(images, materialize: Materialize, jpeg, photo) -> None:
    photos = [jpeg(photo(40, 48, seed)) for seed in range(10)]
    images("block_00", lambda row: photos[row % 10])
    images("block_01", lambda row: photos[row % 10])
    first = checks(materialize("canny", "block_00"))[DRIFT]
    assert first.passed and first.metadata["compared_with"].value == "no published block"
    second = checks(materialize("canny", "block_01"))[DRIFT]
    assert second.passed and second.metadata["compared_with"].value == "block_00"
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    images("block_01", lambda row: jpeg(noise + row))
    result = materialize("canny", "block_01")
    warned = checks(result)[DRIFT]
    assert result.success and not warned.passed and warned.severity == dg.AssetCheckSeverity.WARN
    (drifted,) = rows(warned.metadata["drifted"])
    assert drifted["figure"] == "edges" and drifted["block"] > drifted["published"]


def test_a_block_with_wrong_values_is_not_passed_on(
    images, materialize: Materialize, jpeg, photo, store: Store, project: Project
) -> None:
    image = jpeg(photo(20, 20))
    images("block_00", lambda row: image)
    assert materialize("canny", "block_00").success
    place = ShardPlace(project.dataset, "train", "canny", 0)
    tar = Path(store.root) / place.tar
    tar.write_bytes(tar.read_bytes()[:-512])
    result = materialize("canny", "block_00")
    assert not result.success
    failed = checks(result)["labels_match_images"]
    assert not failed.passed and "does not have the digest its receipt names" in str(failed.metadata["problems"].value)
    assert not store.exists(ledger_path(project.dataset, "train", "canny", "block_00"))


def test_depth_and_normals_of_one_run_are_decoded_once(
    images, project: Project, jpeg, photo, shards_here, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def counted(factory, arguments, jobs, config, progress, pace, together):
        made.extend(f"{job.recipe.stage} {job.split}" for job in jobs)
        receipts = shards_here(factory, arguments, jobs, config, progress, pace, together)
        for receipt in receipts:
            pace.note(receipt, {"network": 0.5})
        return receipts

    monkeypatch.setattr(stages, "run_shards", counted)
    image = jpeg(photo(32, 32))
    images("block_00", lambda row: image)
    seeded = {label: DptConfig(weights="seeded:0", longer_px=32) for label in ("depth", "normal")}
    project = project.model_copy(update={"labellers": {**project.labellers, **seeded}})
    assets = label_assets(project, dg.StaticPartitionsDefinition(LAYOUT.block_keys()))
    keys = [dg.AssetKey(["labels", label]) for label in seeded]
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize(
            assets,
            selection=keys,
            partition_key="block_00",
            resources={"workshop": Workshop(project)},
            instance=instance,
        )
    assert result.success and made == ["labels/depth train", "labels/depth val"]
    shown = [dict(event.materialization.metadata) for event in result.get_asset_materialization_events()]
    assert all(one["labelled"].value == 110 and one["shards_made"].value == 2 for one in shown)
    depth, normal = shown
    assert depth["also_made"].value == "labels/normal" and normal["made_with"].value == "labels/depth"
    for name in ("images_per_second", "network_share", "ray_dashboard"):
        assert depth[name] == normal[name]
    assert "also_made" not in normal and "made_with" not in depth


def test_labels_on_unlike_shares_of_a_machine_are_made_each_by_itself(project: Project) -> None:
    seeded = {label: DptConfig(weights="seeded:0", longer_px=32) for label in ("depth", "normal")}
    labellers = {**project.labellers, **seeded}

    def together(**shares: StageShare) -> int:
        ray = RayConfig(stages={f"labels/{label}": share for label, share in shares.items()})
        session = Session(project.model_copy(update={"ray": ray, "labellers": labellers}))
        return len(label_stage(session, "depth", ["depth", "normal"]).also)

    one, other = StageShare(gpus_per_worker=0.25), StageShare(gpus_per_worker=0.5)
    assert together(depth=one, normal=one) == together() == together(semseg=one) == 1
    assert together(depth=one) == together(depth=one, normal=other) == 0


def test_weights_that_a_later_label_lacks_stop_the_run_before_the_first_one(
    images, project: Project, store: Store, jpeg, photo
) -> None:
    images("block_00", lambda row: jpeg(photo(40, 48, row)))
    lacking = {**project.labellers, "semseg": Mask2FormerConfig(weights="stored:semseg/" + "0" * 64)}
    mended = project.model_copy(update={"labellers": lacking})
    result = dg.materialize(
        label_assets(mended, dg.StaticPartitionsDefinition(LAYOUT.block_keys())),
        selection=[dg.AssetKey(["labels", label]) for label in ("canny", "semseg")],
        partition_key="block_00",
        resources={"workshop": Workshop(mended)},
        raise_on_error=False,
    )
    assert not result.success
    failed = [event for event in result.all_events if event.is_step_failure]
    assert all("fourmill weights add semseg" in str(event.step_failure_data.error) for event in failed) and failed
    assert not store.list(f"{project.dataset}/train/canny")


def test_a_label_beside_4ms_own_is_one_setting(tmp_path: Path) -> None:
    base = smallest(tmp_path)
    more = base.model_copy(update={"labellers": {**base.labellers, **own_labellers(["canny"])}})
    graphs = [
        {spec.key.to_user_string(): spec for spec in build_definitions(each).resolve_all_asset_specs()}
        for each in (base, more)
    ]
    assert set(graphs[1]) - set(graphs[0]) == {"labels/canny"}
    assert all(graphs[0][name] == graphs[1][name] for name in graphs[0])
    assert "Edges" in (graphs[1]["labels/canny"].description or "")
    assert Project.model_validate_json(more.model_dump_json()) == more
    job = build_definitions(more).resolve_job_def("label_block")
    assert dg.AssetKey(["labels", "canny"]) in job.asset_layer.executable_asset_keys
    with pytest.raises(ValueError, match="no label 'cany' beside 4M's own; there are canny"):
        own_labellers(["cany"])


def test_a_project_names_labels_that_there_are_and_all_that_4m_needs(tmp_path: Path) -> None:
    base = smallest(tmp_path)
    known = base.model_dump(mode="json")
    with pytest.raises(ValueError, match="no stored label 'edges'"):
        Project.model_validate({**known, "labellers": {**known["labellers"], "edges": {"kind": "canny"}}})
    with pytest.raises(ValueError, match="labellers has none for depth"):
        Project.model_validate({**known, "labellers": {k: v for k, v in known["labellers"].items() if k != "depth"}})
