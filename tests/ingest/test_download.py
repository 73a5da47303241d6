import asyncio
import gc
import socket
import threading
import warnings
from collections.abc import Callable

import pytest
import uvloop

from fourmill.core.digest import digest_config
from fourmill.ingest.config import NO_EFFECT_ON_CONTENT, IngestConfig
from fourmill.ingest.download import Downloader, Fetched, _tls_context


def fetch(config: IngestConfig, site, *urls: str, lookup=None, waits: list[float] | None = None) -> list[Fetched]:
    async def wait(seconds: float) -> None:
        if waits is not None:
            waits.append(seconds)

    async def run() -> list[Fetched]:
        async with Downloader(config, site.connect_to, wait=wait, lookup=lookup) as downloader:
            return await asyncio.gather(*(downloader.fetch(url) for url in urls))

    return uvloop.run(run())


def nowhere(host: str) -> list[str]:
    raise OSError(f"no such host {host}")


def test_a_body_arrives(site, answer, quick_config) -> None:
    url = site.put("/a.jpg", answer(b"abc" * 50_000))
    site.answers["/a.jpg"][0].headers["Content-Type"] = "image/jpeg"
    (got,) = fetch(quick_config(user_agent="me/1"), site, url)
    assert got.content_type == "image/jpeg"
    assert (got.status, got.data, got.http_status, got.attempts) == ("ok", b"abc" * 50_000, 200, 1)
    assert got.final_url == url and got.reason is None and got.seconds > 0
    headers = site.asked[0][1]
    assert (headers["user-agent"], headers["accept-encoding"]) == ("me/1", "identity")
    assert not {"cookie", "referer", "authorization", "origin"} & headers.keys()


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

        got = uvloop.run(run())
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


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(site, answer, quick_config, status) -> None:
    site.put("/sub/b", answer(b"there"))
    url = site.put("/sub/a", answer(status=status, headers={"Location": "b#part"}))
    (got,) = fetch(quick_config(), site, url)
    assert (got.data, got.final_url) == (b"there", "http://pictures.test/sub/b")


def test_credentials_in_urls_are_never_sent(site, other_site, answer, quick_config) -> None:
    other_site.put("/b", answer(b"there"))
    away = f"http://me:secret@127.0.0.1:{other_site.port}/b"
    site.put("/b", answer(b"there"))
    site.put("/a", answer(status=302, headers={"Location": "/b"}))
    site.put("/c", answer(status=302, headers={"Location": "http://me:secret@pictures.test/b"}))
    site.put("/d", answer(status=302, headers={"Location": away}))
    urls = [f"http://me:secret@pictures.test/{path}" for path in "abcd"] + ["http://token@pictures.test/b", away]
    got = fetch(quick_config(allow_hosts=("127.0.0.1",)), site, *urls)
    assert [one.data for one in got] == [b"there"] * len(urls)
    sent = [headers for _, headers in site.asked + other_site.asked]
    assert len(sent) == 9 and not any({"authorization", "referer", "cookie"} & headers.keys() for headers in sent)
    assert not any("secret" in value or "token" in value for headers in sent for value in headers.values())
    assert not any("secret" in one.final_url or "token" in one.final_url for one in got)


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
    got = fetch(config, site, *urls, "http://other.test/a", lookup=lambda host: ["127.0.0.1"])
    assert [one.status for one in got] == ["ok", "ok", "refused_address", "refused_address"]


def test_ports_that_are_not_the_webs_are_refused_unless_config_names_them(site, answer, quick_config) -> None:
    port = site.port
    site.put("/a", answer(b"mine"))
    site.put("/away", answer(status=302, headers={"Location": f"http://pictures.test:{port}/a"}))
    urls = [f"http://pictures.test:{port}/a", "http://pictures.test/away"]
    for ports, status in (((80, 443), "refused_address"), ((80, port), "ok")):
        config = quick_config(allow_ports=ports, allow_hosts=() if status != "ok" else ("pictures.test",))
        got = fetch(config, site, *urls, lookup=lambda host: ["127.0.0.1"])
        assert [one.status for one in got] == [status] * 2
    assert site.counts["/a"] == 2


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
        uvloop.run(Downloader(quick_config()).fetch("http://example.com/"))


