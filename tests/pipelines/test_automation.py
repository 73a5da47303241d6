"""The weekly rebuild asks for stale blocks and no others; a new manifest starts training once."""

import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.schedule_definition import ScheduleExecutionData  # what evaluate_tick returns
from dagster._core.test_utils import create_run_for_test

from fourmill.assets.training import MANIFEST
from fourmill.pipelines import automation, launcher
from fourmill.pipelines.automation import rebuild_requests
from fourmill.pipelines.definitions import build_definitions
from fourmill.pipelines.profiles import smallest
from fourmill.pipelines.status import DATA_VERSION, INPUT_VERSION, Node, State

BLOCKS = ["block_00", "block_01"]


def node(name: str, block: str | None, state: State, reason: str = "", behind: str = "") -> Node:
    parents = ((dg.AssetKey(behind.split("/")), block),) if behind else ()
    return Node(dg.AssetKey(name.split("/")), block, state, reason, parents)


def test_only_stale_token_blocks_are_rebuilt() -> None:
    nodes = [
        node("labels/depth", "block_00", "ok"),
        node("tokens/depth", "block_00", "ok"),
        node("tokens/depth", "block_01", "stale", "labels/depth block_01 has changed"),
        node("tokens/shards", "block_01", "waiting", behind="tokens/depth"),
        node("tokens/manifest", None, "waiting", behind="tokens/shards"),
    ]
    (request,) = rebuild_requests(nodes, BLOCKS)
    assert request.partition_key == "block_01"
    assert request.asset_selection == [dg.AssetKey(["tokens", "depth"]), dg.AssetKey(["tokens", "shards"])]


def test_the_same_cause_has_the_same_run_key_and_another_cause_another() -> None:
    stale = node("tokens/depth", "block_01", "stale", "code version 1 is now 2")
    (first,), (again,) = rebuild_requests([stale], BLOCKS), rebuild_requests([stale], BLOCKS)
    (other,) = rebuild_requests([node("tokens/depth", "block_01", "missing")], BLOCKS)
    assert first.run_key == again.run_key != other.run_key


def test_tokens_whose_labels_are_not_there_yet_are_left_for_another_week() -> None:
    nodes = [
        node("labels/depth", "block_00", "missing"),
        node("tokens/depth", "block_00", "missing", behind="labels/depth"),
        node("tokens/rgb", "block_00", "stale", "code version 1 is now 2"),
        node("tokens/shards", "block_00", "missing", behind="tokens/depth"),
    ]
    (request,) = rebuild_requests(nodes, BLOCKS)
    assert request.asset_selection == [dg.AssetKey(["tokens", "rgb"])]


def tick_of(definitions: dg.Definitions, instance: dg.DagsterInstance) -> ScheduleExecutionData:
    context = dg.build_schedule_context(instance, repository_def=definitions.get_repository_def())
    return definitions.resolve_schedule_def("weekly_token_rebuild").evaluate_tick(context)


def pretend(definitions: dg.Definitions, instance: dg.DagsterInstance, *groups: str) -> None:
    """Events as if everything but these groups had been made just now, of each other."""
    graph = definitions.resolve_asset_graph()
    for key in graph.toposorted_asset_keys:
        asset = graph.get(key)
        inputs = {parent.to_user_string() for parent in asset.parent_keys}
        tags = {
            DATA_VERSION: "1",
            "dagster/code_version": str(asset.code_version),
            **{f"{INPUT_VERSION}{name}": "1" for name in inputs},
            **{f"dagster/input_event_pointer/{name}": "1000000" for name in inputs},
        }
        for block in BLOCKS if asset.is_partitioned else [None]:
            if key.path[0] not in groups:
                instance.report_runless_asset_event(dg.AssetMaterialization(key, partition=block, tags=tags))


def test_the_schedule_rebuilds_what_it_can_and_says_what_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    definitions = build_definitions(smallest(tmp_path))
    (tmp_path / "home").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "home")) as instance:
        waiting = tick_of(definitions, instance)
        pretend(definitions, instance, "tokens", "fourm")
        gone = tick_of(definitions, instance)  # events alone are no files
        monkeypatch.setattr(automation, "changed_outside", lambda project, store: {})
        ready = tick_of(definitions, instance)
        pretend(definitions, instance)
        done = tick_of(definitions, instance)
    assert not waiting.run_requests and "cc12m/source_index is missing" in str(waiting.skip_message)
    assert not gone.run_requests
    assert [request.partition_key for request in ready.run_requests or []] == BLOCKS
    assert not done.run_requests and done.skip_message == "every token block is up to date"


