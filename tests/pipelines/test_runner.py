"""What a person is told when a run fails."""

import signal

import dagster as dg

from fourmill.assets.result import table
from fourmill.core.store import StoreFullError
from fourmill.pipelines.findings import spoken
from fourmill.pipelines.runner import first_error
from fourmill.runtime.pool import ShardError


def test_a_failed_run_is_told_in_the_words_of_the_package() -> None:
    @dg.asset
    def images() -> None:
        try:
            try:
                raise OSError(28, "No space left on device")
            except OSError as error:
                raise StoreFullError("no room for /data/shard-00002.tar: it needs at least 8,000 bytes") from error
        except StoreFullError as error:
            raise ShardError(f"images train shard 00002: {error}") from error

    job = dg.Definitions(assets=[images], jobs=[dg.define_asset_job("label_block")]).resolve_job_def("label_block")
    with dg.DagsterInstance.ephemeral() as instance:
        result = job.execute_in_process(instance=instance, raise_on_error=False)
    told = first_error(result, "label_block", "block_00")
    assert told.startswith("label_block block_00, images: ")
    assert "images train shard 00002: no room for /data/shard-00002.tar: it needs at least 8,000 bytes" in told
    assert "Errno 28" not in told


def test_a_run_that_was_ended_is_told_so_and_how_to_go_on() -> None:
    @dg.asset
    def images() -> None:
        signal.raise_signal(signal.SIGINT)

    job = dg.Definitions(assets=[images], jobs=[dg.define_asset_job("label_block")]).resolve_job_def("label_block")
    with dg.DagsterInstance.ephemeral() as instance:
        result = job.execute_in_process(instance=instance, raise_on_error=False)
    told = first_error(result, "label_block", "block_00")
    assert told == "label_block block_00, images: ended by a signal; the same command goes on with what is left"


def test_a_check_that_blocks_is_told_with_what_it_found() -> None:
    @dg.asset(check_specs=[dg.AssetCheckSpec("round_trip", asset="text", blocking=True)])
    def text() -> dg.MaterializeResult:
        return dg.MaterializeResult(
            check_results=[
                dg.AssetCheckResult(
                    check_name="round_trip", passed=False, metadata={"round_trip_share": 0.25, "asked": 0.99}
                )
            ]
        )

    @dg.asset(deps=[text])
    def tokens() -> None: ...

    job = dg.Definitions(assets=[text, tokens], jobs=[dg.define_asset_job("train")]).resolve_job_def("train")
    with dg.DagsterInstance.ephemeral() as instance:
        result = job.execute_in_process(instance=instance, raise_on_error=False)
    told = first_error(result, "train", None)
    assert "text fails its check round_trip (round_trip_share 0.25, asked 0.99)" in told and "fourmill ui" in told


def test_tables_in_what_a_check_found_are_told_by_their_first_rows() -> None:
    problems = table(["problem"], [[f"000000{i}: id 70 of 64"] for i in range(5)])
    found = {"block": dg.MetadataValue.text("block_00"), "num_problems": dg.MetadataValue.int(5), "problems": problems}
    rows = "0000000: id 70 of 64; 0000001: id 70 of 64; 0000002: id 70 of 64; and 2 more"
    assert spoken(found) == f"num_problems 5, problems: {rows}"
    assert spoken({"statuses": table(["status", "rows"], [["ok", 3]]), "none": table(["a"], [])}) == (
        "statuses: ok 3, none none"
    )
