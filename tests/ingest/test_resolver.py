import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable

import pytest
import uvloop

from fourmill.ingest.addresses import AddressPolicy, RefusedAddressError
from fourmill.ingest.resolver import CheckedResolver


class Names:
    """A name server that says what it is told to, and counts who asks."""

    def __init__(self, *answers: list[str] | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    def __call__(self, host: str) -> list[str]:
        self.asked.append(host)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(work: Callable[[CheckedResolver, Clock], Awaitable[None]], names: Callable[[str], list[str]], **kw) -> None:
    async def whole() -> None:
        clock = Clock()
        resolver = CheckedResolver(AddressPolicy(()), {}, names, clock=clock, **kw)
        try:
            await work(resolver, clock)
        finally:
            await resolver.close()

    uvloop.run(whole())


async def hosts(resolver: CheckedResolver, host: str) -> list[str]:
    return [one["host"] for one in await resolver.resolve(host, 80)]


def test_an_answer_is_kept_for_its_time_whatever_the_case_of_the_name() -> None:
    names = Names(["8.8.8.8"], ["1.1.1.1"])

    async def work(resolver: CheckedResolver, clock: Clock) -> None:
        assert not resolver.knows("a.test")
        assert await hosts(resolver, "a.test") == await hosts(resolver, "A.test.") == ["8.8.8.8"]
        assert resolver.knows("a.test") and len(names.asked) == 1
        clock.now = 301
        assert not resolver.knows("a.test")
        assert await hosts(resolver, "a.test") == ["1.1.1.1"]

    run(work, names)


def test_a_name_that_turns_to_an_inner_address_is_refused_when_it_is_asked_anew() -> None:
    names = Names(["8.8.8.8"], ["127.0.0.1"])

    async def work(resolver: CheckedResolver, clock: Clock) -> None:
        assert await hosts(resolver, "rebinding.test") == ["8.8.8.8"]
        assert await hosts(resolver, "rebinding.test") == ["8.8.8.8"]  # what was checked, not what the name says now
        clock.now = 301
        for _ in range(2):
            with pytest.raises(RefusedAddressError, match=r"127\.0\.0\.1"):
                await hosts(resolver, "rebinding.test")
            assert not resolver.knows("rebinding.test")

    run(work, names)


def test_a_dead_name_is_asked_for_once_in_a_while() -> None:
    names = Names(socket.gaierror(socket.EAI_NONAME, "Name or service not known"), ["8.8.8.8"])

    async def work(resolver: CheckedResolver, clock: Clock) -> None:
        for _ in range(3):
            with pytest.raises(socket.gaierror, match="not known"):
                await hosts(resolver, "gone.test")
        assert len(names.asked) == 1
        clock.now = 31
        assert await hosts(resolver, "gone.test") == ["8.8.8.8"]

    run(work, names)


def test_a_name_server_that_does_not_answer_may_the_next_time() -> None:
    names = Names(socket.gaierror(socket.EAI_AGAIN, "Temporary failure"), ["8.8.8.8"])

    async def work(resolver: CheckedResolver, clock: Clock) -> None:
        with pytest.raises(socket.gaierror, match="Temporary"):
            await hosts(resolver, "a.test")
        assert await hosts(resolver, "a.test") == ["8.8.8.8"]

    run(work, names)


def test_those_who_ask_together_share_one_lookup_and_one_may_leave() -> None:
    go, asked = threading.Event(), []

    def slow(host: str) -> list[str]:
        asked.append(host)
        assert go.wait(180)
        return ["8.8.8.8"]

    async def work(resolver: CheckedResolver, clock: Clock) -> None:
        tasks = [asyncio.create_task(hosts(resolver, "a.test")) for _ in range(5)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        go.set()
        got = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(got[0], asyncio.CancelledError) and got[1:] == [["8.8.8.8"]] * 4
        assert asked == ["a.test"]

    run(work, slow)


def test_a_lookup_that_hangs_ends_for_those_who_wait_but_keeps_its_thread() -> None:
    go, inside, most, lock = threading.Event(), 0, 0, threading.Lock()

    def hangs(host: str) -> list[str]:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        if host != "fine.test":
            assert go.wait(180)
        with lock:
            inside -= 1
        return ["8.8.8.8"]

    async def work(resolver: CheckedResolver, clock: Clock) -> None:
        with pytest.raises(TimeoutError, match=r"slow\.test was not resolved within 0.5 s"):
            await hosts(resolver, "slow.test")
        waiting = asyncio.create_task(hosts(resolver, "fine.test"))  # its time begins with its turn
        await asyncio.sleep(0)
        assert not waiting.done()
        go.set()
        assert await waiting == ["8.8.8.8"]
        assert most == 1

    run(work, hangs, lookups=1, timeout_s=0.5)


def test_the_cache_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fourmill.ingest.resolver._MOST_HOSTS", 3)

    async def work(resolver: CheckedResolver, clock: Clock) -> None:
        for number in range(5):
            await hosts(resolver, f"h{number}.test")
        assert [resolver.knows(f"h{number}.test") for number in range(5)] == [False, False, True, True, True]

    run(work, Names(["8.8.8.8"]))


def test_only_public_addresses_of_a_name_are_answered() -> None:
    async def work(resolver: CheckedResolver, clock: Clock) -> None:
        assert await hosts(resolver, "mixed.test") == ["8.8.8.8"]

    run(work, Names(["10.0.0.1", "8.8.8.8", "::1"]))


def test_addresses_are_checked_without_being_looked_up() -> None:
    names = Names(["8.8.8.8"])

    async def work(resolver: CheckedResolver, clock: Clock) -> None:
        assert await hosts(resolver, "1.1.1.1") == ["1.1.1.1"]
        assert await hosts(resolver, "2606:4700::1111") == ["2606:4700::1111"]
        for inner in ("127.0.0.1", "::1", "127.1", "169.254.169.254"):
            with pytest.raises(RefusedAddressError):
                await hosts(resolver, inner)
        with pytest.raises(RefusedAddressError, match=r"port 22 of a\.test is not among \[80, 443\]"):
            await resolver.resolve("a.test", 22)
        assert not names.asked

    run(work, names)


def test_connect_to_needs_host_and_port() -> None:
    async def resolve(port: int) -> list[tuple[str, int]]:
        resolver = CheckedResolver(AddressPolicy(()), {"A.test:80": "127.0.0.1:5000"}, lambda host: ["127.0.0.1"])
        try:
            return [(one["host"], one["port"]) for one in await resolver.resolve("a.test", port)]
        finally:
            await resolver.close()

    assert uvloop.run(resolve(80)) == [("127.0.0.1", 5000)]
    with pytest.raises(RefusedAddressError):
        uvloop.run(resolve(443))
