"""Training programs as processes: a spec file in, progress lines on stdout, a report path in the last line.

A program is `python -m MODULE --spec FILE`; it runs as well by hand. It dies with its launcher, resumes from its own
checkpoints, and leaves its stderr in `log.txt` of the run folder.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
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


def run_program(module: str, spec: BaseModel, folder: Path, threads: int, progress: Progress) -> str:
    """Run one training program to its end.

    Args:
        folder: local folder for the spec and the log.
        threads: CPU threads the program may use.

    Returns:
        The store path of its report.

    Raises:
        ProgramError: it exited with an error, or without naming a report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spec_file, log_file = folder / "spec.json", folder / "log.txt"
    spec_file.write_text(spec.model_dump_json(indent=1))
    environment = {**os.environ, **_CALM, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with log_file.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, "--spec", str(spec_file)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            preexec_fn=_die_with_parent,
        )
        try:
            report = _follow(process.stdout, progress)
            code = process.wait()
        except BaseException:  # also an interrupt from the UI: no trainer outlives its run
            process.terminate()
            process.wait()
            raise
    if code or report is None:
        tail = "\n".join(log_file.read_text().splitlines()[-15:])
        raise ProgramError(f"python -m {module} ended with code {code}; its log is {log_file}:\n{tail}")
    return report


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
