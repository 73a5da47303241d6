"""Servers that mean harm or are broken: every one ends in its class, within bounds, and stops nobody else."""

import asyncio
import struct
import zlib

import pytest
import uvloop

from fourmill.ingest.config import IngestConfig
from fourmill.ingest.download import Downloader, Fetched
from fourmill.ingest.image import ImageError, normalise


def fetch(config: IngestConfig, site, *urls: str, lookup=None) -> list[Fetched]:
    async def wait(seconds: float) -> None:
        pass

    async def run() -> list[Fetched]:
        async with Downloader(config, site.connect_to, wait=wait, lookup=lookup) as downloader:
            return await asyncio.gather(*(downloader.fetch(url) for url in urls))

    return uvloop.run(run())


def outcome(config: IngestConfig, site, url: str) -> tuple[str, str]:
    """Status and reason after the whole way from URL to picture."""
    (got,) = fetch(config, site, url)
    if got.status != "ok":
        return got.status, str(got.reason)
    try:
        normalise(got.data, config)
    except ImageError as error:
        return error.status, error.reason
    return "ok", ""


def png(width: int, height: int, data: bytes) -> bytes:
    """A PNG of 8-bit RGB with any data, its checksums right."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_a_server_that_flaps_is_won_in_the_end_or_given_up(site, answer, quick_config) -> None:
    flapping = site.put("/a", answer(status=503), answer(reset=True), answer(reset=True), answer(b"up"))
    down = site.put("/b", answer(status=503))
    config = quick_config(retries=2)
    got = fetch(config, site, flapping, down)
    assert [(one.status, one.attempts) for one in got] == [("ok", 3), ("http_5xx", 3)]


def test_a_body_cut_by_a_reset_is_tried_again_and_a_short_one_is_not(site, answer, quick_config) -> None:
    reset = site.put("/a", answer(b"x" * 1000, cut=True), answer(b"whole"))
    short = site.put("/b", answer(b"short", announce=500), answer(b"whole"))
    got = fetch(quick_config(retries=1), site, reset, short)
    assert [(one.status, one.attempts) for one in got] == [("ok", 2), ("truncated", 1)]


@pytest.mark.parametrize(
    ("changes", "http_status"), [({"hang": True}, None), ({"body": b"x" * 9000, "stall": True}, 200)]
)
def test_silence_before_and_inside_the_body_ends_by_the_first_byte_timeout(
    site, answer, quick_config, changes, http_status
) -> None:
    url = site.put("/a", answer(**changes))
    config = quick_config(retries=1, first_byte_timeout_s=0.2, total_timeout_s=600, connect_timeout_s=600)
    (got,) = fetch(config, site, url)
    assert (got.status, got.http_status, got.attempts, got.data) == ("timeout", http_status, 2, b"")


def test_a_body_that_drips_ends_by_the_total_timeout(site, answer, quick_config) -> None:
    url = site.put("/a", answer(b"x" * 10_000, drip=True))  # a byte each tenth of a second
    config = quick_config(retries=0, first_byte_timeout_s=600, total_timeout_s=0.5)
    (got,) = fetch(config, site, url)
    assert (got.status, got.http_status) == ("timeout", 200) and got.seconds < 180


def test_redirects_share_the_time_of_one_attempt(site, answer, quick_config) -> None:
    site.put("/hang", answer(hang=True))
    url = site.put("/a", answer(status=302, headers={"Location": "/hang"}))
    (got,) = fetch(quick_config(retries=1, total_timeout_s=0.4, first_byte_timeout_s=600), site, url)
    assert (got.status, got.attempts, got.final_url) == ("timeout", 2, "http://pictures.test/hang")


def test_a_connection_that_is_never_accepted_ends_by_the_connect_timeout(
    secure_site, certificate, quick_config
) -> None:
    with_plain_tcp = {"pictures.test:443": f"127.0.0.1:{secure_site.port}"}

    class Deaf(asyncio.Protocol):
        pass  # takes the connection and never answers the TLS handshake

    async def run() -> Fetched:
        server = await asyncio.get_running_loop().create_server(Deaf, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        config = quick_config(retries=0, connect_timeout_s=0.2, first_byte_timeout_s=600, total_timeout_s=600)
        async with server, Downloader(config, dict.fromkeys(with_plain_tcp, f"127.0.0.1:{port}")) as downloader:
            return await downloader.fetch("https://pictures.test/a")

    got = uvloop.run(run())
    assert (got.status, got.http_status) == ("timeout", None)


def test_wrong_lengths_are_truncated_pictures_either_way(site, answer, quick_config, jpeg) -> None:
    whole = jpeg(1, 200, 200)
    too_much = site.put("/a", answer(whole, announce=len(whole) + 500))
    too_little = site.put("/b", answer(whole, announce=len(whole) - 500))
    assert outcome(quick_config(), site, too_much)[0] == "truncated"
    assert outcome(quick_config(), site, too_little)[0] == "truncated"


def test_what_follows_a_body_is_not_taken_for_the_next_one(site, answer, quick_config) -> None:
    forged = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged"
    first = site.put("/a", answer(b"short" + forged, announce=5))
    second = site.put("/b", answer(b"true"))

    async def run() -> list[Fetched]:
        async with Downloader(quick_config(per_host=1), site.connect_to) as downloader:
            return [await downloader.fetch(first), await downloader.fetch(second)]

    assert [one.data for one in uvloop.run(run())] == [b"short", b"true"]


def test_endless_chunks_end_at_the_cap(site, answer, quick_config) -> None:
    url = site.put("/a", answer(b"x" * 1000, endless=True))
    (got,) = fetch(quick_config(max_bytes=100_000, total_timeout_s=600), site, url)
    assert (got.status, got.reason, got.attempts) == ("too_large", "more than 100000 bytes", 1)
    assert site.left.wait(180)  # and the connection was closed on it


def test_an_announcement_over_the_cap_is_enough(site, answer, quick_config) -> None:
    url = site.put("/a", answer(b"x" * 10, announce=10**12))
    (got,) = fetch(quick_config(), site, url)
    assert (got.status, got.data) == ("too_large", b"") and "1000000000000 bytes announced" in str(got.reason)


def test_redirects_in_a_loop_between_hosts_end(site, other_site, answer, quick_config) -> None:
    there = f"http://127.0.0.1:{other_site.port}/b"
    here = site.put("/a", answer(status=301, headers={"Location": there}))
    other_site.put("/b", answer(status=301, headers={"Location": here}))
    (got,) = fetch(quick_config(max_redirects=4, allow_hosts=("127.0.0.1",)), site, here)
    assert (got.status, got.http_status, got.attempts) == ("redirects", 301, 1)
    assert len(site.asked) + len(other_site.asked) == 5


@pytest.mark.parametrize(
    "target",
    ["127.0.0.1", "10.0.0.1", "169.254.169.254", "[::1]", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "[fd00:ec2::254]"],
)
def test_redirects_to_private_addresses_are_refused(site, answer, quick_config, target) -> None:
    url = site.put("/a", answer(status=302, headers={"Location": f"http://{target}/latest/meta-data/"}))
    (got,) = fetch(quick_config(), site, url)
    assert (got.status, got.http_status, got.attempts) == ("refused_address", None, 1)
    assert got.final_url.endswith("/latest/meta-data/") and len(site.asked) == 1


def test_names_of_inner_addresses_are_refused_also_behind_a_redirect(site, answer, quick_config) -> None:
    site.put("/secret", answer(b"secret"))
    answers = {"first.test": ["127.0.0.1"], "inner.test": ["127.0.0.1", "10.0.0.1"]}
    url = site.put("/a", answer(status=302, headers={"Location": "http://inner.test/secret"}))
    got = fetch(quick_config(), site, url, "http://first.test/secret", lookup=answers.__getitem__)
    assert [one.status for one in got] == ["refused_address"] * 2 and site.counts["/secret"] == 0


@pytest.mark.parametrize(("ttl_s", "status", "num_lookups"), [(300.0, "connect", 1), (0.0, "refused_address", 2)])
def test_rebinding_between_check_and_connection_leads_nowhere(
    site, answer, quick_config, monkeypatch, ttl_s, status, num_lookups
) -> None:
    """127.0.0.2 plays the public address, at which nobody listens. The name says so once, and loopback from then on."""
    monkeypatch.setattr("fourmill.ingest.addresses.is_public", lambda address: address == "127.0.0.2")
    monkeypatch.setattr("fourmill.ingest.resolver._TTL_S", ttl_s)
    site.put("/secret", answer(b"secret"))
    asked: list[str] = []

    def lookup(host: str) -> list[str]:
        asked.append(host)
        return ["127.0.0.2"] if len(asked) == 1 else ["127.0.0.1"]

    config = quick_config(retries=0, allow_ports=(site.port,))
    (got,) = fetch(config, site, f"http://rebinding.test:{site.port}/secret", lookup=lookup)
    assert (got.status, len(asked), site.counts["/secret"]) == (status, num_lookups, 0)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"<!doctype html><html><body>Not here any more</body></html>", "not_an_image"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>', "not_an_image"),
        (b"", "not_an_image"),
        (png(100_000, 100_000, zlib.compress(b"\0" * 1000)), "too_many_pixels"),
        (png(7000, 7000, zlib.compress(b"\0" * (3 * 7000 + 1) * 7000, 9)), "too_many_pixels"),
    ],
    ids=["html", "svg", "nothing", "ten-gigapixel header", "zip bomb"],
)
def test_what_is_no_fit_picture_is_said_by_the_image_step(site, answer, quick_config, body, status) -> None:
    url = site.put("/a.jpg", answer(body, headers={"Content-Type": "image/jpeg"}))
    assert outcome(quick_config(max_pixels=40_000_000), site, url)[0] == status


def test_a_zip_bomb_behind_a_small_header_is_bounded_by_it(site, answer, quick_config) -> None:
    bomb = png(8, 8, zlib.compress(b"\0" * 100_000_000, 9))
    url = site.put("/a.png", answer(bomb))
    status, _ = outcome(quick_config(), site, url)
    assert status in ("ok", "decode_error", "truncated")


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x00" * 1000,
    ],
    ids=["negative length", "two lengths", "long header", "bad chunk", "zeros"],
)
def test_malformed_responses_have_a_class_and_are_not_tried_again(quick_config, head) -> None:
    class Malformed(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            asked.append(data)
            self.transport.write(head)  # pyright: ignore[reportAttributeAccessIssue]
            self.transport.close()

    asked: list[bytes] = []

    async def run() -> Fetched:
        server = await asyncio.get_running_loop().create_server(Malformed, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, Downloader(quick_config(), {"pictures.test:80": f"127.0.0.1:{port}"}) as downloader:
            return await downloader.fetch("http://pictures.test/a")

    got = uvloop.run(run())
    assert got.status in ("connect", "truncated") and got.data == b"" and got.attempts == 1
    assert len(asked) == 1
