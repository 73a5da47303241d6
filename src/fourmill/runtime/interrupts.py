"""What ends a run comes through Ray's calls as itself."""

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
