"""`kill -9` at random points, of a worker and of the driver: the finished block is that of an undisturbed run."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from fourmill.core.names import Layout
from fourmill.core.store import LocalStore
from fourmill.ingest.source import build_source_index
from fourmill.pipelines.profiles import smallest
from fourmill.runtime.actors import ShardRunner
from fourmill.runtime.project import Project, write_project
from fourmill.runtime.ray_session import RayConfig
from fourmill.runtime.session import Session
from fourmill.runtime.stages import images_stage, publish_ledger, run_block

LAYOUT = Layout(rows_per_shard=30, shards_per_block=2, num_blocks=1)
DRIVER = Path(__file__).parents[1] / "data" / "ingest_driver.py"
DEADLINE_S = 180
LATE = {
    ("delete", "shard-.json"),  # marking duplicates: the shard is not done
    ("write", "shard-.parquet"),
    ("write", "shard-.tar"),
    ("write", "shard-.json"),
    ("write", "block_.digests"),  # the index
    ("write", "block_.parquet"),  # the ledger
    ("write", "block_.shards.parquet"),
}


@pytest.fixture
def block(site, answer, jpeg, quick_config) -> Callable[[Path], Project]:
    """Makes projects over the same sixty rows: pictures, copies of them, and failures; each with a store of its own."""
    lines = []
    for row in range(LAYOUT.num_rows):
        one = answer(status=404) if row % 11 == 5 else answer(jpeg(row % 50), headers={"Content-Type": "image/jpeg"})
        lines.append(f"{site.put(f'/{row}', one)}\tpicture {row}")
    lines[7] = "no tab"

    def make(folder: Path) -> Project:
        folder.mkdir()
        (folder / "list.tsv").write_text("".join(f"{line}\n" for line in lines))
        base = smallest(folder)
        source = base.source.model_copy(update={"list": str(folder / "list.tsv"), "val_fraction": 0.3})
        changes = {
            "layout": LAYOUT,
            "source": source,
            "ingest": quick_config(concurrency=4, per_host=100),
            "ray": RayConfig(num_workers=2),
        }
        project = base.model_copy(update=changes)
        build_source_index(LocalStore(project.store), project.dataset, source, LAYOUT)
        write_project(project, folder / "project.json")
        (folder / "connect_to.json").write_text(json.dumps(site.connect_to))
        return project

    return make


def tars(project: Project) -> dict[str, bytes]:
    store = LocalStore(project.store)
    return {path: store.read(path) for path in store.list(project.dataset) if path.endswith(".tar")}


def start(folder: Path, *mode: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(DRIVER), str(folder / "project.json"), str(folder / "connect_to.json"), *mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(folder: Path, mode: str = "here") -> str:
    return finish_and_tell(folder, mode)[0]


def finish_and_tell(folder: Path, mode: str = "here") -> tuple[str, list[tuple[str, str]]]:
    """The digest, and the changes of the store after the last shard."""
    process = start(folder, mode)
    said, complaint = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, complaint[-3000:]
    digest, changes = said.splitlines()
    return digest, [(change, path) for change, path in json.loads(changes)]


@contextmanager
def at_request(site, number: int, action: Callable[[], None]) -> Iterator[threading.Event]:
    """Do something, once, when the server is asked for the `number`-th time from now on; yields an event that says so."""
    left, done, lock, take = [number], threading.Event(), threading.Lock(), site.take

    def counted(*arguments):
        with lock:
            left[0] -= 1
            now = left[0] == 0
        if now:
            action()
            done.set()
        return take(*arguments)

    site.take = counted
    try:
        yield done
    finally:
        del site.take


def test_a_killed_driver_changes_nothing(tmp_path: Path, block, site) -> None:
    calm = block(tmp_path / "calm")
    digest = finish(tmp_path / "calm")
    rng = random.Random(3)
    for number in range(9):
        project = block(tmp_path / f"wild{number}")
        kill_after_receipts = number % 3 == 2  # otherwise after a number of requests
        point = rng.randint(1, 3) if kill_after_receipts else rng.randint(1, 55)
        process = start(tmp_path / f"wild{number}", "here")
        if kill_after_receipts:
            while process.poll() is None and len(list(Path(project.store).rglob("shard-*.json"))) < point:
                pass
            process.kill()
        else:
            with at_request(site, point, process.kill) as killed:
                assert killed.wait(DEADLINE_S)
        process.communicate(timeout=DEADLINE_S)
        assert process.returncode == -signal.SIGKILL
        assert finish(tmp_path / f"wild{number}") == digest
        assert tars(project) == tars(calm)


def test_a_driver_killed_after_its_last_shard_changes_nothing(tmp_path: Path, block, site) -> None:
    """In the midst of marking duplicates, of the index and of the ledger: once in each kind of change that it makes there."""
    calm = block(tmp_path / "calm")
    digest, changes = finish_and_tell(tmp_path / "calm")
    kinds: dict[tuple[str, str], list[int]] = {}
    for number, (change, path) in enumerate(changes):
        kinds.setdefault((change, re.sub(r"\d+", "", Path(path).name)), []).append(number)
    assert kinds.keys() >= LATE
    rng = random.Random(7)
    for wild, kind in enumerate(sorted(LATE)):
        project = block(tmp_path / f"wild{wild}")
        process = start(tmp_path / f"wild{wild}", "here", str(rng.choice(kinds[kind])))
        process.communicate(timeout=DEADLINE_S)
        assert process.returncode == -signal.SIGKILL
        asked = len(site.asked)
        assert finish(tmp_path / f"wild{wild}") == digest
        assert tars(project) == tars(calm) and len(site.asked) == asked


@pytest.mark.ray
def test_a_killed_driver_with_its_own_ray_changes_nothing(tmp_path: Path, block, site) -> None:
    calm, wild = block(tmp_path / "calm"), block(tmp_path / "wild")
    digest = finish(tmp_path / "calm")
    process = start(tmp_path / "wild", "ray")
    orphans: list[psutil.Process] = []

    def kill() -> None:
        orphans.extend(psutil.Process(process.pid).children(recursive=True))
        process.kill()

    with at_request(site, 20, kill) as killed:
        assert killed.wait(DEADLINE_S)
    process.communicate(timeout=DEADLINE_S)
    assert finish(tmp_path / "wild") == digest  # beside workers that have not noticed yet
    _, alive = psutil.wait_procs(orphans, timeout=DEADLINE_S)
    assert not alive
    assert tars(wild) == tars(calm)


@pytest.mark.ray
def test_a_killed_worker_changes_nothing(tmp_path: Path, block, site, ray_session: None) -> None:
    calm = block(tmp_path / "calm")
    digest = make(calm, site)
    rng = random.Random(5)
    for number in range(10):
        project = block(tmp_path / f"wild{number}")
        killed_pids: list[int] = []

        def kill(killed_pids: list[int] = killed_pids) -> None:
            killed_pids.append(rng.choice(busy_workers()))
            os.kill(killed_pids[0], signal.SIGKILL)

        with at_request(site, rng.randint(1, 55), kill) as killed:
            assert make(project, site) == digest
            assert killed.is_set() and killed_pids
        assert tars(project) == tars(calm)


def make(project: Project, site) -> str:
    session = Session(project, connect_to=site.connect_to)
    stage = images_stage(session)
    return publish_ledger(session, stage, "block_00", run_block(session, stage, "block_00")).digest


def busy_workers() -> list[int]:
    """Ids of this session's Ray workers that are making a shard."""
    title = f"ray::{ShardRunner.__name__}.run"
    found = psutil.Process().children(recursive=True)
    return sorted(one.pid for one in found if one.is_running() and title in " ".join(one.cmdline()))
