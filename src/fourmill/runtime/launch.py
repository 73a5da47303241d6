"""Training programs as processes: a spec file in, progress lines on stdout, a report path in the last line.

A program is `python -m MODULE --spec FILE`; it runs as well by hand. It dies with its launcher, resumes from its own
checkpoints, and leaves its stderr in `log.txt` of the run folder. Where several processes share a training, each is given
torchrun's variables; torchrun itself would cost its own import of torch.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from pydantic import BaseModel

from fourmill.core.work import Progress

_PR_SET_PDEATHSIG = 1
# Threads that spin at a barrier take the core that the one they wait for needs: beside one other busy process a step of
# 70 ms was seen to take two seconds. Sleeping ones cost nothing measurable (docs/benchmarks.md).
_CALM = {"OMP_WAIT_POLICY": "PASSIVE"}


class ProgramError(RuntimeError):
    """A training program that failed; the message holds the end of its log."""


def run_program(
    module: str, spec: BaseModel, folder: Path, threads: int, progress: Progress, processes: int = 1
) -> str:
    """Run one training program to its end.

    Args:
        folder: local folder for the spec and the log.
        threads: CPU threads that each process may use.
        processes: of the program, sharing every batch; the first one reports.

    Returns:
        The store path of its report.

    Raises:
        ProgramError: it exited with an error, or without naming a report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spec_file, log_file = folder / "spec.json", folder / "log.txt"
    spec_file.write_text(spec.model_dump_json(indent=1))
    command = [sys.executable, "-m", module, "--spec", str(spec_file)]
    with log_file.open("w") as log, ExitStack() as running:
        started = [
            running.enter_context(_started(command, environment, log, subprocess.DEVNULL if rank else subprocess.PIPE))
            for rank, environment in enumerate(_environments(threads, processes))
        ]
        report = _follow(started[0].stdout, progress)
        codes = [process.wait() for process in started]
    if any(codes) or report is None:
        tail = "\n".join(log_file.read_text().splitlines()[-15:])
        raise ProgramError(f"python -m {module} ended with code {max(codes, key=abs)}; its log is {log_file}:\n{tail}")
    return report


@contextmanager
def _started(
    command: list[str], environment: dict[str, str], log: IO[str], stdout: int
) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive the block: neither an interrupt from the UI nor a failed sibling leaves one behind."""
    process = subprocess.Popen(
        command, stdout=stdout, stderr=log, text=True, env=environment, preexec_fn=_die_with_parent
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()
        if process.stdout:
            process.stdout.close()


def _environments(threads: int, processes: int) -> list[dict[str, str]]:
    """The environment of each process of a program; those of several know each other by torchrun's variables."""
    shared = {**os.environ, **_CALM, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if processes == 1:
        return [shared]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    # Loopback by name: a machine whose own name does not resolve has no other address for gloo to offer.
    meeting["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return [{**shared, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _follow(stdout: IO[str] | None, progress: Progress) -> str | None:
    report = None
    for line in stdout or ():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue  # a library that prints; it is in nobody's way
        if "report" in event:
            report = event["report"]
        elif "done" in event:
            progress(event["done"], event["total"], event.get("note", ""))
    return report


def _die_with_parent() -> None:
    """Linux: the kernel ends this process when its parent dies, `kill -9` included."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
