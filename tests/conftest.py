"""Fixtures that more than one folder uses: one Ray session for all tests that need one."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

from fourmill.core.digest import Json
from fourmill.core.shards import Receipt
from fourmill.core.work import Progress, ShardJob
from fourmill.runtime.pace import Pace
from fourmill.runtime.ray_session import RayConfig

# A busy machine is no failure.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("DAGSTER_DISABLE_TELEMETRY", "1")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start programs come first, lest the last of two processes has them all; else the order is the drawn one."""
    slow = {item.path for item in items if item.get_closest_marker("ray") or item.get_closest_marker("servers")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def settings_of_torch() -> Iterator[None]:
    """What `prepare_torch` sets is of its whole process, which is a training program's, and here of the tests after it."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_flush_denormal(False)
        if torch.cuda.is_available():
            torch.set_float32_matmul_precision("highest")
            torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = True, False


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray with two CPUs, started once and shared; later `ensure_ray` calls find it."""
    from fourmill.runtime.ray_session import RayConfig, ensure_ray, stop_ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent / "data"))  # for the echo worker, in the actors
        ensure_ray(RayConfig(num_workers=2))
        yield
        stop_ray()


@pytest.fixture
def shards_here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Receipt]]:
    """Stages make their shards in this process, where Ray is not what is tested; returns what stands in for `run_shards`."""
    from fourmill.runtime import stages
    from fourmill.runtime.actors import ShardRunner

    def run_shards(
        factory: str,
        arguments: Mapping[str, Json],
        jobs: Sequence[ShardJob],
        config: RayConfig,
        progress: Progress,
        pace: Pace | None = None,
        together: int = 1,
    ) -> list[Receipt]:
        runner = ShardRunner()
        return [runner.run(factory, json.dumps(arguments, sort_keys=True), [job])[0].receipt for job in jobs]

    monkeypatch.setattr(stages, "run_shards", run_shards)
    return run_shards


@pytest.fixture(scope="session")
def smallest_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole chain at its smallest, made once by the command line and read by many tests; do not change it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # of all processes of this run
    out, made = shared / "smallest" / "out", shared / "smallest.made"
    with FileLock(shared / "smallest.lock"):
        if not made.exists():
            done = run_fourmill("demo", "--out", str(out), "--profile", "smallest")
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            made.touch()
    return out


def run_fourmill(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """The command line in a process of its own, as a user calls it."""
    command = [sys.executable, "-m", "fourmill.pipelines.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200, env={**os.environ, "COLUMNS": "160"})


@pytest.fixture(scope="session")
def fourmill() -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """`fourmill("status", "--json")` runs the command line and returns what it did."""
    return run_fourmill


class SmallDisk:
    """A folder with little room: a file system of its own where this user may mount one, a limit on a file's size else."""

    def __init__(self, folder: Path, total: int, longest_file: int) -> None:
        folder.mkdir()
        self.folder = folder
        self._limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.is_mounted = self._mount(f"size={total},nr_inodes=60")
        if not self.is_mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (longest_file, self._limits[1]))

    def enlarge(self) -> None:
        """Make room, as a person does who deletes something."""
        if not (self.is_mounted and self._mount("remount,size=64m,nr_inodes=10000")):
            resource.setrlimit(resource.RLIMIT_FSIZE, self._limits)

    def remove(self) -> None:
        self.enlarge()
        if self.is_mounted:
            subprocess.run(["umount", self.folder], check=True)

    def _mount(self, options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "fourmill-test", str(self.folder)]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except FileNotFoundError:
            return False


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int, int], SmallDisk]]:
    """`small_disk(total, longest_file)` makes a folder that holds no more bytes than that."""
    made: list[SmallDisk] = []

    def make(total: int, longest_file: int) -> SmallDisk:
        made.append(SmallDisk(tmp_path / "small", total, longest_file))
        return made[-1]

    yield make
    for disk in made:
        disk.remove()
