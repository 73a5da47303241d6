"""Shards on a real local Ray: every shard once, errors by name, a killed actor's shard done again."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from pydantic import ValidationError

from fourmill.core.names import sample_key
from fourmill.core.shards import Recipe, ShardPlace, finished, read_members
from fourmill.core.store import LocalStore
from fourmill.core.work import ShardJob, no_progress
from fourmill.runtime.actors import ShardRunner, crew_of
from fourmill.runtime.pace import Pace
from fourmill.runtime.pool import ShardError, run_shards
from fourmill.runtime.ray_session import RayConfig, RayUnreachableError, StageShare, check_reachable, ensure_ray

CONFIG = RayConfig(num_workers=2)
WORKER = "echo_worker:EchoWorker"


def jobs(number: int) -> list[ShardJob]:
    return [ShardJob("train", shard, Recipe(stage="echo", code_version="1"), "run") for shard in range(number)]


@pytest.mark.ray
def test_every_shard_is_made_once_and_receipts_are_in_order(tmp_path: Path, ray_session: None) -> None:
    seen: list[int] = []
    notes: list[str] = []

    def listen(done: int, total: int, note: str) -> None:
        seen.append(done)
        notes.append(note)

    receipts = run_shards(WORKER, {"root": str(tmp_path)}, jobs(5), CONFIG, listen)
    store = LocalStore(tmp_path)
    keys = [list(read_members(store, ShardPlace("cc12m", "train", "echo", shard))) for shard in range(5)]
    assert keys == [[(sample_key(shard), b"x")] for shard in range(5)]
    assert [receipt.num_ok for receipt in receipts] == [1] * 5
    assert seen == [0, 1, 2, 3, 4, 5]
    assert all("rows/s, network 50.0 %, 100.0 % ok" in note for note in notes[1:]) and "left" in notes[1]


@pytest.mark.ray
def test_a_worker_that_takes_several_shards_gets_them_together(tmp_path: Path, ray_session: None) -> None:
    """Its death in the middle of a group costs the group once more; shards that were finished are finished."""
    seen: list[int] = []
    receipts = run_shards(
        "echo_worker:GroupEchoWorker",
        {"root": str(tmp_path), "kill_at": 3},
        jobs(5),
        CONFIG,
        lambda done, total, note: seen.append(done),
        together=3,
    )
    assert [receipt.num_ok for receipt in receipts] == [1] * 5 and (tmp_path / "killed").exists()
    store, places = LocalStore(tmp_path), [ShardPlace("cc12m", "train", "echo", shard) for shard in range(5)]
    assert receipts == [finished(store, place, job.recipe) for place, job in zip(places, jobs(5), strict=True)]
    groups = {path.name: path.read_text() for path in (tmp_path / "groups").iterdir()}
    assert groups == {"0": "2", "2": "2"}  # as many as leave work for both actors; a lone shard needs no group
    assert seen[0] == 0 and seen[-1] == 5 and set(seen) <= {0, 1, 2, 3, 4, 5}


@pytest.mark.ray
def test_a_worker_that_raises_is_named_with_its_shard(tmp_path: Path, ray_session: None) -> None:
    with pytest.raises(ShardError, match=r"echo train shard 00002: this shard cannot be read"):
        run_shards(WORKER, {"root": str(tmp_path), "fail_at": 2}, jobs(4), CONFIG, no_progress)


@pytest.mark.ray
def test_an_actor_that_raised_is_not_there_for_the_next_stage(tmp_path: Path, ray_session: None) -> None:
    """Its process may be broken (CUDA's after an assertion on the device), and holds what it had loaded."""
    config, root = CONFIG.model_copy(update={"num_workers": 1}), {"root": str(tmp_path)}
    pids = []
    for fail_at in (-1, 1, -1):
        with suppress(ShardError):
            run_shards("echo_worker:SignedEchoWorker", {**root, "fail_at": fail_at}, jobs(2), config, no_progress)
        pids.append({int(path.name) for path in (tmp_path / "pids").iterdir()} - set().union(*pids))
    assert [len(found) for found in pids] == [1, 0, 1]
    assert not psutil.pid_exists(pids[0].pop())


@pytest.mark.ray
def test_after_a_failure_nobody_is_left_who_might_write(tmp_path: Path, ray_session: None) -> None:
    """A stopped process is one that takes its time to die."""
    with pytest.raises(ShardError, match="shard 00001: this shard cannot be read"):
        run_shards(WORKER, {"root": str(tmp_path), "stop_at": 0, "fail_at": 1}, jobs(2), CONFIG, no_progress)
    assert not psutil.pid_exists(int((tmp_path / "stopped").read_text()))


@pytest.mark.ray
def test_a_killed_actor_loses_nothing(tmp_path: Path, ray_session: None) -> None:
    receipts = run_shards(WORKER, {"root": str(tmp_path), "kill_at": 1}, jobs(4), CONFIG, no_progress)
    assert LocalStore(tmp_path).exists("killed")
    assert len({receipt.tar_sha256 for receipt in receipts}) == 4
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_worker_is_closed_before_another_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "data"))
    runner, work = ShardRunner(), jobs(1)
    for name in ("one", "one", "other"):
        assert not LocalStore(tmp_path / "one").exists("closed")
        runner.run(WORKER, json.dumps({"root": str(tmp_path / name)}), work)
    assert LocalStore(tmp_path / "one").exists("closed") and not LocalStore(tmp_path / "other").exists("closed")


