import asyncio
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from fourmill.ingest.config import IngestConfig
from fourmill.ingest.download import Downloader, Fetched


def fetch(config: IngestConfig, site, *urls: str, lookup=None, waits: list[float] | None = None) -> list[Fetched]:
    async def wait(seconds: float) -> None:
        if waits is not None:
            waits.append(seconds)

    async def run() -> list[Fetched]:
        async with Downloader(config, site.connect_to, wait=wait, lookup=lookup) as downloader:
            return await asyncio.gather(*(downloader.fetch(url) for url in urls))

    return asyncio.run(run())


def nowhere(host: str) -> list[str]:
    raise OSError(f"no such host {host}")


def test_a_body_arrives(site, answer, quick_config) -> None:
    url = site.put("/a.jpg", answer(b"abc" * 50_000))
    (got,) = fetch(quick_config(user_agent="me/1"), site, url)
    assert (got.status, got.data, got.http_status, got.attempts) == ("ok", b"abc" * 50_000, 200, 1)
    assert got.final_url == url and got.reason is None and got.seconds > 0
    headers = site.asked[0][1]
    assert (headers["user-agent"], headers["accept-encoding"]) == ("me/1", "identity")
    assert "cookie" not in headers


@pytest.mark.parametrize(
    ("changes", "status", "http_status", "requests"),
    [
        ({"status": 404}, "http_404", 404, 1),
        ({"status": 403}, "http_4xx", 403, 1),
        ({"status": 410}, "http_4xx", 410, 1),
        ({"status": 429}, "http_4xx", 429, 3),
        ({"status": 500}, "http_5xx", 500, 3),
        ({"status": 503, "headers": {"Retry-After": "soon"}}, "http_5xx", 503, 3),
        ({"body": b"x" * 1001}, "too_large", 200, 1),
        ({"body": b"x" * 100_000, "chunked": True}, "too_large", 200, 1),
        ({"body": b"short", "announce": 500}, "truncated", 200, 1),
        ({"status": 302}, "redirects", 302, 1),
        ({"status": 302, "headers": {"Location": "ftp://a.test/x"}}, "redirects", 302, 1),
        ({"status": 302, "headers": {"Location": "http://[oops/x"}}, "redirects", 302, 1),
        ({"status": 302, "headers": {"Location": "/p"}}, "redirects", 302, 4),  # to itself, 3 redirects allowed
        ({"reset": True}, "connect", None, 3),
        ({"hang": True}, "timeout", None, 3),
    ],
)
def test_failures_by_class(site, answer, quick_config, changes, status, http_status, requests) -> None:
    url = site.put("/p", answer(**changes))
    config = quick_config(retries=2, max_bytes=1000, max_redirects=3, total_timeout_s=0.25 if "hang" in changes else 30)
    (got,) = fetch(config, site, url)
    assert (got.status, got.http_status) == (status, http_status)
    assert got.data == b"" and got.reason
    assert got.attempts == (requests if status != "redirects" else 1)
    assert site.counts["/p"] == requests * (2 if "reset" in changes else 1)  # aiohttp asks again once by itself


def test_a_name_that_does_not_resolve(site, quick_config) -> None:
    got = fetch(quick_config(), site, "http://gone.test/a", "http://a..b/x", f"http://{'x' * 70}.test/", lookup=nowhere)
    assert [one.status for one in got] == ["dns"] * 3
    assert [one.attempts for one in got] == [1] * 3


def test_nobody_listens(site, quick_config) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused, and nobody else gets the port
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/a"
        (got,) = fetch(quick_config(allow_hosts=("127.0.0.1",), retries=1), site, url)
    assert (got.status, got.attempts) == ("connect", 2)


def test_not_http_at_all(site, quick_config) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)

        async def run() -> Fetched:
            config = quick_config(allow_hosts=("127.0.0.1",), retries=0)
            async with Downloader(config) as downloader:
                task = asyncio.create_task(downloader.fetch(f"http://127.0.0.1:{server.getsockname()[1]}/"))
                peer, _ = await asyncio.to_thread(server.accept)
                with peer:
                    peer.sendall(b"SSH-2.0-x\r\n\r\n")
                    return await task

        got = asyncio.run(run())
    assert got.status == "connect"


def test_what_may_pass_is_tried_again(site, answer, quick_config) -> None:
    url = site.put("/a", answer(status=503), answer(reset=True), answer(reset=True), answer(b"here"))
    (got,) = fetch(quick_config(retries=2), site, url)
    assert (got.status, got.data, got.attempts) == ("ok", b"here", 3)


