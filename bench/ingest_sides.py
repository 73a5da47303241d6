"""The two sides of bench.ingest, each a program in processes of its own whose CPU time the system counts."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_THEIR_ENVIRONMENT = _ROOT / ".venv-bench-img2dataset"
_THEIR_PACKAGE = "img2dataset>=1.47.0"

_THEIR_PROGRAM = """
import json, os, pathlib, sys, time
from img2dataset import download
from img2dataset.downloader import Downloader

plain = Downloader.__call__

def clocked(self, row):
    begin, cpu = time.monotonic(), time.process_time()
    done = plain(self, row)
    clock = {"cpu_s": time.process_time() - cpu, "begin": begin, "end": time.monotonic()}
    pathlib.Path(__file__).with_name(f"clock-{row[0]}.json").write_text(json.dumps(clock))
    return done

Downloader.__call__ = clocked  # in the spawned processes too: they run this file first

if __name__ == "__main__":
    download(**json.loads(sys.argv[1]))
"""


@dataclass(frozen=True)
class Task:
    """A list to download. Both sides: proportions kept, the longer side reduced to `side_px`, JPEG q95, sha256, tars."""

    rows: int
    base: str  # URL before a row's number
    folder: str  # the sides write below it
    authorities: str  # PEM file for https
    processes: int = 2
    concurrency: int = 64  # requests at once, a process
    side_px: int = 256

    @property
    def rows_per_shard(self) -> int:
        return -(-self.rows // self.processes)

    def urls(self) -> list[str]:
        """URL of each row."""
        return [f"{self.base}{row}.jpg" for row in range(self.rows)]


@dataclass(frozen=True)
class Cost:
    """What a run took."""

    cpu_s: float  # user and system time of all the side's processes
    work_cpu_s: float  # of it inside the calls that make shards: no interpreter, no imports, no starting of processes
    work_wall_s: float  # from the beginning of the first such call to the end of the last
    ok: int  # images it has made


def their_python() -> str:
    """Python of the environment with img2dataset, made if it is not there."""
    python = _THEIR_ENVIRONMENT / "bin" / "python"
    done = _THEIR_ENVIRONMENT / ".done"
    if not done.exists():
        uv = [sys.executable, "-m", "uv"]
        subprocess.run([*uv, "venv", "--quiet", "--clear", "--python", sys.executable, _THEIR_ENVIRONMENT], check=True)
        subprocess.run([*uv, "pip", "install", "--quiet", "--python", python, _THEIR_PACKAGE], check=True)
        done.touch()
    return str(python)


def their_version() -> str:
    """Of img2dataset."""
    ask = "from importlib.metadata import version; print(version('img2dataset'))"
    return subprocess.run([their_python(), "-c", ask], capture_output=True, text=True, check=True).stdout.strip()


def run_theirs(task: Task) -> Cost:
    """img2dataset over the task."""
    folder = Path(task.folder) / "theirs"
    folder.mkdir(parents=True)
    (folder / "list.tsv").write_text("url\tcaption\n" + "".join(f"{url}\ta picture\n" for url in task.urls()))
    (folder / "program.py").write_text(_THEIR_PROGRAM)
    settings = {
        "url_list": str(folder / "list.tsv"),
        "input_format": "tsv",
        "url_col": "url",
        "caption_col": "caption",
        "output_folder": str(folder / "out"),
        "output_format": "webdataset",
        "processes_count": task.processes,
        "thread_count": task.concurrency,
        "number_sample_per_shard": task.rows_per_shard,
        "image_size": task.side_px,
        "resize_mode": "keep_ratio_largest",
        "resize_only_if_bigger": True,
        "encode_quality": 95,
        "compute_hash": "sha256",
        "extract_exif": False,
        "timeout": 60,
    }
    authorities = {"SSL_CERT_FILE": task.authorities, "NO_ALBUMENTATIONS_UPDATE": "1"}
    cpu_s = measured([their_python(), str(folder / "program.py"), json.dumps(settings)], authorities)
    stats = [json.loads(path.read_text()) for path in (folder / "out").glob("*_stats.json")]
    if sum(one["count"] for one in stats) != task.rows:
        raise RuntimeError(f"img2dataset has counted {stats} for {task.rows} rows; see {folder}")
    return _cost(cpu_s, folder, sum(one["successes"] for one in stats))


def run_ours(task: Task) -> Cost:
    """ImageWorker over the task, a process a shard."""
    cpu_s = measured(_ours("run", task))
    folder = Path(task.folder)
    return _cost(cpu_s, folder, json.loads((folder / "counts.json").read_text())["ok"])


def write_clock(folder: str, shard: int, begin: float, cpu_s: float) -> None:
    """Note what a call that makes a shard took, from a monotonic and a CPU clock."""
    clock = {"cpu_s": time.process_time() - cpu_s, "begin": begin, "end": time.monotonic()}
    Path(folder, f"clock-{shard}.json").write_text(json.dumps(clock))


def _cost(cpu_s: float, folder: Path, ok: int) -> Cost:
    clocks = [json.loads(path.read_text()) for path in folder.glob("clock-*.json")]
    wall_s = max(one["end"] for one in clocks) - min(one["begin"] for one in clocks)
    return Cost(cpu_s, sum(one["cpu_s"] for one in clocks), wall_s, ok)


def ask_ours(what: str, task: Task, *more: str) -> dict[str, object]:
    """What one of the other programs of `bench.ingest_ours` finds."""
    done = subprocess.run(_ours(what, task, *more), stdout=subprocess.PIPE, text=True, check=True, cwd=_ROOT)
    return json.loads(done.stdout)


def measured(command: list[str], environment: dict[str, str] | None = None) -> float:
    """CPU seconds of a program and all that it has started and waited for.

    Raises:
        RuntimeError: it failed; its output is in the message.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(environment or {})},
        cwd=_ROOT,
    )
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{command[:3]} ended with {process.returncode}:\n{said[-4000:]}")
    return used.ru_utime + used.ru_stime


def _ours(what: str, task: Task, *more: str) -> list[str]:
    return [sys.executable, "-m", "bench.ingest_ours", what, json.dumps(asdict(task)), *more]
