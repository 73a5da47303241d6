"""`cc12m/images` as Dagster runs it: checks and whom they stop, metadata, the retry of a run's config."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import dagster as dg
import pytest

from fourmill.assets import result as asset_result
from fourmill.assets.ingest import ingest_assets
from fourmill.assets.labels import label_assets, label_key
from fourmill.assets.workshop import Workshop
from fourmill.core.ledger import ledger_path
from fourmill.core.names import SPLITS, Layout
from fourmill.core.store import LocalStore
from fourmill.pipelines.profiles import smallest
from fourmill.pseudolabel.canny import CannyConfig
from fourmill.runtime.session import Session
from fourmill.runtime.stages import BlockStage

pytestmark = pytest.mark.filterwarnings("ignore::dagster.BetaWarning")  # backfill_policy, as `build_definitions` does

LAYOUT = Layout(rows_per_shard=6, shards_per_block=1, num_blocks=2)
# Every shard has a picture here, and the preview shows those of every second one.
MANY_SHARDS = Layout(rows_per_shard=1, shards_per_block=48, num_blocks=1)
INDEX, IMAGES, EDGES = dg.AssetKey(["cc12m", "source_index"]), dg.AssetKey(["cc12m", "images"]), label_key("canny")
Materialize = Callable[..., dg.ExecuteInProcessResult]


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


@pytest.fixture
def materialize(materialize_on_ray: Materialize, shards_here) -> Materialize:
    """As `materialize_on_ray`, in this process."""
    return materialize_on_ray


@pytest.fixture
def materialize_on_ray(tmp_path: Path, site, quick_config, instance: dg.DagsterInstance) -> Materialize:
    """`materialize_on_ray(lines, block)` runs `cc12m/images` of a block over a list, or the assets that are named."""

    def run(
        lines: list[str],
        block: str,
        retry_failed: bool = False,
        assets: Sequence[dg.AssetKey] = (IMAGES,),
        layout: Layout = LAYOUT,
    ) -> dg.ExecuteInProcessResult:
        (tmp_path / "list.tsv").write_text("".join(f"{line}\n" for line in lines))
        base = smallest(tmp_path)
        source = base.source.model_copy(update={"list": str(tmp_path / "list.tsv")})
        changes = {"layout": layout, "source": source, "ingest": quick_config(retries=0)}
        project = base.model_copy(update={**changes, "labellers": {**base.labellers, "canny": CannyConfig()}})
        blocks = dg.StaticPartitionsDefinition(layout.block_keys())
        index, images = ingest_assets(project, blocks)
        resources = {"workshop": Workshop(project, site.connect_to)}
        listed = dg.materialize([index], resources=resources, instance=instance)
        if index.key in assets:
            return listed
        config = {"ops": {"cc12m__images": {"config": {"retry_failed": True}}}} if retry_failed else None
        return dg.materialize(
            [index, images, *label_assets(project, blocks)], selection=list(assets), partition_key=block,
            resources=resources, instance=instance, run_config=config, raise_on_error=False,
        )  # fmt: skip

    return run


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """Where `materialize` writes."""
    return LocalStore(smallest(tmp_path).store)


@pytest.fixture
def lose_after_the_stage(monkeypatch: pytest.MonkeyPatch, store: LocalStore) -> Callable[[str], None]:
    """From now on the file at a path goes when a block's shards are all made, before its checks look."""
    run_block = asset_result.run_block

    def lose(path: str) -> None:
        def run_and_lose(session: Session, stage: BlockStage, block: str) -> int:
            made = run_block(session, stage, block)
            assert store.exists(path)
            store.delete(path)
            return made

        monkeypatch.setattr(asset_result, "run_block", run_and_lose)

    return lose


def published(store: LocalStore, folder: str, block: str = "block_00") -> list[str]:
    """Splits in which a block has a ledger."""
    return [split for split in SPLITS if store.exists(ledger_path("cc12m", split, folder, block))]


def has_begun(result: dg.ExecuteInProcessResult, asset: dg.AssetKey) -> bool:
    steps = {event.step_key for event in result.all_events if event.event_type == dg.DagsterEventType.STEP_START}
    return asset.to_python_identifier() in steps


def refused(result: dg.ExecuteInProcessResult) -> bool:
    """Whether the only step of a run did not find the images it needs, and said what to do."""
    (failure,) = [event for event in result.all_events if event.event_type == dg.DagsterEventType.STEP_FAILURE]
    return "cc12m/images has no ledger for block_00" in str(failure.step_failure_data.error)


def verdicts(result: dg.ExecuteInProcessResult) -> dict[str, bool]:
    return {one.check_name: one.passed for one in result.get_asset_check_evaluations()}


