"""Actors that never come up, on a real Ray that is treated as a cluster: nothing is known of its nodes before."""

import json
from pathlib import Path
from typing import Any

import pytest

from fourmill.core.shards import Recipe
from fourmill.core.store import LocalStore
from fourmill.core.work import ShardJob, no_progress
from fourmill.runtime import waiting
from fourmill.runtime.actors import ActorsError, Crew
from fourmill.runtime.pool import run_shards
from fourmill.runtime.ray_session import RayConfig

WORKER = "echo_worker:EchoWorker"


def jobs(number: int) -> list[ShardJob]:
    return [ShardJob("train", shard, Recipe(stage="echo", code_version="1"), "run") for shard in range(number)]


@pytest.fixture
def cluster(ray_session: None) -> RayConfig:
    """The session of two CPUs as one that others have started."""
    import ray

    return RayConfig(address=ray.get_runtime_context().gcs_address, num_workers=2)


@pytest.fixture
def talkative(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remarks every half a second."""
    monkeypatch.setattr(waiting, "_SAY_EVERY_S", 0.5)


def changed(config: RayConfig, **changes: Any) -> RayConfig:
    return config.model_copy(update=changes)


def coming_up(crew: Crew) -> None:
    """Welcome all actors that are awaited, whatever has become of them."""
    import ray

    while crew.answers:
        done, _ = ray.wait(crew.answers, num_returns=1, timeout=180)
        assert done, "an actor that was asked for has neither come up nor died"
        crew.welcome(done[0])


@pytest.mark.ray
def test_a_share_that_no_node_has_ends_the_stage_at_the_limit(tmp_path: Path, cluster: RayConfig) -> None:
    notes: list[str] = []
    config = changed(cluster, gpus_per_worker=64.0, start_timeout_s=2.0)
    with pytest.raises(
        ActorsError,
        match=r"^echo: none of its Ray actors came up within 2 s \(ray\.start_timeout_s\): 2 without a node "
        r"\(pending creation\), for each wants 1 CPU and 64 GPU: no node has as much \(they have 2 CPU and . GPU\)\. "
        r"Add nodes that have it .*gpus_per_worker",
    ):
        run_shards(WORKER, {"root": str(tmp_path)}, jobs(2), config, lambda done, total, note: notes.append(note))
    assert any(note.startswith("no actor is up after ") for note in notes)


@pytest.mark.ray
def test_a_python_that_a_node_lacks_is_told_by_the_node(tmp_path: Path, cluster: RayConfig, talkative: None) -> None:
    """Ray itself starts it again and again, and says nothing."""
    environment = {"py_executable": f"{tmp_path}/python"}
    config = changed(cluster, num_workers=1, runtime_env=environment, start_timeout_s=180.0)
    with pytest.raises(
        ActorsError,
        match=r"^echo: its Ray actors cannot come up on any .*: on node \S+ \S+python does not run \(No such file or directory\)"
        r".*Mend",
    ):
        run_shards(WORKER, {"root": str(tmp_path)}, jobs(2), config, no_progress)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"working_dir": "file:///there/is/none.zip"}, r"FileNotFoundError: .*'/there/is/none\.zip'"),
        ({"image_uri": "127.0.0.1:1/none:1"}, ""),  # without podman, or with it and nothing to be pulled
    ],
)
def test_an_environment_that_cannot_be_set_up_ends_the_stage_at_once(
    tmp_path: Path, cluster: RayConfig, environment: dict[str, Any], reason: str
) -> None:
    config = changed(cluster, runtime_env=environment, start_timeout_s=180.0)
    with pytest.raises(ActorsError, match=rf"^echo: Ray could not set up .*on node \S+: {reason}.*ray\.runtime_env"):
        run_shards(WORKER, {"root": str(tmp_path)}, jobs(4), config, no_progress)


@pytest.mark.ray
def test_a_stage_goes_on_with_the_actors_that_are_up(tmp_path: Path, cluster: RayConfig, talkative: None) -> None:
    """Its shards wait for the remark on the third actor, for which the two CPUs have no room."""
    run_shards(WORKER, {"root": str(tmp_path / "before")}, jobs(4), cluster, no_progress)
    remarks: list[str] = []

    def listen(done: int, total: int, note: str) -> None:
        if note.startswith("not up of 3 actors: 1 without a node"):
            remarks.append(note)
            LocalStore(tmp_path).write("stopped", b"go on")

    config = changed(cluster, num_workers=3, start_timeout_s=0.1)
    assert len(run_shards(WORKER, {"root": str(tmp_path), "stop_at": 99}, jobs(6), config, listen)) == 6
    assert "for each wants 1 CPU and 0 GPU: nodes that have as much are in use" in remarks[0]


@pytest.mark.ray
def test_actors_that_die_beside_others_are_asked_for_ever_more_rarely(cluster: RayConfig) -> None:
    now = 0.0
    config = changed(cluster, cpus_per_worker=0.0)  # another test's crew may hold the CPUs
    crew = Crew(config, clock=lambda: now)
    crew.grow(1)
    coming_up(crew)
    crew._config = changed(config, runtime_env={"working_dir": "file:///there/is/none.zip"})
    for _ in range(3):
        crew.grow(2)
        assert len(crew.coming) == 1
        coming_up(crew)
    crew.grow(2)
    assert not crew.coming and crew.num_ready == 1 and "none.zip" in crew.last_words
    now = 61.0
    crew.grow(2)
    assert len(crew.coming) == 1
    crew.shrink(0, [])


@pytest.mark.ray
def test_the_end_of_the_wait_names_the_environment_that_does_not_start(
    tmp_path: Path, cluster: RayConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting._Pythons, "ask", lambda self, nodes: None)  # of an image, say, nobody can be asked
    environment = {"py_executable": str(tmp_path / "python")}
    config = changed(cluster, runtime_env=environment, start_timeout_s=2.0, num_workers=1)
    with pytest.raises(ActorsError, match=r"process has not started in .*Look at `ray status`.*raylet\.err") as told:
        run_shards(WORKER, {"root": str(tmp_path)}, jobs(1), config, no_progress)
    assert json.dumps(environment) in str(told.value)
