"""Work in threads, in bounded numbers: items ahead of who asks for them, samples gathered by size, results in order.

What meets in a batch depends on the samples alone, never on which thread was faster: the same shard gives the same batches.
"""

from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import Generic, TypeVar

T = TypeVar("T")
Made = TypeVar("Made")


class Threads:
    """Some threads for decoding and encoding, one or more for the network; kept over shards."""

    def __init__(self, num: int, networks: int = 1) -> None:
        """Start them.

        Args:
            networks: batches that the network may be asked about at a time; see `core.streams`.
        """
        self.num, self.networks = num, networks
        self.coders = ThreadPoolExecutor(num, thread_name_prefix="coder")
        self.network = ThreadPoolExecutor(networks, thread_name_prefix="network")

    def close(self) -> None:
        """End them; what waits is not begun any more."""
        self.coders.shutdown(cancel_futures=True)
        self.network.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Group(Generic[T]):
    """Items of one bucket, with their places in the stream that they came from."""

    bucket: Hashable
    places: tuple[int, ...]
    items: tuple[T, ...]


def ahead(threads: ThreadPoolExecutor, work: Callable[[T], Made], items: Iterable[T], num: int) -> Iterator[Made]:
    """Results of `work` in the order of the items; up to `num` items are begun before the first result is asked for."""
    under_way: deque[Future[Made]] = deque()
    try:
        for item in items:
            under_way.append(threads.submit(work, item))
            if len(under_way) >= num:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        for future in under_way:
            future.cancel()


@contextmanager
def drawn(items: Iterator[T], num: int) -> Generator[Iterator[T]]:
    """Items drawn by a thread of their own, so many before anybody asks: who makes them goes on while who takes them is busy.

    An error of theirs comes out in its place. At the end of the block the thread has ended, after the item it was at.
    """
    found: SimpleQueue[tuple[T] | BaseException | None] = SimpleQueue()  # None: there are no more
    room, is_over = Semaphore(num), Event()

    def draw() -> None:
        try:
            with closing(items) if isinstance(items, Generator) else nullcontext():
                while room.acquire() and not is_over.is_set():
                    found.put((next(items),))
        except StopIteration:
            found.put(None)
        except BaseException as error:
            found.put(error)

    def taken() -> Iterator[T]:
        while (got := found.get()) is not None:
            if isinstance(got, BaseException):
                raise got
            room.release()
            yield got[0]

    thread = Thread(target=draw, name="drawer")
    thread.start()
    try:
        yield taken()
    finally:
        is_over.set()
        room.release()
        thread.join()


def gather(
    items: Iterable[T],
    bucket_of: Callable[[T], Hashable],
    size: int,
    window: int,
    weight_of: Callable[[T], int] = lambda item: 0,
    most_weight: int = 0,
) -> Iterator[Group[T]]:
    """Groups of items of one bucket: of `size`, and smaller ones where the window is full or the stream ends.

    Args:
        window: items that may wait for others of their bucket. When as many wait, the group of the oldest goes as it is.
        weight_of: what an item costs while it waits, in any unit.
        most_weight: bound on the sum of that; 0 for none.
    """
    waiting: dict[Hashable, list[tuple[int, T]]] = {}  # the bucket of the oldest item first
    num, weight = 0, 0
    for place, item in enumerate(items):
        bucket = bucket_of(item)
        waiting.setdefault(bucket, []).append((place, item))
        num, weight = num + 1, weight + weight_of(item)
        ready = bucket if len(waiting[bucket]) == size else None
        while ready is not None or num >= window or (most_weight and weight > most_weight):
            chosen = ready if ready is not None else next(iter(waiting))
            group = _group(chosen, waiting.pop(chosen))
            num, weight = num - len(group.items), weight - sum(map(weight_of, group.items))
            yield group
            ready = None
            if not num:
                break
    for bucket, members in waiting.items():
        yield _group(bucket, members)


def in_order(made: Iterable[tuple[int, Future[Made]]], most_unread: int) -> Iterator[Made]:
    """Results by their places 0, 1, 2..., whatever order they were begun in.

    Results that are there are handed on; an unfinished one is waited for only when more than `most_unread` have been begun.
    """
    begun: dict[int, Future[Made]] = {}
    place = 0
    try:
        for index, future in made:
            begun[index] = future
            while place in begun and (begun[place].done() or len(begun) > most_unread):
                yield begun.pop(place).result()
                place += 1
        while place in begun:
            yield begun.pop(place).result()
            place += 1
    finally:
        for future in begun.values():
            future.cancel()


def _group(bucket: Hashable, members: list[tuple[int, T]]) -> Group[T]:
    places, items = zip(*members, strict=True)
    return Group(bucket, places, items)
