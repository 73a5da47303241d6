"""Short pieces of work done on an event loop's own thread, several in a row.

A picture of the usual size is decoded in about a millisecond. Handing it to another thread and back costs a tenth of that, and
the interpreter, whose data a decoded picture drives out of the caches, another tenth each time the two take turns.
"""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

_WAIT_S = 0.02  # a body that came alone is not kept longer: when connections are slow, nothing is gained by waiting


class Bursts:
    """Collects calls and makes them one after another: as soon as enough are there, or soon after the first.

    For one event loop, which does nothing else meanwhile.
    """

    def __init__(self, most_calls: int, most_weight: int) -> None:
        """Make an empty one.

        Args:
            most_calls: of a burst.
            most_weight: of a burst, in what `call` is given; one call may be over it.
        """
        self._most_calls = most_calls
        self._most_weight = most_weight
        self._weight = 0
        self._calls: list[tuple[asyncio.Future[Any], Callable[..., Any], tuple[Any, ...]]] = []
        self._timer: asyncio.TimerHandle | None = None

    async def call(self, weight: int, work: Callable[..., T], *arguments: Any) -> T:
        """What `work(*arguments)` returns or raises; not made if the waiting task is cancelled before."""
        loop = asyncio.get_running_loop()
        made: asyncio.Future[T] = loop.create_future()
        self._calls.append((made, work, arguments))
        self._weight += weight
        if len(self._calls) >= self._most_calls or self._weight >= self._most_weight:
            self._make()
        elif self._timer is None:
            self._timer = loop.call_later(_WAIT_S, self._make)
        return await made

    def _make(self) -> None:
        calls, self._calls, self._weight = self._calls, [], 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for made, work, arguments in calls:
            if made.done():  # cancelled
                continue
            try:
                made.set_result(work(*arguments))
            except Exception as error:
                made.set_exception(error)