def test_waits_double_and_vary_by_url(site, answer, quick_config) -> None:
    config = quick_config(retries=4, retry_wait_s=1.0, max_retry_wait_s=6.0)
    waits: list[float] = []
    fetch(config, site, site.put("/a", answer(status=500)), waits=waits)
    assert len(waits) == 4
    for attempt, seconds in enumerate(waits):
        assert min(0.5 * 2**attempt, 6.0) <= seconds <= min(1.5 * 2**attempt, 6.0)
    again: list[float] = []
    fetch(config, site, f"{site.put('/b', answer(status=500))}", waits=again)
    assert waits != again


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [
        ("7", 7, 7),
        ("100000", 30, 30),
        ("-5", 0, 2),
        ("²", 0, 2),
        (format_datetime(datetime.now(UTC) + timedelta(days=1)), 30, 30),
        (format_datetime(datetime.now(UTC) - timedelta(days=1)), 0, 2),
    ],
)
def test_retry_after_is_honoured_within_bounds(site, answer, quick_config, asked, least, most) -> None:
    url = site.put("/a", answer(status=429, headers={"Retry-After": asked}), answer(b"ok"))
    waits: list[float] = []
    (got,) = fetch(quick_config(retry_wait_s=1.0, max_retry_wait_s=30.0), site, url, waits=waits)
    assert got.status == "ok" and len(waits) == 1 and least <= waits[0] <= most


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(site, answer, quick_config, status) -> None:
    site.put("/sub/b", answer(b"there"))
    url = site.put("/sub/a", answer(status=status, headers={"Location": "b#part"}))
    (got,) = fetch(quick_config(), site, url)
    assert (got.data, got.final_url) == (b"there", "http://pictures.test/sub/b")


def test_credentials_stay_behind_on_redirects(site, answer, quick_config) -> None:
    site.put("/b", answer(b"there"))
    site.put("/a", answer(status=302, headers={"Location": "/b"}))
    site.put("/c", answer(status=302, headers={"Location": "http://me:secret@pictures.test/b"}))
    got = fetch(quick_config(), site, "http://me:secret@pictures.test/a", "http://pictures.test/c")
    assert [one.final_url for one in got] == ["http://pictures.test/b"] * 2
    sent = [headers.get("authorization") for path, headers in site.asked if path == "/b"]
    assert sent == [None, None]
    assert "secret" not in repr([one.final_url for one in got])


def test_inner_addresses_are_never_asked(site, answer, quick_config) -> None:
    site.put("/secret", answer(b"secret"))
    hosts = ["127.0.0.1", "127.1", "0x7f.1", "2130706433", "0177.0.0.1", "[::ffff:127.0.0.1]", "[::1]", "inside.test"]
    urls = [f"http://{host}:{site.port}/secret" for host in hosts]
    inside: Callable[[str], list[str]] = lambda host: ["127.0.0.1", "::ffff:127.0.0.1"]  # noqa: E731
    got = fetch(quick_config(), site, *urls, lookup=inside)
    assert [one.status for one in got] == ["refused_address"] * len(urls)
    for number, url in enumerate(urls):  # nor after a redirect from a host that may be asked
        site.put(f"/{number}", answer(status=302, headers={"Location": url}))
    got = fetch(quick_config(), site, *(f"http://pictures.test/{n}" for n in range(len(urls))), lookup=inside)
    assert [one.status for one in got] == ["refused_address"] * len(urls)
    assert site.counts["/secret"] == 0
    assert [one.attempts for one in got] == [1] * len(urls)


def test_hosts_allowed_by_name(site, answer, quick_config) -> None:
    site.put("/a", answer(b"mine"))
    config = quick_config(allow_hosts=("127.0.0.1", "inside.test"))
    urls = [f"http://127.0.0.1:{site.port}/a", f"http://inside.test:{site.port}/a", f"http://other.test:{site.port}/a"]
    got = fetch(config, site, *urls, lookup=lambda host: ["127.0.0.1"])
    assert [one.status for one in got] == ["ok", "ok", "refused_address"]


def test_connections_are_kept_and_limited_per_host(site, answer, quick_config) -> None:
    urls = [site.put(f"/{number}", answer(b"x" * 5000)) for number in range(40)]
    got = fetch(quick_config(per_host=3, concurrency=40), site, *urls)
    assert {one.status for one in got} == {"ok"}
    assert site.connections <= 3 and site.most_at_once <= 3


def test_waiting_for_a_busy_host_is_no_timeout(site, answer, quick_config) -> None:
    hanging = site.put("/hang", answer(hang=True))
    fine = site.put("/fine", answer(b"x"))
    config = quick_config(per_host=1, retries=0, total_timeout_s=0.4, connect_timeout_s=0.3)
    got = fetch(config, site, hanging, fine)
    assert [one.status for one in got] == ["timeout", "ok"]


def test_fetch_outside_its_context_says_so(quick_config) -> None:
    with pytest.raises(RuntimeError, match="async with"):
        asyncio.run(Downloader(quick_config()).fetch("http://example.com/"))