def manifest_of(version: str) -> dg.AssetsDefinition:
    @dg.asset(key=MANIFEST)
    def manifest() -> dg.MaterializeResult:
        return dg.MaterializeResult(data_version=dg.DataVersion(version))

    return manifest


def test_a_new_manifest_starts_training_once(tmp_path: Path) -> None:
    definitions = build_definitions(smallest(tmp_path))
    sensor = definitions.resolve_sensor_def("train_on_new_manifest")
    with dg.DagsterInstance.ephemeral() as instance:
        assert dg.materialize([manifest_of("abc")], instance=instance).success
        context = dg.build_sensor_context(instance, repository_def=definitions.get_repository_def())
        first = sensor.evaluate_tick(context)
        (request,) = first.run_requests or []
        assert str(request.run_key).startswith("abc:")
        names = {key.to_user_string() for key in request.asset_selection or []}
        assert names == {f"fourm/{n}" for n in ("pretrain", "text2im", "superres", "evaluation", "samples")}
        later = dg.build_sensor_context(instance, cursor=first.cursor, repository_def=definitions.get_repository_def())
        assert not sensor.evaluate_tick(later).run_requests


@pytest.mark.parametrize(
    ("version", "why"),
    [("failed-run", "the manifest failed its check"), ("abc", "all of fourm/* was made of this manifest")],
)
def test_a_manifest_that_failed_or_was_trained_on_starts_nothing(tmp_path: Path, version: str, why: str) -> None:
    definitions = build_definitions(smallest(tmp_path))
    sensor = definitions.resolve_sensor_def("train_on_new_manifest")

    names = ("pretrain", "text2im", "superres", "evaluation", "samples")

    @dg.multi_asset(specs=[dg.AssetSpec(["fourm", name], deps=[MANIFEST]) for name in names])
    def models() -> Iterator[dg.MaterializeResult]:
        for name in names:
            yield dg.MaterializeResult(asset_key=["fourm", name])

    with dg.DagsterInstance.ephemeral() as instance:
        assert dg.materialize([manifest_of(version), models], instance=instance).success
        context = dg.build_sensor_context(instance, repository_def=definitions.get_repository_def())
        tick = sensor.evaluate_tick(context)
    assert not tick.run_requests and why in str(tick.skip_message)


def test_a_manifest_that_a_run_trains_on_already_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    definitions = build_definitions(smallest(tmp_path))
    sensor = definitions.resolve_sensor_def("train_on_new_manifest")
    with dg.DagsterInstance.ephemeral() as instance:
        assert dg.materialize([manifest_of("abc")], instance=instance).success
        run = create_run_for_test(instance, job_name="train_4m", status=dg.DagsterRunStatus.STARTED)
        context = dg.build_sensor_context(instance, repository_def=definitions.get_repository_def())
        tick = sensor.evaluate_tick(context)
        long_after = time.time() + 700  # and it never said which process it is in: it was killed
        monkeypatch.setattr(launcher.time, "time", lambda: long_after)
        context = dg.build_sensor_context(instance, repository_def=definitions.get_repository_def())
        assert sensor.evaluate_tick(context).run_requests
    assert not tick.run_requests and f"run {run.run_id[:8]} (train_4m) trains already" in str(tick.skip_message)


def test_tokens_of_a_tokenizer_that_waits_and_serves_are_rebuilt_and_no_others() -> None:
    tokenizer = (dg.AssetKey(["tokenizers", "depth"]), None)
    nodes = [
        node("labels/depth", "block_01", "stale", "a tar is gone"),
        Node(*tokenizer, "waiting"),
        Node(dg.AssetKey(["tokens", "depth"]), "block_00", "missing", "", (tokenizer,)),
        Node(dg.AssetKey(["tokens", "rgb"]), "block_00", "waiting", "", (tokenizer,)),
        node("tokens/shards", "block_00", "waiting", behind="tokens/depth"),
        node("tokens/depth", "block_01", "missing", behind="labels/depth"),
        node("tokens/shards", "block_01", "waiting", behind="tokens/depth"),
    ]
    (request,) = rebuild_requests(nodes, BLOCKS)
    assert request.partition_key == "block_00"
    assert request.asset_selection == [dg.AssetKey(["tokens", "depth"]), dg.AssetKey(["tokens", "shards"])]
