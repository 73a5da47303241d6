"""Calls made in bursts on the loop's own thread."""

import asyncio
import threading

import pytest
import uvloop

from fourmill.ingest.bursts import Bursts


def test_calls_wait_for_each_other_and_are_made_in_a_row() -> None:
    made: list[int] = []

    async def all_of() -> list[int]:
        bursts = Bursts(most_calls=4, most_weight=1000)

        async def one(number: int) -> int:
            before = list(made)
            await bursts.call(1, made.append, number)
            assert len(before) % 4 == 0  # no call was made between those of a burst
            return number

        return await asyncio.gather(*map(one, range(12)))

    assert uvloop.run(all_of()) == list(range(12))
    assert made == list(range(12))


def test_heavy_calls_are_not_collected() -> None:
    async def all_of() -> None:
        bursts = Bursts(most_calls=1000, most_weight=10)
        first = asyncio.ensure_future(bursts.call(4, threading.get_ident))
        await asyncio.sleep(0)
        assert not first.done()
        assert await bursts.call(6, threading.get_ident) == threading.get_ident()
        assert await first == threading.get_ident()

    uvloop.run(all_of())


def test_one_alone_is_made_soon() -> None:
    async def alone() -> str:
        bursts = Bursts(most_calls=1000, most_weight=1000)
        return await bursts.call(1, "".join, ["o", "n"]) + await bursts.call(1, str, "e")

    assert uvloop.run(asyncio.wait_for(alone(), 180)) == "one"


def test_an_error_is_its_own_call_s() -> None:
    async def three() -> list[object]:
        bursts = Bursts(most_calls=3, most_weight=1000)
        calls = [bursts.call(1, int, given) for given in ("1", "two", "3")]
        return await asyncio.gather(*calls, return_exceptions=True)

    first, second, third = uvloop.run(three())
    assert (first, third) == (1, 3)
    assert isinstance(second, ValueError)


@pytest.mark.parametrize("cancelled", [0, 1])
def test_a_cancelled_call_is_not_made_and_the_others_are(cancelled: int) -> None:
    made: list[int] = []

    async def two() -> None:
        bursts = Bursts(most_calls=3, most_weight=1000)
        tasks = [asyncio.ensure_future(bursts.call(1, made.append, number)) for number in range(2)]
        await asyncio.sleep(0)
        tasks[cancelled].cancel()
        await bursts.call(1, made.append, 2)
        await asyncio.gather(*tasks, return_exceptions=True)

    uvloop.run(two())
    assert made == [1 - cancelled, 2]
