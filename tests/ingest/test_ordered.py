"""Results in order, bounded, from a loop on its own thread."""

import asyncio
import random
import threading
from collections.abc import Iterator

import pytest

from fourmill.ingest.event_loop import LoopThread
from fourmill.ingest.ordered import in_order


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    thread = LoopThread("ordered-test")
    yield thread
    thread.close()
    thread.close()
    assert not [one for one in threading.enumerate() if one.name == "ordered-test"]


@pytest.mark.parametrize("seed", range(5))
def test_results_come_in_the_order_of_the_rows(loop: LoopThread, seed: int) -> None:
    turns = random.Random(seed).choices(range(20), k=200)

    async def work(row: int) -> int:
        for _ in range(turns[row]):
            await asyncio.sleep(0)
        return row

    assert list(in_order(loop, range(200), work, lambda _: 1, most_running=16, most_waiting=20)) == list(range(200))


def test_no_more_run_at_once_than_may(loop: LoopThread) -> None:
    running, most = 0, 0

    async def work(row: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return row

    assert len(list(in_order(loop, range(100), work, lambda _: 0, most_running=7, most_waiting=1))) == 100
    assert most == 7


def test_a_slow_first_row_bounds_what_is_begun(loop: LoopThread) -> None:
    begun: list[int] = []
    first_may_end = threading.Event()

    async def work(row: int) -> int:
        begun.append(row)
        if row == 0:
            await asyncio.get_running_loop().run_in_executor(None, first_may_end.wait)
        if row == 3:  # the rows before it are done, the window is full
            asyncio.get_running_loop().call_later(0, first_may_end.set)
        return row

    results = in_order(loop, range(1000), work, lambda _: 10, most_running=2, most_waiting=30)
    assert next(results) == 0
    assert max(begun) <= 4  # three that wait, and one that had begun
    assert list(results) == list(range(1, 1000))


def test_the_caller_holds_the_work_back(loop: LoopThread) -> None:
    begun: list[int] = []

    async def work(row: int) -> int:
        begun.append(row)
        return row

    for taken, row in enumerate(in_order(loop, range(300), work, lambda _: 1, most_running=4, most_waiting=8)):
        assert row == taken
        assert len(begun) <= taken + 1 + 8 + 4


def test_an_error_reaches_the_caller_and_ends_the_rest(loop: LoopThread) -> None:
    cancelled = threading.Event()

    async def work(row: int) -> int:
        if row == 2:
            raise ValueError("row 2 is broken")
        if row > 2:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()
        return row

    got: list[int] = []
    with pytest.raises(ValueError, match="row 2 is broken"):
        for row in in_order(loop, range(50), work, lambda _: 1, most_running=8, most_waiting=100):
            got.append(row)
    assert got in ([], [0], [0, 1])
    assert cancelled.wait(180)


def test_a_caller_that_leaves_ends_the_work(loop: LoopThread) -> None:
    cancelled = threading.Event()

    async def work(row: int) -> int:
        if row:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()
        return row

    results = in_order(loop, range(50), work, lambda _: 1, most_running=8, most_waiting=100)
    assert next(results) == 0
    results.close()  # pyright: ignore[reportAttributeAccessIssue]  (a generator)
    assert cancelled.wait(180)


def test_a_loop_that_is_closed_says_so_to_who_waits() -> None:
    loop = LoopThread("closed-test")
    started = threading.Event()

    async def work(row: int) -> int:
        started.set()
        await asyncio.Event().wait()
        return row

    def close() -> None:
        started.wait(180)
        loop.close()

    closer = threading.Thread(target=close)
    closer.start()
    with pytest.raises(RuntimeError, match="closed while it made a shard"):
        list(in_order(loop, range(3), work, lambda _: 1, most_running=8, most_waiting=100))
    closer.join()
