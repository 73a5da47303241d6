"""Retry-After: what a server asks for holds for its host, and what it asks too much for is left to a top-up."""

import asyncio
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
import uvloop

from fourmill.ingest.config import IngestConfig
from fourmill.ingest.download import Downloader, Fetched
from fourmill.ingest.hosts import HostPauses
from fourmill.ingest.statuses import may_pass


class Time:
    """A clock that goes on only while somebody waits."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waits: list[float] = []

    def clock(self) -> float:
        return self.now

    async def wait(self, seconds: float) -> None:
        """All who wait begin before the first of them is done, as their sleeps would."""
        end = self.now + seconds
        self.waits.append(seconds)
        for _ in range(20):
            await asyncio.sleep(0)
        self.now = max(self.now, end)

    def downloader(self, config: IngestConfig, connect_to: dict[str, str]) -> Downloader:
        return Downloader(config, connect_to, wait=self.wait, clock=self.clock)


def fetch(time: Time, config: IngestConfig, site, *urls: str) -> list[Fetched]:
    """One after another, by one downloader."""

    async def run() -> list[Fetched]:
        async with time.downloader(config, site.connect_to) as downloader:
            return [await downloader.fetch(url) for url in urls]

    return uvloop.run(run())


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [
        ("7", 7, 7),
        ("30", 30, 30),
        ("-5", 0.5, 1.5),
        ("²", 0.5, 1.5),
        ("0", 0.5, 1.5),
        (format_datetime(datetime.now(UTC) - timedelta(days=1)), 0.5, 1.5),
    ],
    ids=["seconds", "the most", "negative", "no digit", "none", "yesterday"],  # the same in every process
)
def test_a_wait_within_the_cap_is_kept(site, answer, quick_config, asked, least, most) -> None:
    url = site.put("/a", answer(status=429, headers={"Retry-After": asked}), answer(b"ok"))
    time = Time()
    (got,) = fetch(time, quick_config(retry_wait_s=1.0, max_retry_wait_s=30.0), site, url)
    assert (got.status, got.attempts) == ("ok", 2)
    assert len(time.waits) == 1 and least <= time.waits[0] <= most


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize(
    "asked",
    ["60", "999999999", format_datetime(datetime.now(UTC) + timedelta(days=1))],
    ids=["a minute", "for ever", "tomorrow"],
)
def test_a_server_that_asks_for_more_is_not_asked_again(site, answer, quick_config, status, asked) -> None:
    url = site.put("/a", answer(status=status, headers={"Retry-After": asked}), answer(b"too early"))
    time = Time()
    (got,) = fetch(time, quick_config(retries=3, max_retry_wait_s=20.0), site, url)
    assert (got.http_status, got.attempts, got.data) == (status, 1, b"")
    assert site.counts == {"/a": 1} and not time.waits
    assert may_pass(got.status, got.http_status, arrived=False)
    assert f"HTTP {status} with a Retry-After of " in str(got.reason) and "over max_retry_wait_s (20 s)" in str(
        got.reason
    )


def test_the_reason_says_how_long(site, answer, quick_config) -> None:
    url = site.put("/a", answer(status=503, headers={"Retry-After": "60"}))
    other = site.put("/b", answer(b"x"))
    got = fetch(Time(), quick_config(max_retry_wait_s=20.0), site, url, other)
    assert [one.reason for one in got] == [
        "HTTP 503 with a Retry-After of 60 s, over max_retry_wait_s (20 s)",
        "not asked: pictures.test answered HTTP 503 with a Retry-After of 60 s",
    ]


def test_the_other_urls_of_the_host_end_alike_until_the_time_is_over(site, other_site, answer, quick_config) -> None:
    busy = site.put("/busy", answer(status=429, headers={"Retry-After": "60"}), answer(b"late"))
    fine = site.put("/fine", answer(b"x"))
    other_site.put("/there", answer(b"y"))
    site.put("/from", answer(b"not asked"))
    other_site.put("/to-it", answer(status=302, headers={"Location": fine}))
    time = Time()
    config = quick_config(max_retry_wait_s=20.0, allow_hosts=("127.0.0.1",))

    async def run() -> None:
        async with time.downloader(config, site.connect_to) as get:
            assert (await get.fetch(busy)).status == "http_4xx"
            for url in (fine, f"http://127.0.0.1:{other_site.port}/to-it", busy):
                got = await get.fetch(url)
                assert (got.status, got.http_status, got.attempts) == ("http_4xx", 429, 1)
            assert (await get.fetch(f"http://127.0.0.1:{other_site.port}/there")).data == b"y"  # another host
            time.now += 59
            assert (await get.fetch(fine)).status == "http_4xx"  # not waited for, however little is left
            assert site.counts == {"/busy": 1} and not time.waits
            time.now += 1
            assert [(await get.fetch(url)).data for url in (fine, busy)] == [b"x", b"late"]

    uvloop.run(run())


def test_the_other_urls_of_the_host_wait_as_well(site, answer, quick_config) -> None:
    busy = site.put("/busy", answer(status=503, headers={"Retry-After": "7"}), answer(b"late"))
    urls = [site.put(f"/{number}", answer(b"x")) for number in range(6)]
    time = Time()
    asked_at: list[tuple[str, float]] = []
    take = site.take

    def note(path: str, headers: dict[str, str]):
        asked_at.append((path, time.now))
        return take(path, headers)

    site.take = note

    async def run() -> list[Fetched]:
        async with time.downloader(quick_config(max_retry_wait_s=20.0, per_host=1), site.connect_to) as get:
            return await asyncio.gather(
                *(get.fetch(url) for url in (busy, *urls))
            )  # the first has the host's only turn

    got = uvloop.run(run())
    assert [one.status for one in got] == ["ok"] * 7
    assert [one.attempts for one in got] == [2] + [1] * 6
    assert asked_at[0] == ("/busy", 1000.0) and all(at >= 1007.0 for _, at in asked_at[1:])
    assert site.counts == {"/busy": 2} | {f"/{number}": 1 for number in range(6)}


def test_a_url_that_waits_for_a_slot_hears_of_the_pause(site, other_site, answer, quick_config) -> None:
    gate = threading.Event()
    other_site.put("/slow", answer(b"slow", gate=gate))
    site.put("/busy", answer(status=429, headers={"Retry-After": "60"}))
    site.put("/fine", answer(b"x"))
    config = quick_config(concurrency=1, per_host=2, max_retry_wait_s=20.0, allow_hosts=("127.0.0.1",))

    async def run() -> list[Fetched]:
        async with Time().downloader(config, site.connect_to) as get:
            urls = [
                f"http://127.0.0.1:{other_site.port}/slow",
                "http://pictures.test/busy",
                "http://pictures.test/fine",
            ]
            tasks = [asyncio.create_task(get.fetch(url)) for url in urls]
            await asyncio.to_thread(other_site.wait_for, 1)
            gate.set()
            return await asyncio.gather(*tasks)

    got = uvloop.run(run())
    assert [one.status for one in got] == ["ok", "http_4xx", "http_4xx"]
    assert site.counts == {"/busy": 1}


def test_a_host_that_asks_for_pauses_without_end_is_given_up(site, answer, quick_config) -> None:
    urls = [site.put(f"/{number}", answer(status=429, headers={"Retry-After": "7"})) for number in range(20)]
    time = Time()

    async def run() -> list[Fetched]:
        async with time.downloader(quick_config(max_retry_wait_s=20.0, per_host=1, retries=1), site.connect_to) as get:
            return await asyncio.gather(*(get.fetch(url) for url in urls))

    got = uvloop.run(run())
    assert {(one.status, one.http_status) for one in got} == {("http_4xx", 429)}
    assert max(one.attempts for one in got) == 2
    assert 2 <= len(site.asked) <= 4  # a URL a pause, and no URL waits for more than `retries` + 1
    assert time.now <= 1000 + 4 * 7


def test_without_retries_a_pause_still_holds_for_the_others(site, answer, quick_config) -> None:
    busy = site.put("/busy", answer(status=429, headers={"Retry-After": "7"}))
    fine = site.put("/fine", answer(b"x"))
    time = Time()
    got = fetch(time, quick_config(retries=0, max_retry_wait_s=20.0), site, busy, fine)
    assert [(one.status, one.attempts) for one in got] == [("http_4xx", 1), ("ok", 1)]
    assert time.waits == [7.0]


def test_what_may_not_pass_asks_nothing_of_the_host(site, answer, quick_config) -> None:
    gone = site.put("/gone", answer(status=403, headers={"Retry-After": "7000"}))
    fine = site.put("/fine", answer(b"x"))
    time = Time()
    got = fetch(time, quick_config(max_retry_wait_s=20.0), site, gone, fine)
    assert [(one.status, one.reason) for one in got] == [("http_4xx", "HTTP 403"), ("ok", None)]
    assert not time.waits


def test_a_top_up_fetches_what_was_not_asked(ingest, site, answer, jpeg) -> None:
    ingest.config = ingest.config.model_copy(update={"per_host": 1})
    site.put("/0", answer(status=429, headers={"Retry-After": "3600"}), answer(jpeg(0)))
    ingest.val_fraction = 0.0
    ingest.number(
        [f"{site.put(f'/{row}', answer(jpeg(row))) if row else 'http://pictures.test/0'}\tc" for row in range(8)]
    )
    before = ingest.run("block_00")
    assert before.counts == {"http_4xx": 8} and site.counts == {"/0": 1}
    assert {row["http_status"] for row in ingest.rows().values()} == {429}
    assert ingest.run("block_00", "again", retry_failed=True).counts == {"ok": 8}


def test_a_shorter_pause_changes_nothing_and_the_oldest_is_forgotten() -> None:
    now = [0.0]
    pauses = HostPauses(lambda: now[0], most=3)
    pauses.ask("a", 60, True, "http_5xx", 503)
    pauses.ask("a", 5, False, "http_4xx", 429)
    pause = pauses.of("a")
    assert pause is not None and (pause.asked_s, pause.is_long, pause.status) == (60, True, "http_5xx")
    now[0] = 59.0
    assert pauses.of("a") is pause and pauses.left_s(pause) == 1.0
    now[0] = 60.0
    assert pauses.of("a") is None and len(pauses) == 0
    for number in range(1000):
        pauses.ask(f"h{number}", 1 + number, False, "http_4xx", 429)
    assert len(pauses) == 3
    assert [pauses.of(host) is not None for host in ("h0", "h996", "h997", "h999")] == [False, False, True, True]