def test_a_block_with_its_checks_and_tables(materialize, site, answer, jpeg) -> None:
    lines = [f"{site.put(f'/{row}', answer(jpeg(row % 5)))}\tc" for row in range(6)]
    result = materialize([*lines, *lines, "http://pictures.test/none\tc"][:12], "block_00")
    assert result.success and set(verdicts(result).values()) == {True}
    (event,) = result.get_asset_materialization_events()
    metadata = event.materialization.metadata
    hosts = metadata["hosts"].value.records  # pyright: ignore[reportAttributeAccessIssue]
    assert [dict(record.data) for record in hosts] == [{"host": "pictures.test", "rows": 6, "ok_percent": 100.0}]
    failures = metadata["failures"].value.records  # pyright: ignore[reportAttributeAccessIssue]
    assert failures[0].data["status"] == "duplicate" and failures[0].data["percent"] == 16.7
    assert "image/png" in str(metadata["contact_sheet"].value)


def test_the_hosts_that_a_list_names_most_are_a_table(materialize, site, answer, jpeg) -> None:
    lines = [*(f"{site.put(f'/{row}', answer(jpeg(row)))}\tc" for row in range(3)), "http://other.test/0\tc", "no tab"]
    (event,) = materialize(lines, "block_00", assets=[INDEX]).get_asset_materialization_events()
    domains = event.materialization.metadata["domains"].value.records  # pyright: ignore[reportAttributeAccessIssue]
    assert [dict(record.data) for record in domains] == [
        {"domain": "pictures.test", "rows": 3},
        {"domain": "other.test", "rows": 1},
    ]
    assert event.materialization.metadata["bad_rows"].value == 1


