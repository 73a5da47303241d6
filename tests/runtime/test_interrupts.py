"""Signals that come while Ray waits."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from fourmill.runtime.interrupts import interruptible

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


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(SystemError, match="broken"), interruptible():
        raise SystemError("broken")
    with pytest.raises(SystemError), interruptible():
        raise SystemError("broken") from ValueError("a bug")
