"""Training programs as processes: a spec file in, progress lines on stdout, a report path in the last line.

A program is `python -m MODULE --spec FILE` and runs so by hand. Here it is forked from a process that has imported torch
and timm already: each would spend eleven seconds on that alone. It dies with its launcher, resumes from its own
checkpoints, and leaves its stderr in `log.txt` of the run folder. Where several processes share a training, each is given
torchrun's variables.
"""

import ctypes
import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from threading import Lock, Thread
from typing import Any, TypeVar

from pydantic import BaseModel

from fourmill.core.work import Progress
from fourmill.runtime.session import Session, silent

_PR_SET_PDEATHSIG = 1
_PRELOAD = ["fourmill.tokenize.train", "fourmill.train.loop", "transformers.models.clip.modeling_clip"]
# Threads that spin at a barrier take the core that the one they wait for needs: beside one other busy process a step of
# 70 ms was seen to take two seconds. Sleeping ones cost nothing measurable (docs/benchmarks.md).
_CALM = {"OMP_WAIT_POLICY": "PASSIVE"}


# Whoever starts a process reaps all that have ended (`multiprocessing.process`). An exit code is read once, and a thread that comes
# too late takes 255 for it, so no two threads may start or reap at a time.
_reaping = Lock()
_running: set[ForkServerProcess] = set()
_is_ending = False  # no process is started then; both under `_reaping`

Result = TypeVar("Result")


class ProgramError(RuntimeError):
    """A training program that failed; the message holds the end of its log."""


def warm_up() -> None:
    """Begin to load the libraries, in the process that programs will be forked from. Returns at once."""
    _forkserver()
    forkserver.ensure_running()


def _forkserver() -> ForkServerContext:
    os.environ.update(_CALM)  # read when the libraries are loaded, in the process that is forked from
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


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
    log_file.write_text("")
    with ExitStack() as running:
        started = [
            running.enter_context(_forked(_become, (module, str(spec_file), environment, str(log_file))))
            for environment in _environments(threads, processes)
        ]
        siblings = [process for process, _ in started]
        report = _follow(siblings, started[0][1], progress, log_file)
        codes = [process.exitcode for process in siblings]
    if any(codes) or report is None:
        tail = "\n".join(log_file.read_text().splitlines()[-15:])
        code = next((code for code in codes if code and code > 0), next(filter(None, codes), 0))
        raise ProgramError(f"python -m {module} ended with code {code}; its log is {log_file}:\n{tail}")
    return report


def run_warm(work: Callable[[Session], Result], session: Session) -> Result:
    """Call a function of a session in a forked process, which has torch and the networks' libraries at once.

    Args:
        work: a function of a module; what it returns and raises is pickled. What it tells of its progress, from one thread, the
            session's listener hears.

    Raises:
        ProgramError: the process was killed. What the function raises is raised here.
    """
    with _forked(_call, (work, replace(session, listener=silent))) as (process, said):
        try:
            while (heard := said.recv())[0] == "progress":
                session.listener(*heard[1])
        except EOFError:
            _reap(process)
            raise ProgramError(f"{_name_of(work)} ended with code {process.exitcode} before it was done") from None
    how, result = heard
    if how == "failed":
        raise result
    return result


def run_warm_parts(work: Callable[[Session, int, int], Result], session: Session, parts: int) -> list[Result]:
    """Call `work(session, part, parts)` for every part, each in a forked process of its own at the same time.

    Raises:
        ProgramError: a process was killed. What a part raises is raised here, when all have ended.
    """
    with program_threads(parts, "part") as pool:
        running = [pool.submit(run_warm, partial(_part, work, part, parts), session) for part in range(parts)]
        wait_for(running)
    return [part.result() for part in running]