def test_no_jobs_start_no_ray(tmp_path: Path) -> None:
    assert run_shards(WORKER, {}, [], RayConfig(address="127.0.0.1:1"), no_progress) == []


def test_an_address_nobody_answers_on_is_said_before_any_work() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(RayUnreachableError, match=rf"{address}.*ray start --head"):
        check_reachable(RayConfig(address=address))


@pytest.mark.ray
def test_a_second_connection_is_the_first(ray_session: None) -> None:
    import ray

    before = ray.get_runtime_context().get_job_id()
    ensure_ray(CONFIG)
    assert ray.get_runtime_context().get_job_id() == before


@pytest.mark.ray
def test_a_shard_that_kills_every_worker_is_named(tmp_path: Path, ray_session: None) -> None:
    with pytest.raises(ShardError, match=r"echo train shard 00001: its worker died 4 times.*out-of-memory killer"):
        run_shards(WORKER, {"root": str(tmp_path), "kill_at": 1, "deadly": True}, jobs(3), CONFIG, no_progress)
    store = LocalStore(tmp_path)
    done = [store.exists(ShardPlace("cc12m", "train", "echo", shard).receipt) for shard in range(3)]
    assert done == [True, False, True]


@pytest.mark.ray
def test_the_pool_shrinks_to_its_lower_bound_and_grows_again(tmp_path: Path, ray_session: None) -> None:
    for kept in (0, 1, 2):
        config = CONFIG.model_copy(update={"min_workers": kept})
        run_shards(WORKER, {"root": str(tmp_path / str(kept))}, jobs(4), config, no_progress)
        assert len(crew_of(config)) == kept


@pytest.mark.ray
def test_an_actor_that_died_while_idle_costs_nothing(tmp_path: Path, ray_session: None) -> None:
    import ray

    run_shards(WORKER, {"root": str(tmp_path / "one")}, jobs(4), CONFIG, no_progress)
    for actor in crew_of(CONFIG).free([]):
        ray.kill(actor)
    assert len(run_shards(WORKER, {"root": str(tmp_path / "two")}, jobs(1), CONFIG, no_progress)) == 1


@pytest.mark.ray
def test_a_pace_tells_how_the_work_went(tmp_path: Path, ray_session: None) -> None:
    notes: list[str] = []
    pace = Pace(2, unit="images")
    run_shards(WORKER, {"root": str(tmp_path)}, jobs(2), CONFIG, lambda done, total, note: notes.append(note), pace)
    assert "images/s, network 50.0 %, 100.0 % ok" in notes[-1]
    facts = pace.facts()
    assert facts["images_per_second"] > 0 and facts["network_share"] == 0.5


@pytest.mark.ray
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_cancelled_run_leaves_nobody_at_work(tmp_path: Path, how: signal.Signals) -> None:
    """Dagster cancels a run by SIGINT; SIGTERM, to a program that does not heed it, leaves no time for anything."""
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "  # ignored below a shell's background,
        "signal.signal(signal.SIGTERM, signal.SIG_DFL); "  # and then by what Dagster has been in as well
        "from fourmill.core.work import ShardJob, no_progress; from fourmill.core.shards import Recipe; "
        "from fourmill.runtime.pool import run_shards; from fourmill.runtime.ray_session import RayConfig; "
        "jobs = [ShardJob('train', s, Recipe(stage='echo', code_version='1'), 'run') for s in range(3)]; "
        f"run_shards('{WORKER}', {{'root': sys.argv[1], 'hang': True}}, jobs, RayConfig(num_workers=1), no_progress)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "data")}
    driver = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    while not (hanging := list(tmp_path.glob("hanging/*"))) and driver.poll() is None and time.monotonic() < deadline:
        with suppress(subprocess.TimeoutExpired):
            driver.wait(0.1)
    (worker,) = hanging
    at_work = psutil.Process(int(worker.name))
    driver.send_signal(how)
    assert driver.wait(180) != 0
    _, alive = psutil.wait_procs([at_work], timeout=180)
    assert not alive
    assert len(list(tmp_path.glob("hanging/*"))) == 1  # nobody took the next shard


def test_stages_have_shares_of_their_own() -> None:
    config = RayConfig(
        num_workers=4,
        gpus_per_worker=1.0,
        stages={
            "labels": StageShare(gpus_per_worker=0.5),
            "labels/depth": StageShare(gpus_per_worker=0.25, num_workers=16),
        },
    )
    depth, semseg, images = (config.for_stage(name) for name in ("labels/depth", "labels/semseg", "cc12m/images"))
    assert (depth.gpus_per_worker, depth.num_workers, semseg.gpus_per_worker) == (0.25, 16, 0.5)
    assert images == config and config.local_cpus() == 16
    with pytest.raises(ValidationError, match="min_workers 9 is more than num_workers 4 labels"):
        RayConfig(num_workers=4, stages={"labels": StageShare(min_workers=9)})


@pytest.mark.ray
def test_a_machine_without_a_gpu_says_so_before_any_work(ray_session: None) -> None:
    with pytest.raises(RayUnreachableError, match=r"asks for 64 GPU and this machine's Ray has .*gpus_per_worker"):
        run_shards(WORKER, {"root": ""}, jobs(1), RayConfig(gpus_per_worker=64), no_progress)