@pytest.mark.ray
def test_a_run_says_how_it_goes(
    materialize_on_ray, site, answer, jpeg, instance, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fourmill.assets.workshop._LOG_EVERY_S", 0.0)
    lines = [f"{site.put(f'/{row}', answer(jpeg(row)))}\tc" for row in range(5)]
    result = materialize_on_ray([*lines, "http://pictures.test/none\tc"], "block_00")
    assert result.success
    logged = [entry.user_message for entry in instance.all_logs(result.run_id)]
    said = [
        line.removeprefix("cc12m/images block_00: ") for line in logged if line.startswith("cc12m/images block_00: ")
    ]
    assert re.fullmatch(r"1 of 2 \S+ rows/s, .* workers?, .* left", said[-2])
    assert re.fullmatch(r"2 of 2 \S+ rows/s, 83.3 % ok, http_404 16.7 %, \d workers?", said[-1])


def test_downloads_of_several_runs_share_a_pool(tmp_path: Path) -> None:
    project = smallest(tmp_path)
    _, images = ingest_assets(project, dg.StaticPartitionsDefinition(project.layout.block_keys()))
    assert images.op.pool == "download"


def test_a_retry_fetches_what_may_pass_and_gives_a_new_version(materialize, site, answer, jpeg) -> None:
    lines = [f"{site.put(f'/{row}', answer(jpeg(row)))}\tc" for row in range(6)]
    site.put("/2", answer(status=503))
    versions = []
    for retry in (False, False, True, True):
        result = materialize(lines, "block_00", retry)
        assert result.success
        (event,) = result.get_asset_materialization_events()
        versions.append(event.materialization.tags["dagster/data_version"])
        site.put("/2", answer(jpeg(2)))
    assert versions[0] == versions[1] != versions[2] == versions[3]
    assert site.counts["/2"] == 2 and sum(site.counts.values()) == 7


def test_later_blocks_with_copies_are_named(materialize, site, answer, jpeg) -> None:
    lines = [f"{site.put(f'/{row}', answer(jpeg(row % 6)))}\tc" for row in range(12)]
    assert verdicts(materialize(lines, "block_01"))["no_copies_in_later_blocks"]
    result = materialize(lines, "block_00")
    assert result.success
    (found,) = [c for c in result.get_asset_check_evaluations() if c.check_name == "no_copies_in_later_blocks"]
    assert not found.passed and found.severity == dg.AssetCheckSeverity.WARN
    assert found.metadata["materialize_again"].value == "block_01" and found.metadata["copies"].value == 6
    asked = sum(site.counts.values())
    assert verdicts(materialize(lines, "block_01"))["no_copies_in_later_blocks"]
    assert verdicts(materialize(lines, "block_00"))["no_copies_in_later_blocks"]
    assert sum(site.counts.values()) == asked


def test_many_dead_links_are_a_warning(materialize, site, answer, jpeg) -> None:
    lines = [f"{site.put(f'/{row}', answer(jpeg(row)))}\tc" for row in range(2)]
    result = materialize([*lines, *(f"http://pictures.test/dead{row}\tc" for row in range(4))], "block_00")
    assert result.success
    assert [name for name, passed in verdicts(result).items() if not passed] == ["success_rate"]


@pytest.mark.parametrize("what", ["nothing arrives", "nothing can be decoded"])
def test_a_block_without_pictures_is_not_passed_on(materialize, site, answer, store: LocalStore, what: str) -> None:
    lines = [f"http://pictures.test/{row}\tc" for row in range(6)]
    if what == "nothing can be decoded":
        for row in range(6):
            site.put(f"/{row}", answer(b"<html>please log in"))
    result = materialize(lines, "block_00", assets=[IMAGES, EDGES])
    assert not verdicts(result)["decodable"] and not result.success
    assert has_begun(result, IMAGES) and not has_begun(result, EDGES)
    assert refused(materialize(lines, "block_00", assets=[EDGES]))
    assert published(store, "images") == published(store, "canny") == []


def test_a_block_that_went_bad_is_taken_back(materialize, site, answer, jpeg, store: LocalStore) -> None:
    lines = [f"{site.put(f'/{row}', answer(jpeg(row)))}\tc" for row in range(6)]
    good = materialize(lines, "block_00", assets=[IMAGES, EDGES])
    assert good.success and has_begun(good, EDGES)
    assert published(store, "images") == published(store, "canny") == list(SPLITS)
    gone = [f"http://pictures.test/gone{row}\tc" for row in range(6)]
    result = materialize(gone, "block_00")
    assert not verdicts(result)["decodable"] and not result.success
    assert refused(materialize(gone, "block_00", assets=[EDGES]))
    assert published(store, "images") == []


def test_a_block_that_lacks_a_tar_is_not_passed_on(
    materialize, site, answer, jpeg, store: LocalStore, lose_after_the_stage
) -> None:
    lines = [f"{site.put(f'/{row}', answer(jpeg(row)))}\tc" for row in range(48)]
    assert materialize(lines, "block_00", layout=MANY_SHARDS).success and published(store, "images") == list(SPLITS)
    (tar,) = [path for path in store.list("cc12m") if path.endswith("/images/shard-00001.tar")]
    lose_after_the_stage(tar)
    result = materialize(lines, "block_00", assets=[IMAGES, EDGES], layout=MANY_SHARDS)
    assert not verdicts(result)["all_shards_there"] and not result.success
    assert not has_begun(result, EDGES)
    assert refused(materialize(lines, "block_00", assets=[EDGES], layout=MANY_SHARDS))
    assert published(store, "images") == published(store, "canny") == []


@pytest.mark.parametrize("ending", ["json", "tar"])
def test_a_block_that_has_lost_a_shard_is_not_passed_on(
    materialize, site, answer, jpeg, store: LocalStore, lose_after_the_stage, ending: str
) -> None:
    lines = [f"{site.put(f'/{row}', answer(jpeg(row)))}\tc" for row in range(6)]
    lose_after_the_stage(f"cc12m/train/images/shard-00000.{ending}")
    result = materialize(lines, "block_00", assets=[IMAGES, EDGES])
    assert not result.success and has_begun(result, IMAGES) and not has_begun(result, EDGES)
    assert verdicts(result)["all_shards_there"] is False
    assert refused(materialize(lines, "block_00", assets=[EDGES]))
    assert published(store, "images") == published(store, "canny") == []


def test_a_block_that_cannot_be_read_any_more_is_withdrawn(
    materialize, site, answer, jpeg, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"{site.put(f'/{row}', answer(jpeg(row)))}\tc" for row in range(6)]
    assert materialize(lines, "block_00", assets=[IMAGES]).success and published(store, "images")

    def broken(*arguments: object) -> None:
        raise OSError("the disk does not answer")

    monkeypatch.setattr("fourmill.assets.ingest.preview.survey_block", broken)
    assert not materialize(lines, "block_00", assets=[IMAGES]).success
    assert published(store, "images") == []


def test_a_block_with_a_shard_that_cannot_be_made_is_not_passed_on(
    materialize, site, answer, jpeg, store: LocalStore
) -> None:
    lines = [f"{site.put(f'/{row}', answer(jpeg(row)))}\tc" for row in range(6)]
    (Path(store.root) / "cc12m/val/images/shard-00000.tar").mkdir(parents=True)  # in the tar's way
    result = materialize(lines, "block_00", assets=[IMAGES, EDGES])
    assert not result.success and has_begun(result, IMAGES) and not has_begun(result, EDGES)
    assert store.exists("cc12m/train/images/shard-00000.json")
    assert refused(materialize(lines, "block_00", assets=[EDGES]))
    assert published(store, "images") == published(store, "canny") == []


def test_a_block_past_the_end_of_the_list_passes(materialize, site, answer, jpeg) -> None:
    result = materialize([f"{site.put('/0', answer(jpeg(0)))}\tc"], "block_01")
    assert result.success and set(verdicts(result).values()) == {True}
