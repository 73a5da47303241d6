"""Signals that come while Ray waits."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fourmill.runtime.interrupts import interruptible, sigterm_kept, uninterrupted

DEADLINE_S = 180


class RunEndedError(BaseException):
    """As Dagster's own: no Exception, so that no step takes it for its failure."""


@pytest.fixture
def ended_by_signal() -> Iterator[None]:
    """A signal that Ray itself leaves alone raises in the main thread."""

    def end(number: int, frame: Any) -> None:
        raise RunEndedError

    before = signal.signal(signal.SIGUSR1, end)
    yield
    signal.signal(signal.SIGUSR1, before)


def terminate_once_in(function: str) -> threading.Thread:
    """A thread that sends SIGUSR1 to this process when the main thread is in a function of Ray's."""
    main, tick = threading.main_thread().ident, threading.Event()

    def watch() -> None:
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            code = sys._current_frames()[main or 0].f_code
            if code.co_name == function and "ray" in code.co_filename:
                os.kill(os.getpid(), signal.SIGUSR1)
                return
            tick.wait(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.ray
def test_what_a_signal_raises_while_ray_waits_comes_out_as_itself(ray_session: None, ended_by_signal: None) -> None:
    import ray

    never = ray.remote(num_cpus=0)(_never).remote()
    thread = terminate_once_in("wait")
    with pytest.raises(RunEndedError):
        while True:
            with interruptible():
                ray.wait([never], timeout=2)
    thread.join()
    ray.cancel(never, force=True)


def _never() -> None:
    threading.Event().wait()


TWO_STAGES = """
import sys
import dagster as dg
from fourmill.core.shards import Recipe
from fourmill.core.work import ShardJob, no_progress
from fourmill.runtime.pool import run_shards
from fourmill.runtime.ray_session import RayConfig

def stage(name):
    @dg.asset(name=name)
    def hangs():
        job = ShardJob("train", 0, Recipe(stage="echo", code_version="1"), "run")
        root = f"{sys.argv[1]}/{name}"
        run_shards("echo_worker:EchoWorker", {"root": root, "hang": True}, [job], RayConfig(num_workers=1), no_progress)
    return hangs

sys.exit(0 if dg.materialize([stage("one"), stage("two")], raise_on_error=False).success else 1)
"""


@pytest.mark.ray
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_ended_does_not_go_on_with_the_next_stage(how: signal.Signals, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    heeds = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # ignored below a shell's background
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "data")}
    program = [sys.executable, "-c", heeds + TWO_STAGES, str(tmp_path)]
    driver = subprocess.Popen(program, env=environment, stderr=subprocess.DEVNULL)
    deadline, tick = time.monotonic() + DEADLINE_S, threading.Event()
    while not (begun := list(tmp_path.glob("*/hanging/*"))) and driver.poll() is None and time.monotonic() < deadline:
        tick.wait(0.1)
    assert len(begun) == 1
    driver.send_signal(how)
    assert driver.wait(DEADLINE_S) != 0
    assert list(tmp_path.glob("*/hanging/*")) == begun


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(SystemError, match="broken"), interruptible():
        raise SystemError("broken")
    with pytest.raises(SystemError), interruptible():
        raise SystemError("broken") from ValueError("a bug")


def test_a_second_interrupt_does_not_cut_an_end_short() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a shell's background
    try:
        _interrupt_twice()
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt_twice() -> None:
    ended: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
            ended.append("whole")
    assert ended == ["whole"]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_sigterm_while_ray_starts_does_what_it_would_have_done_otherwise() -> None:
    def end(number: int, frame: Any) -> None:
        raise RunEndedError

    before = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(RunEndedError), sigterm_kept():
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as Ray does
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is end
    finally:
        signal.signal(signal.SIGTERM, before)
