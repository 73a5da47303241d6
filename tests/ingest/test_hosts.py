import asyncio
from collections import Counter

import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from fourmill.ingest.hosts import LocalHostLimits


def test_turns_are_handed_on_in_the_order_of_asking() -> None:
    async def run() -> list[int]:
        limits, order = LocalHostLimits(1), []

        async def one(number: int) -> None:
            await limits.acquire("a")
            order.append(number)
            await asyncio.sleep(0)
            limits.release("a")

        await asyncio.gather(*(one(number) for number in range(6)))
        return order

    assert uvloop.run(run()) == list(range(6))


def test_hosts_do_not_wait_for_each_other() -> None:
    async def run() -> None:
        limits = LocalHostLimits(1)
        await limits.acquire("a")
        await limits.acquire("b")
        blocked = asyncio.create_task(limits.acquire("a"))
        await asyncio.sleep(0)
        assert not blocked.done()
        limits.release("a")
        await blocked
        limits.release("a")
        limits.release("b")

    uvloop.run(run())


@settings(deadline=None)
@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 3), st.booleans()), max_size=20),
)
def test_the_limit_holds_and_no_turn_is_lost_whoever_gives_up(limit: int, visits: list[tuple[str, int, bool]]) -> None:
    async def run() -> None:
        limits = LocalHostLimits(limit)
        inside: Counter[str] = Counter()

        async def visit(host: str, ticks: int) -> None:
            await limits.acquire(host)
            try:
                inside[host] += 1
                assert inside[host] <= limit
                for _ in range(ticks):
                    await asyncio.sleep(0)
            finally:
                inside[host] -= 1
                limits.release(host)

        tasks = [asyncio.create_task(visit(host, ticks)) for host, ticks, _ in visits]
        await asyncio.sleep(0)
        for task, (_, ticks, gives_up) in zip(tasks, visits, strict=True):
            if gives_up:
                for _ in range(ticks):
                    await asyncio.sleep(0)
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for host in "ab":  # all turns are free again
            for _ in range(limit):
                await asyncio.wait_for(limits.acquire(host), 180)
            for _ in range(limit):
                limits.release(host)

    uvloop.run(run())