def test_a_host_that_keeps_failing_holds_up_nobody_while_it_waits(site, other_site, answer, quick_config) -> None:
    site.put("/flapping", answer(status=503), answer(b"late"))
    site.put("/fine", answer(b"x"))

    async def run() -> list[Fetched]:
        waiting, go = asyncio.Event(), asyncio.Event()

        async def wait(seconds: float) -> None:
            waiting.set()
            await go.wait()

        config = quick_config(concurrency=1, per_host=1, max_retry_wait_s=60.0)
        async with Downloader(config, site.connect_to, wait=wait) as downloader:
            flapping = asyncio.create_task(downloader.fetch("http://pictures.test/flapping"))
            await waiting.wait()
            fine = await downloader.fetch("http://pictures.test/fine")  # the only slot and the host's only turn
            go.set()
            return [fine, await flapping]

    got = uvloop.run(run())
    assert [(one.status, one.attempts) for one in got] == [("ok", 1), ("ok", 2)]


def test_a_busy_host_keeps_no_slot_from_others(site, other_site, answer, quick_config) -> None:
    gate = threading.Event()
    slow = [site.put(f"/{number}", answer(b"slow", gate=gate)) for number in range(8)]
    other_site.put("/fine", answer(b"x"))

    async def run() -> None:
        config = quick_config(concurrency=4, per_host=2, allow_hosts=("127.0.0.1",))
        async with Downloader(config, site.connect_to) as downloader:
            tasks = [asyncio.create_task(downloader.fetch(url)) for url in slow]
            await asyncio.to_thread(site.wait_for, 2)
            fine = await downloader.fetch(f"http://127.0.0.1:{other_site.port}/fine")
            assert fine.status == "ok" and not any(task.done() for task in tasks)
            gate.set()
            assert {one.status for one in await asyncio.gather(*tasks)} == {"ok"}

    uvloop.run(run())


def test_a_slow_name_server_keeps_no_slot_from_others(site, answer, quick_config) -> None:
    site.put("/fine", answer(b"x"))
    asked, go = threading.Event(), threading.Event()

    def lookup(host: str) -> list[str]:
        asked.set()
        assert go.wait(180)
        raise OSError("no such host")

    async def run() -> list[str]:
        async with Downloader(quick_config(concurrency=1), site.connect_to, lookup=lookup) as downloader:
            slow = asyncio.create_task(downloader.fetch("http://slow.test/"))
            await asyncio.to_thread(asked.wait, 180)
            fine = await downloader.fetch("http://pictures.test/fine")
            go.set()
            return [fine.status, (await slow).status]

    assert uvloop.run(run()) == ["ok", "dns"]


def test_a_name_server_that_does_not_answer_is_asked_again(site, quick_config) -> None:
    failing = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    def lookup(host: str) -> list[str]:
        raise failing

    (got,) = fetch(quick_config(retries=2), site, "http://a.test/", lookup=lookup)
    assert (got.status, got.attempts) == ("dns", 3)
    assert got.reason == "a.test: Temporary failure in name resolution"


def test_a_body_in_hand_counts_as_one_in_flight(site, answer, quick_config) -> None:
    urls = [site.put(f"/{number}", answer(b"x")) for number in range(3)]

    async def run() -> None:
        async with Downloader(quick_config(concurrency=2), site.connect_to) as downloader:
            async with downloader.held(urls[0]) as first, downloader.held(urls[1]) as second:
                assert first.data == second.data == b"x"
                third = asyncio.create_task(downloader.fetch(urls[2]))
                missing = await asyncio.wait_for(asyncio.shield(downloader.fetch("http://[::1]/")), 180)
                assert missing.status == "refused_address" and not third.done() and len(site.asked) == 2
            assert (await third).status == "ok"
            async with downloader.held("http://pictures.test/none") as gone:  # a failure has no body to hold
                assert gone.status == "http_404"
                assert [(await downloader.fetch(url)).status for url in urls] == ["ok"] * 3
            assert downloader._slots._value == 2

    uvloop.run(run())


def test_one_downloader_serves_shard_after_shard_over_the_same_connections(site, answer, quick_config) -> None:
    urls = [site.put(f"/{number}", answer(b"x" * 5000)) for number in range(12)]

    async def run() -> None:
        async with Downloader(quick_config(per_host=2), site.connect_to) as downloader:
            for shard in (urls[:4], urls[4:8], urls[8:]):
                got = await asyncio.gather(*(downloader.fetch(url) for url in shard))
                assert {one.status for one in got} == {"ok"}

    uvloop.run(run())
    assert site.connections <= 2 and len(site.asked) == 12


