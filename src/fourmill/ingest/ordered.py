"""Many rows at work at once on an event loop, their results handed over in order, with a bound on what waits."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Generic, TypeVar

from fourmill.ingest.event_loop import LoopThread

R = TypeVar("R")
T = TypeVar("T")


def in_order(
    loop: LoopThread,
    rows: Sequence[R],
    work: Callable[[R], Awaitable[T]],
    weigh: Callable[[T], int],
    most_running: int,
    most_waiting: int,
) -> Iterator[T]:
    """Yield `work(row)` for every row, in the order of the rows, in the calling thread.

    A row that takes long lets those after it finish, until their results weigh too much; then no further row begins
    before it is done. An iterator that is dropped half-way cancels what runs.

    Args:
        weigh: what a result counts while it waits for its turn, in bytes.
        most_running: rows at work at once.
        most_waiting: weight of the results that wait at which no further row begins; `most_running` may come on top.

    Raises:
        Exception: the first that `work` raised.
    """
    stream = _Stream(loop, rows, work, weigh, most_running, most_waiting)
    running = loop.submit(stream.run())
    try:
        for _ in rows:
            yield stream.take()
    finally:
        running.cancel()


class _Failed:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class _Stream(Generic[R, T]):
    def __init__(
        self,
        loop: LoopThread,
        rows: Sequence[R],
        work: Callable[[R], Awaitable[T]],
        weigh: Callable[[T], int],
        most_running: int,
        most_waiting: int,
    ) -> None:
        self._loop = loop.loop
        self._rows = rows
        self._work = work
        self._weigh = weigh
        self._most_running = most_running
        self._most_waiting = most_waiting
        self._running = 0
        self._early: dict[int, T] = {}  # results whose turn has not come
        self._turn = 0
        self._in_turn: list[T] = []  # to be handed over when the loop has done what it is at: waking a thread costs
        self._ready: SimpleQueue[list[T] | _Failed] = SimpleQueue()
        self._taken: list[T] = []  # from the queue, the last first
        self._finished_weight = 0  # written by the loop's thread only
        self._taken_weight = 0  # written by the calling thread only
        self._room = asyncio.Event()
        self._wants_room = False

    def take(self) -> T:
        """The next result, in the calling thread."""
        if not self._taken:
            results = self._ready.get()
            if isinstance(results, _Failed):
                raise results.error
            self._taken = results[::-1]
        result = self._taken.pop()
        self._taken_weight += self._weigh(result)
        if self._wants_room:
            self._loop.call_soon_threadsafe(self._room.set)
        return result

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for index, row in enumerate(self._rows):
                    await self._wait_for_room()
                    self._running += 1
                    group.create_task(self._one(index, row))
        except BaseExceptionGroup as errors:
            self._ready.put(_Failed(errors.exceptions[0]))
        except asyncio.CancelledError as error:  # the loop is being closed under the caller
            self._ready.put(_Failed(RuntimeError("the worker was closed while it made a shard")))
            raise error

    async def _wait_for_room(self) -> None:
        while True:
            self._room.clear()
            self._wants_room = True  # while the weights are looked at, so that a wake-up is not missed
            too_heavy = self._finished_weight - self._taken_weight >= self._most_waiting
            self._wants_room = too_heavy
            if self._running < self._most_running and not too_heavy:
                return
            await self._room.wait()

    async def _one(self, index: int, row: R) -> None:
        result = await self._work(row)
        self._running -= 1
        self._finished_weight += self._weigh(result)
        self._early[index] = result
        if self._turn in self._early and not self._in_turn:
            self._loop.call_soon(self._hand_over)
        while self._turn in self._early:
            self._in_turn.append(self._early.pop(self._turn))
            self._turn += 1
        self._room.set()

    def _hand_over(self) -> None:
        self._ready.put(self._in_turn)
        self._in_turn = []
