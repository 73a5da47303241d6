"""Threads in bounded numbers: results in order, groups of one bucket, the same groups whatever the threads do."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourmill.core.flow import Threads, ahead, drawn, gather, in_order

DEADLINE_S = 180

ITEMS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=40)  # (bucket, weight)


@pytest.fixture(scope="module")
def threads() -> Iterator[Threads]:
    made = Threads(3)
    yield made
    made.close()


@settings(max_examples=50, deadline=None)
@given(items=ITEMS, size=st.integers(1, 5), window=st.integers(1, 12), most=st.integers(0, 20))
def test_every_item_is_in_one_group_of_its_bucket(
    items: list[tuple[int, int]], size: int, window: int, most: int
) -> None:
    groups = list(gather(items, lambda item: item[0], size, window, lambda item: item[1], most))
    assert sorted(place for group in groups for place in group.places) == list(range(len(items)))
    for group in groups:
        assert 0 < len(group.items) <= size and group.places == tuple(sorted(group.places))
        assert group.items == tuple(items[place] for place in group.places)
        assert {bucket for bucket, _ in group.items} == {group.bucket}


@settings(max_examples=50, deadline=None)
@given(items=ITEMS, size=st.integers(1, 5), window=st.integers(1, 12), most=st.integers(6, 20))
def test_what_waits_is_bounded(items: list[tuple[int, int]], size: int, window: int, most: int) -> None:
    taken: list[tuple[int, int]] = []

    def stream() -> Iterator[tuple[int, int]]:
        for item in items:
            taken.append(item)
            yield item

    out = 0
    for group in gather(stream(), lambda item: item[0], size, window, lambda item: item[1], most):
        out += len(group.items)
        waiting = len(taken) - out
        assert waiting < max(window, 1) or len(taken) == len(items)


def test_groups_fill_up_across_other_sizes_in_between() -> None:
    groups = list(gather("aabaabbb", lambda item: item, 4, 100))
    assert [(group.bucket, group.places) for group in groups] == [("a", (0, 1, 3, 4)), ("b", (2, 5, 6, 7))]


def test_a_full_window_lets_the_oldest_go() -> None:
    groups = list(gather("abcd", lambda item: item, 4, 3))
    assert [group.bucket for group in groups] == ["a", "b", "c", "d"]
    assert [g.items for g in gather("aab", lambda item: item, 4, 9, lambda item: 2, 5)] == [("a", "a"), ("b",)]


def test_work_is_begun_ahead_and_no_further(threads: Threads) -> None:
    begun: list[int] = []

    def items() -> Iterator[int]:
        for i in range(10):
            begun.append(i)
            yield i

    results = ahead(threads.coders, lambda i: i * i, items(), num=3)
    assert begun == []
    assert next(results) == 0 and begun == [0, 1, 2]
    assert list(results) == [i * i for i in range(1, 10)]


def test_an_error_arrives_where_its_result_was_due(threads: Threads) -> None:
    results = ahead(threads.coders, lambda i: 10 // (i - 2), iter(range(5)), num=4)
    assert [next(results), next(results)] == [-5, -10]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_results_keep_their_order_whoever_is_first(threads: Threads) -> None:
    gate = threading.Event()

    def made() -> Iterator[tuple[int, Future[int]]]:
        yield 1, threads.coders.submit(lambda: 1)
        yield 0, threads.coders.submit(lambda: gate.wait(60) and 0)
        yield 2, threads.coders.submit(lambda: 2)
        gate.set()

    assert list(in_order(made(), most_unread=5)) == [0, 1, 2]


def test_what_is_drawn_ahead_is_made_while_nobody_asks() -> None:
    begun, enough = list[int](), threading.Event()

    def items() -> Iterator[int]:
        for i in range(6):
            begun.append(i)
            if i == 3:
                enough.set()
            yield i

    with drawn(items(), 4) as found:
        assert enough.wait(DEADLINE_S) and begun == [0, 1, 2, 3]
        assert list(found) == [0, 1, 2, 3, 4, 5]


def test_an_error_of_what_is_drawn_comes_after_what_was_made_before() -> None:
    with drawn((10 // (i - 2) for i in range(5)), 9) as found:
        assert [next(found), next(found)] == [-5, -10]
        with pytest.raises(ZeroDivisionError):
            next(found)


def test_what_is_drawn_is_closed_when_its_taker_leaves() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    with pytest.raises(OSError, match="full"), drawn(items(), 2) as found:
        assert next(found) == 1
        raise OSError("the disk is full")
    assert closed.is_set() and not [one for one in threading.enumerate() if one.name == "drawer"]
