"""Programs that share a training and end together."""

import importlib
import os
import signal
import subprocess
import sys
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import pytest
from pydantic import BaseModel

from fourmill.core.work import no_progress
from fourmill.pipelines.profiles import smallest
from fourmill.runtime.launch import ProgramError, run_program, run_warm, run_warm_parts
from fourmill.runtime.models import ModelRef
from fourmill.runtime.session import Session
from fourmill.runtime.training import train_several

_LONELY = """
import os
import signal
import subprocess
import sys
import threading

def main(arguments):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a child of Dagster's where interrupts are ignored
    if os.environ["RANK"] == "1":
        print("no such device", file=__import__("sys").stderr)
        return 3
    threading.Event().wait()
"""

_CHATTY = """
import sys

def main(arguments):
    print("a library says hello")
    print("17")
    print('{"done": 1, "total": 2, "note": "half"}')
    sys.stdout.write('{"report": "models/')
    sys.stdout.flush()
    print('x/report.json"}')
    return 0
"""


_NOISY = """
import os

def main(arguments):
    if os.environ["RANK"] == "1":
        print("NCCL INFO " * 20_000)
    else:
        print('{"report": "models/x/report.json"}')
    return 0
"""


_WAITING = """
import threading

def main(arguments):
    print('{"done": 1, "total": 2, "note": "begun"}', flush=True)
    threading.Event().wait()
"""


_LASTING = """
import os, threading, ctypes

def last(session):
    ctypes.CDLL(None).prctl(1, 0)  # as where no kernel ends what a dead process has forked
    session.progress("pid")(os.getpid(), 0, "")
    threading.Event().wait()
"""


_LAUNCHING = """
import sys
from pathlib import Path
from fourmill.pipelines.profiles import smallest
from fourmill.runtime import launch
from fourmill.runtime.session import Session
import lasting

launch._PRELOAD.clear()
tell = lambda stage, pid, total, note: print(pid, flush=True)
launch.run_warm(lasting.last, Session(smallest(Path(sys.argv[1])), listener=tell))
"""


_PACKING = """
def pack(session):
    progress = session.progress("tokenizers/train_set")
    for done in (1, 2):
        progress(done, 2, "samples")
    return "packed"
"""
_FATAL = """
import os

def generate(arrays, session, part, parts):
    os._exit(9)
"""


class Nothing(BaseModel):
    """A spec without settings."""


def _program(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch, file: str = "__main__.py") -> str:
    (folder / name).mkdir()
    (folder / name / file).write_text(text)
    monkeypatch.syspath_prepend(folder)
    return name


def test_a_process_that_fails_ends_those_that_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _program(tmp_path, "lonely", _LONELY, monkeypatch)
    with pytest.raises(ProgramError, match=r"(?s)ended with code 3.*no such device"):
        run_program(module, Nothing(), tmp_path / "log", 1, no_progress, processes=2)


def test_what_other_processes_print_is_in_the_log_and_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = _program(tmp_path, "noisy", _NOISY, monkeypatch)
    report = run_program(module, Nothing(), tmp_path / "log", 1, no_progress, processes=2)
    assert report == "models/x/report.json"
    assert (tmp_path / "log" / "log.txt").read_text().count("NCCL INFO") == 20_000


def test_lines_that_are_no_events_are_passed_over_to_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _program(tmp_path, "chatty", _CHATTY, monkeypatch)
    heard: list[tuple[int, int, str]] = []
    report = run_program(module, Nothing(), tmp_path / "log", 1, lambda *event: heard.append(event))
    assert report == "models/x/report.json"
    assert heard == [(1, 2, "half")]
    assert (tmp_path / "log" / "log.txt").read_text() == "a library says hello\n17\n"


def test_a_function_whose_process_dies_is_named_and_not_its_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(_program(tmp_path, "fatal", _FATAL, monkeypatch, "__init__.py"))
    with pytest.raises(ProgramError, match=r"^generate ended with code 9 before it was done$"):
        run_warm_parts(partial(module.generate, ["of", "a gigabyte"]), Session(smallest(tmp_path)), 2)


def test_what_a_function_tells_of_its_progress_is_heard_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(_program(tmp_path, "packing", _PACKING, monkeypatch, "__init__.py"))
    heard: list[tuple[str, int, int, str]] = []
    session = Session(smallest(tmp_path), listener=lambda *event: heard.append(event))
    assert run_warm(module.pack, session) == "packed"
    assert heard == [("tokenizers/train_set", done, 2, "samples") for done in (1, 2)]


def test_an_interrupt_ends_the_programs_that_run_and_begins_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, chatty = (
        _program(tmp_path, name, text, monkeypatch) for name, text in (("waiting", _WAITING), ("chatty", _CHATTY))
    )

    def interrupt(done: int, total: int, note: str) -> None:
        assert note == "begun"
        os.kill(os.getpid(), signal.SIGINT)  # taken by the main thread

    def run(name: str) -> Any:
        return run_program(waiting, Nothing(), tmp_path / name, 1, interrupt)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a shell's background
    try:
        with pytest.raises(KeyboardInterrupt):
            list(train_several({name: partial(run, name) for name in ("first", "second")}, 1))
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "first").exists() and not (tmp_path / "second").exists()
    assert run_program(chatty, Nothing(), tmp_path / "later", 1, no_progress) == "models/x/report.json"


def test_trainings_end_when_nobody_asks_for_them_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _program(tmp_path, "waiting", _WAITING, monkeypatch)
    begun = Event()
    ref = ModelRef(name="done", digest="", path="", report={})

    def wait_forever() -> Any:
        return run_program(module, Nothing(), tmp_path / "log", 1, lambda *event: begun.set())

    trained = train_several({"done": lambda: ref, "waiting": wait_forever}, 2)
    assert next(trained)[:2] == ("done", ref)
    assert begun.wait(180)
    trained.close()  # type: ignore[attr-defined] # an error between two of them does the same; it would wait without end


def test_a_program_that_starts_while_another_is_reaped_leaves_it_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start reaps all that have ended: where two read one's exit code, the second takes 255 for it."""
    module = _program(tmp_path, "chatty", _CHATTY, monkeypatch)
    real, reads = forkserver.read_signed, 0
    reports: list[str] = []
    other = Thread(
        target=lambda: reports.append(run_program(module, Nothing(), tmp_path / "other", 1, no_progress)), daemon=True
    )

    def read(fd: int) -> int:
        nonlocal reads
        reads += 1
        if reads == 2:  # of the first program: its process number, then its exit code
            other.start()
            other.join(1)  # time enough to start, if it may
        return real(fd)

    monkeypatch.setattr(forkserver, "read_signed", read)
    assert run_program(module, Nothing(), tmp_path / "log", 1, no_progress) == "models/x/report.json"
    other.join()
    assert reports == ["models/x/report.json"]


def test_what_is_forked_ends_with_who_asked_for_it(tmp_path: Path) -> None:
    """By `kill -9` too, and although the process that it was forked from lives on."""
    (tmp_path / "lasting.py").write_text(_LASTING)
    command = [sys.executable, "-c", _LAUNCHING, str(tmp_path / "out")]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with subprocess.Popen(command, env=paths, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        forked = psutil.Process(int(launcher.stdout.readline()))
        launcher.kill()
    assert not psutil.wait_procs([forked], timeout=180)[1]
