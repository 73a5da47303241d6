"""`cc12m/images` as Dagster runs it: checks, metadata, the retry of a run's config."""

from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from fourmill.assets.ingest import ingest_assets
from fourmill.assets.workshop import Workshop
from fourmill.core.names import Layout
from fourmill.pipelines.profiles import smallest

pytestmark = pytest.mark.filterwarnings("ignore::dagster.BetaWarning")  # backfill_policy, as `build_definitions` does

LAYOUT = Layout(rows_per_shard=6, shards_per_block=1, num_blocks=2)
Materialize = Callable[..., dg.ExecuteInProcessResult]


@pytest.fixture
def materialize(tmp_path: Path, site, quick_config, shards_here):
    """`materialize(lines, block, retry_failed=False)` runs the assets of a block over a list."""
    instance = dg.DagsterInstance.ephemeral()

    def run(lines: list[str], block: str, retry_failed: bool = False) -> dg.ExecuteInProcessResult:
        (tmp_path / "list.tsv").write_text("".join(f"{line}\n" for line in lines))
        base = smallest(tmp_path)
        source = base.source.model_copy(update={"list": str(tmp_path / "list.tsv")})
        project = base.model_copy(update={"layout": LAYOUT, "source": source, "ingest": quick_config(retries=0)})
        index, images = ingest_assets(project, dg.StaticPartitionsDefinition(LAYOUT.block_keys()))
        resources = {"workshop": Workshop(project, site.connect_to)}
        dg.materialize([index], resources=resources, instance=instance)
        config = {"ops": {"cc12m__images": {"config": {"retry_failed": True}}}} if retry_failed else None
        selection = dg.AssetSelection.assets(images.key)
        return dg.materialize(
            [index, images], selection=selection, partition_key=block, resources=resources, instance=instance,
            run_config=config, raise_on_error=False,
        )  # fmt: skip

    yield run
    instance.dispose()


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
def test_a_block_without_pictures_is_not_passed_on(materialize, site, answer, what: str) -> None:
    lines = [f"http://pictures.test/{row}\tc" for row in range(6)]
    if what == "nothing can be decoded":
        for row in range(6):
            site.put(f"/{row}", answer(b"<html>please log in"))
    result = materialize(lines, "block_00")
    assert not verdicts(result)["decodable"]


def test_a_block_past_the_end_of_the_list_passes(materialize, site, answer, jpeg) -> None:
    result = materialize([f"{site.put('/0', answer(jpeg(0)))}\tc"], "block_01")
    assert result.success and set(verdicts(result).values()) == {True}
