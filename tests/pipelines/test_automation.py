"""The weekly rebuild asks for stale blocks and no others; a new manifest starts training once."""

from pathlib import Path

import dagster as dg

from fourmill.pipelines.automation import rebuild_requests
from fourmill.pipelines.definitions import build_definitions
from fourmill.pipelines.profiles import smallest
from fourmill.pipelines.status import Node, State

BLOCKS = ["block_00", "block_01"]


def node(name: str, block: str | None, state: State, reason: str = "") -> Node:
    return Node(dg.AssetKey(name.split("/")), block, state, reason)


def test_only_stale_token_blocks_are_rebuilt() -> None:
    nodes = [
        node("labels/depth", "block_00", "ok"),
        node("tokens/depth", "block_00", "ok"),
        node("tokens/depth", "block_01", "stale", "labels/depth block_01 has changed"),
        node("tokens/shards", "block_01", "waiting"),
        node("tokens/manifest", None, "waiting"),
    ]
    (request,) = rebuild_requests(nodes, BLOCKS)
    assert request.partition_key == "block_01"
    assert request.asset_selection == [dg.AssetKey(["tokens", "depth"]), dg.AssetKey(["tokens", "shards"])]


def test_the_same_cause_has_the_same_run_key_and_another_cause_another() -> None:
    stale = node("tokens/depth", "block_01", "stale", "code version 1 is now 2")
    (first,), (again,) = rebuild_requests([stale], BLOCKS), rebuild_requests([stale], BLOCKS)
    (other,) = rebuild_requests([node("tokens/depth", "block_01", "missing")], BLOCKS)
    assert first.run_key == again.run_key != other.run_key


def test_the_schedule_asks_for_every_block_of_a_new_project(tmp_path: Path) -> None:
    definitions = build_definitions(smallest(tmp_path))
    schedule = definitions.resolve_schedule_def("weekly_token_rebuild")
    (tmp_path / "home").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "home")) as instance:
        context = dg.build_schedule_context(instance, repository_def=definitions.get_repository_def())
        tick = schedule.evaluate_tick(context)
    assert [request.partition_key for request in tick.run_requests or []] == BLOCKS


def test_a_new_manifest_starts_training_once(tmp_path: Path) -> None:
    definitions = build_definitions(smallest(tmp_path))
    sensor = definitions.resolve_sensor_def("train_on_new_manifest")

    @dg.asset(key=["tokens", "manifest"])
    def manifest() -> dg.MaterializeResult:
        return dg.MaterializeResult(data_version=dg.DataVersion("abc"))

    with dg.DagsterInstance.ephemeral() as instance:
        assert dg.materialize([manifest], instance=instance).success
        context = dg.build_sensor_context(instance, repository_def=definitions.get_repository_def())
        first = sensor.evaluate_tick(context)
        (request,) = first.run_requests or []
        assert request.run_key == "abc"
        names = {key.to_user_string() for key in request.asset_selection or []}
        assert names == {f"fourm/{n}" for n in ("pretrain", "text2im", "superres", "evaluation", "samples")}
        later = dg.build_sensor_context(instance, cursor=first.cursor, repository_def=definitions.get_repository_def())
        assert not sensor.evaluate_tick(later).run_requests
