"""Several workers, each with its own leases, on one book in one event loop."""

import asyncio
from collections import Counter

import pytest
import uvloop

from fourmill.ingest.host_leases import Grants, LeaseBook
from fourmill.ingest.leased_hosts import HostLimitsError, LeasedHostLimits


class Watched:
    """A book with a count of reports and of hosts in them."""

    def __init__(self, book: LeaseBook | None = None) -> None:
        self.book = book or LeaseBook(turn_s=0)
        self.reports: list[dict[str, tuple[int, int]]] = []

    async def sync(self, worker: str, limit: int, claims: dict[str, tuple[int, int]]) -> Grants:
        await asyncio.sleep(0)
        self.reports.append(claims)
        return self.book.sync(worker, limit, claims)


async def at_once(seconds: float) -> None:
    await asyncio.sleep(0)


async def later(seconds: float) -> None:
    for _ in range(50):
        await asyncio.sleep(0)


def limits(watched: Watched, limit: int, **options: object) -> LeasedHostLimits:
    return LeasedHostLimits(watched.sync, limit, **{"pause": at_once, **options})  # pyright: ignore[reportArgumentType]


async def visit(made: LeasedHostLimits, host: str, inside: Counter[str], most: Counter[str]) -> None:
    await made.acquire(host)
    inside[host] += 1
    most[host] = max(most[host], inside[host])
    for _ in range(3):
        await asyncio.sleep(0)
    inside[host] -= 1
    made.release(host)


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_all_are_served_within_the_limit_of_all_workers(num_workers: int) -> None:
    async def run() -> None:
        watched, inside, most = Watched(), Counter(), Counter()
        workers = [limits(watched, 2) for _ in range(num_workers)]
        hosts = ["busy"] * 60 + [f"h{number}" for number in range(40)]
        await asyncio.wait_for(
            asyncio.gather(*(visit(worker, host, inside, most) for worker in workers for host in hosts)), 180
        )
        assert most["busy"] == 2 and max(most.values()) <= 2 and not +inside
        for worker in workers:
            await worker.close()
        assert not any(watched.book.held(host) for host in hosts)

    uvloop.run(run())


def test_one_report_asks_for_many_hosts_and_a_turn_serves_many_urls() -> None:
    async def run() -> int:
        watched = Watched()
        made = limits(watched, 2, pause=later)
        hosts = [f"h{number}" for number in range(100)] + ["busy"] * 200
        await asyncio.gather(*(visit(made, host, Counter(), Counter()) for host in hosts))
        assert len(watched.reports[0]) == 101
        await made.close()
        return len(watched.reports)

    assert uvloop.run(run()) < 50


def test_no_more_turns_are_leased_ahead_than_may_be_used() -> None:
    async def run() -> None:
        watched = Watched()
        made = limits(watched, 2, most=10)
        hosts = [f"h{number}" for number in range(500)]
        await asyncio.wait_for(asyncio.gather(*(visit(made, host, Counter(), Counter()) for host in hosts)), 180)
        assert max(sum(map(sum, report.values())) for report in watched.reports) <= 10
        await made.close()

    uvloop.run(run())


def test_hosts_that_others_hold_do_not_keep_free_ones_from_being_leased() -> None:
    async def run() -> None:
        watched = Watched(LeaseBook())
        taken = [f"taken{number}" for number in range(30)]
        watched.book.sync("other", 1, dict.fromkeys(taken, (0, 1)))
        made = limits(watched, 1, most=4)
        waiting = [asyncio.create_task(made.acquire(host)) for host in taken]
        await asyncio.wait_for(asyncio.gather(*(visit(made, f"free{n}", Counter(), Counter()) for n in range(50))), 180)
        assert not any(task.done() for task in waiting)
        watched.book.sync("other", 1, {})
        await asyncio.wait_for(asyncio.gather(*waiting), 180)
        await made.close()

    uvloop.run(run())


def test_idle_turns_go_back_and_reports_end_when_nothing_is_left() -> None:
    async def run() -> None:
        watched = Watched()
        made = limits(watched, 2)
        await made.acquire("a")
        made.release("a")
        assert made._task
        await asyncio.wait_for(made._task, 180)
        assert watched.reports[-1] == {} and watched.book.held("a") == 0
        await visit(made, "a", Counter(), Counter())  # and it begins anew
        await made.close()

    uvloop.run(run())


def test_who_gives_up_waiting_leaves_no_turn_behind() -> None:
    async def run() -> None:
        watched = Watched(LeaseBook())
        watched.book.sync("other", 1, {"a": (0, 1)})
        made = limits(watched, 1)
        waiter = asyncio.create_task(made.acquire("a"))
        while not watched.reports:
            await asyncio.sleep(0)
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)
        watched.book.sync("other", 1, {})
        assert made._task
        await asyncio.wait_for(made._task, 180)
        assert watched.book.held("a") == 0
        await made.close()

    uvloop.run(run())


def test_a_lost_keeper_stops_new_requests_and_in_the_end_says_so() -> None:
    async def run() -> None:
        now = 0.0

        async def lost(worker: str, limit: int, claims: dict[str, tuple[int, int]]) -> Grants:
            raise ConnectionError("the keeper is gone")

        async def pause(seconds: float) -> None:
            nonlocal now
            now += 1
            await asyncio.sleep(0)

        made = LeasedHostLimits(lost, 2, lease_s=5, give_up_s=20, pause=pause, clock=lambda: now)
        with pytest.raises(HostLimitsError, match=r"not answered for 2\d s .*keeper is gone.*Ray's head node"):
            await made.acquire("a")
        await made.close()

    uvloop.run(run())


def test_without_answers_a_lease_is_used_no_longer_than_it_lasts() -> None:
    async def run() -> None:
        now, is_lost = 0.0, False
        book = LeaseBook(lease_s=5, clock=lambda: now)

        async def sync(worker: str, limit: int, claims: dict[str, tuple[int, int]]) -> Grants:
            if is_lost:
                raise ConnectionError
            return book.sync(worker, limit, claims)

        async def pause(seconds: float) -> None:
            nonlocal now
            now += 1
            await asyncio.sleep(0)

        made = LeasedHostLimits(sync, 1, lease_s=5, give_up_s=1e9, pause=pause, clock=lambda: now)
        await made.acquire("a")
        is_lost = True
        while now < 7:
            await asyncio.sleep(0)
        made.release("a")
        waiting = asyncio.create_task(made.acquire("a"))
        while now < 20:
            await asyncio.sleep(0)
        assert not waiting.done()
        is_lost = False
        await asyncio.wait_for(waiting, 180)
        await made.close()

    uvloop.run(run())