@contextmanager
def program_threads(number: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Threads that may each run programs. When the block ends by an error or an interrupt, none of it goes on.

    What waits is not begun, and programs that run are killed, where a pool alone would wait for them, be it for days. Threads
    that want to start another meanwhile get a ProgramError.
    """
    global _is_ending
    with ThreadPoolExecutor(number, name) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            with _reaping:
                _is_ending = True
                for process in _running:
                    process.kill()
            try:
                pool.shutdown(wait=True)
            finally:
                _is_ending = False
            raise


def _part(work: Callable[[Session, int, int], Result], part: int, parts: int, session: Session) -> Result:
    return work(session, part, parts)


def _name_of(work: Callable[..., Any]) -> str:
    """The name of a function that may be bound to arguments, which are no names and may be gigabytes."""
    while isinstance(work, partial):
        work = work.args[0] if work.func is _part else work.func
    return getattr(work, "__name__", type(work).__name__)


def _call(work: Callable[[Session], Any], session: Session, saying: Connection) -> None:
    _die_with_parent()

    def tell(stage: str, done: int, total: int, note: str) -> None:
        saying.send(("progress", (stage, done, total, note)))

    try:
        saying.send(("done", work(replace(session, listener=tell))))
    except Exception as error:
        saying.send(("failed", error))


@contextmanager
def _forked(target: Callable[..., None], arguments: tuple[Any, ...]) -> Iterator[tuple[ForkServerProcess, Connection]]:
    """A process that does not outlive the block: neither an interrupt from the UI nor a failed sibling leaves one behind."""
    context = _forkserver()
    said, saying = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, saying))
    with _reaping:
        if _is_ending:
            raise ProgramError("not begun, since the run is being ended")
        process.start()
        _running.add(process)
    saying.close()
    try:
        yield process, said
    finally:
        with _reaping:
            _running.discard(process)
        with _reaping:
            is_alive = process.is_alive()
        if is_alive:
            process.kill()  # Dagster ignores SIGTERM wherever interrupts are ignored, as below a shell's &, and so do its children
        _reap(process)
        said.close()


def _reap(process: ForkServerProcess) -> None:
    """Wait until a process has ended, and learn its exit code."""
    wait([process.sentinel])
    with _reaping:
        process.join()


def _become(module: str, spec_file: str, environment: dict[str, str], log_file: str, saying: Connection) -> None:
    """Become the program, in the forked process."""
    _die_with_parent()
    os.environ.update(environment)
    log = os.open(log_file, os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 2)
    # The first process reports. What others print, as nccl does, would fill a pipe that nobody reads, and then they would wait.
    os.dup2(saying.fileno() if environment.get("RANK", "0") == "0" else log, 1)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.exit(importlib.import_module(f"{module}.__main__").main(["--spec", spec_file]))


def _environments(threads: int, processes: int) -> list[dict[str, str]]:
    """The environment of each process of a program; those of several know each other by torchrun's variables."""
    shared = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if processes == 1:
        return [shared]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    # Loopback by name: a machine whose own name does not resolve has no other address for gloo to offer.
    meeting["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return [{**shared, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _follow(processes: Sequence[ForkServerProcess], said: Connection, progress: Progress, log_file: Path) -> str | None:
    """Listen until all have ended; return the report that was named. What else the first process prints goes to the log.

    Once one fails the others are ended too: they would wait for it, for hours where it never came to the meeting.
    """
    report, line = None, b""
    running: dict[object, ForkServerProcess] = {process.sentinel: process for process in processes}
    listening = [said]
    while running or listening:
        for ready in wait([*running, *listening]):  # pyright: ignore[reportArgumentType] # sentinels are ints
            if ready is said:
                heard = os.read(said.fileno(), 65536)
                *lines, line = (line + heard).split(b"\n")
                for one in lines:
                    report = _heard(one, progress, log_file) or report
                if not heard:
                    listening = []
                continue
            ended = running.pop(ready)
            _reap(ended)
            if ended.exitcode:
                for other in running.values():
                    other.kill()
    return report


def _heard(line: bytes, progress: Progress, log_file: Path) -> str | None:
    """Pass progress on; the path of the report where the line names it."""
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    if not isinstance(event, dict):  # a library that prints
        with log_file.open("ab") as log:
            log.write(line + b"\n")
        return None
    if "done" in event:
        progress(event["done"], event["total"], event.get("note", ""))
    return event.get("report")


def _die_with_parent() -> None:
    """End this process when its launcher dies, `kill -9` included, and on Linux when the process dies that it was forked from.

    The latter alone is not enough: it lives as long as what it has forked, and forks what it was asked for by a launcher that is dead.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    launcher = multiprocessing.parent_process()
    if launcher is not None:
        Thread(target=_end_with, args=(launcher.sentinel,), name="launcher", daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
