"""Signals around Ray's calls: what ends a run comes through them as itself, and what ends Ray is not ended."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interruptible() -> Iterator[None]:
    """Around calls into Ray that wait for a limited time.

    While it waits, Ray's core lets Python handle signals, and knows of KeyboardInterrupt alone. What else a handler raises, as
    Dagster's does when a run is ended, comes out when the time is up, as the cause of a SystemError; a step that ends with that
    has failed, and the run would go on with the next one.
    """
    try:
        yield
    except SystemError as error:
        cause = error.__cause__
        if cause is not None and not isinstance(cause, Exception):
            raise cause from None
        raise


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """Around Ray's start, which makes SIGTERM end the program by SystemExit; a step of Dagster's would take that for its failure.

    Where somebody, such as Dagster, has said before what SIGTERM does, that holds again afterwards, and is done for a SIGTERM that
    came meanwhile.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        if callable(before):
            before(signal.SIGTERM, None)
        raise
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Around an end that must not be left half done: a second Ctrl-C is not heeded, where this thread can say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)