def test_connections_of_many_hosts_are_not_all_kept(site, answer, quick_config, monkeypatch) -> None:
    monkeypatch.setattr("fourmill.ingest.download._MOST_KEPT_HOSTS", 3)
    site.put("/a", answer(b"x"))
    connect_to = {f"h{number}.test:80": f"127.0.0.1:{site.port}" for number in range(8)}

    async def run() -> None:
        async with Downloader(quick_config(), connect_to) as downloader:
            for _ in range(2):
                for number in range(8):
                    assert (await downloader.fetch(f"http://h{number}.test/a")).status == "ok"

    uvloop.run(run())
    closing = [headers.get("connection") == "close" for _, headers in site.asked]
    assert closing == ([False] * 3 + [True] * 5) * 2
    assert site.connections == 3 + 5 * 2


def test_closing_leaves_nothing_open(site, answer, quick_config) -> None:
    url = site.put("/a", answer(b"x"))
    hanging = site.put("/hang", answer(hang=True))

    async def run() -> None:
        async with Downloader(quick_config(), site.connect_to) as downloader:
            await downloader.fetch(url)
            left = asyncio.create_task(downloader.fetch(hanging))
            await asyncio.to_thread(site.wait_for, 1)
            left.cancel()
            await asyncio.gather(left, return_exceptions=True)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        uvloop.run(run())
        gc.collect()
    mine = [str(one.message) for one in caught if "127.0.0.1" in str(one.message) or "aiohttp" in str(one.message)]
    assert not mine
    assert not [one for one in threading.enumerate() if one.name.startswith("dns") and one.is_alive()]


def test_https_with_an_authority_of_ones_own(secure_site, answer, quick_config, certificate) -> None:
    url = secure_site.put("/a", answer(b"x" * 5000))
    (got,) = fetch(quick_config(ca_file=str(certificate)), secure_site, url)
    assert (got.status, got.data, got.final_url) == ("ok", b"x" * 5000, "https://pictures.test/a")
    (got,) = fetch(quick_config(), secure_site, url)
    assert (got.status, got.attempts) == ("connect", 1) and "certificate" in str(got.reason)
    wrong = {"other.test:443": secure_site.connect_to["pictures.test:443"]}

    async def under_another_name() -> Fetched:
        async with Downloader(quick_config(ca_file=str(certificate)), wrong) as downloader:
            return await downloader.fetch("https://other.test/a")

    got = uvloop.run(under_another_name())
    assert got.status == "connect" and "certificate" in str(got.reason)
    assert secure_site.counts == {"/a": 1}


def test_one_tls_context_a_process(certificate, quick_config) -> None:
    assert _tls_context(str(certificate)) is _tls_context(str(certificate))


def test_a_ca_file_that_is_none_is_said_with_its_name(tmp_path, quick_config) -> None:
    async def run(path: str) -> None:
        async with Downloader(quick_config(ca_file=path)):
            pass

    (tmp_path / "text.pem").write_text("no certificate")
    for name in ("missing.pem", "text.pem"):
        with pytest.raises(ValueError, match=f"ca_file .*{name}.* cannot be read as PEM"):
            uvloop.run(run(str(tmp_path / name)))


@pytest.mark.parametrize(
    ("lines", "status"),
    [(["noai"], "robots"), (["otherbot: noai"], "ok"), (["nofollow", "fourmill: noindex"], "robots"), (["all"], "ok")],
)
def test_images_whose_robots_tag_forbids_it_are_left_out(site, answer, quick_config, lines, status) -> None:
    url = site.put("/a", answer(b"body", headers={"X-Robots-Tag": lines}))
    (got,) = fetch(quick_config(), site, url)
    assert (got.status, got.http_status, got.attempts) == (status, 200, 1)
    assert (got.data == b"body") == (status == "ok") == (got.reason is None)
    (got,) = fetch(quick_config(respect_robots_tag=False), site, url)
    assert got.status == "ok"


def test_the_robots_tag_is_part_of_the_recipe_and_pace_is_not() -> None:
    def digest(**changes: object) -> str:
        return digest_config(IngestConfig.model_validate(changes), exclude=NO_EFFECT_ON_CONTENT)

    assert digest(respect_robots_tag=False) != digest()
    assert digest(allow_ports=(80,)) != digest()
    assert digest(lookups=1, first_byte_timeout_s=1, ca_file="x.pem") == digest()
