"""Shards on a real local Ray: every shard once, errors by name, a killed actor's shard done again."""

import json
import socket
from pathlib import Path

import pytest

from fourmill.core.names import sample_key
from fourmill.core.shards import Recipe, ShardPlace, read_members
from fourmill.core.store import LocalStore
from fourmill.core.work import ShardJob, no_progress
from fourmill.runtime.pool import ShardError, ShardRunner, run_shards
from fourmill.runtime.ray_session import RayConfig, RayUnreachableError, check_reachable, ensure_ray

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
    assert seen == [1, 2, 3, 4, 5]
    assert all("rows/s, 100.0 % ok" in note for note in notes) and "left" in notes[0]


@pytest.mark.ray
def test_a_worker_that_raises_is_named_with_its_shard(tmp_path: Path, ray_session: None) -> None:
    with pytest.raises(ShardError, match=r"echo train shard 00002: this shard cannot be read"):
        run_shards(WORKER, {"root": str(tmp_path), "fail_at": 2}, jobs(4), CONFIG, no_progress)


@pytest.mark.ray
def test_a_killed_actor_loses_nothing(tmp_path: Path, ray_session: None) -> None:
    receipts = run_shards(WORKER, {"root": str(tmp_path), "kill_at": 1}, jobs(4), CONFIG, no_progress)
    assert LocalStore(tmp_path).exists("killed")
    assert len({receipt.tar_sha256 for receipt in receipts}) == 4
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_worker_is_closed_before_another_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "data"))
    runner, (job,) = ShardRunner(), jobs(1)
    for name in ("one", "one", "other"):
        assert not LocalStore(tmp_path / "one").exists("closed")
        runner.run(WORKER, json.dumps({"root": str(tmp_path / name)}), job)
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
