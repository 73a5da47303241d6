"""Servers that compress although identity was asked for: bodies are decoded, within the bounds of bodies that are not."""

import asyncio
import gzip
import zlib

import pytest

from fourmill.core.digest import digest_bytes
from fourmill.ingest.config import IngestConfig
from fourmill.ingest.download import Downloader, Fetched
from fourmill.ingest.inflate import Inflater

PLAIN = b"\xff\xd8 a picture " * 5000


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def fetch(config: IngestConfig, site, url: str) -> Fetched:
    async def run() -> Fetched:
        async with Downloader(config, site.connect_to) as downloader:
            return await downloader.fetch(url)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [("gzip", gzip.compress), ("X-GZIP", gzip.compress), ("deflate", zlib.compress), ("deflate", raw_deflate)],
    ids=["gzip", "x-gzip", "zlib", "raw deflate"],
)
def test_a_compressed_body_is_decoded(site, answer, quick_config, encoding, pack) -> None:
    url = site.put("/a", answer(pack(PLAIN), headers={"Content-Encoding": encoding}))
    got = fetch(quick_config(), site, url)
    assert (got.status, got.data, got.http_status) == ("ok", PLAIN, 200)
    inflater = Inflater(encoding.lower().removeprefix("x-"), 200)  # however it is cut into packets
    pieces = [inflater.feed(bytes([byte]), 1000) for byte in pack(PLAIN)]
    assert b"".join([*pieces, inflater.end()]) == PLAIN


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "identity", "", "none"])
def test_an_encoding_that_is_not_known_is_left_alone(site, answer, quick_config, encoding) -> None:
    body = gzip.compress(PLAIN)
    got = fetch(quick_config(), site, site.put("/a", answer(body, headers={"Content-Encoding": encoding})))
    assert (got.status, got.data) == ("ok", body)


@pytest.mark.parametrize("body", [b"", b"\x1f", b"\xff", PLAIN])
def test_a_plain_body_that_is_called_gzip_is_left_alone(site, answer, quick_config, body) -> None:
    got = fetch(quick_config(), site, site.put("/a", answer(body, headers={"Content-Encoding": "gzip"})))
    assert (got.status, got.data) == ("ok", body)


def test_what_follows_the_stream_is_dropped(site, answer, quick_config) -> None:
    body = gzip.compress(PLAIN) + bytes(300_000)
    got = fetch(quick_config(), site, site.put("/a", answer(body, headers={"Content-Encoding": "gzip"})))
    assert (got.status, got.data) == ("ok", PLAIN)


@pytest.mark.parametrize(
    ("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("deflate", raw_deflate)]
)
def test_a_bomb_is_too_large(site, answer, quick_config, encoding, pack) -> None:
    url = site.put("/a", answer(pack(bytes(50_000_000)), headers={"Content-Encoding": encoding}))
    got = fetch(quick_config(max_bytes=1_000_000), site, url)
    assert (got.status, got.http_status, got.data) == ("too_large", 200, b"")
    exact = site.put("/b", answer(pack(bytes(1_000_000)), headers={"Content-Encoding": encoding}))
    assert fetch(quick_config(max_bytes=1_000_000), site, exact).data == bytes(1_000_000)
    assert fetch(quick_config(max_bytes=999_999), site, exact).status == "too_large"


def test_an_endless_body_that_decodes_to_nothing_is_too_large(site, answer, quick_config) -> None:
    whole = gzip.compress(b"x")
    url = site.put("/a", answer(whole, headers={"Content-Encoding": "gzip"}, endless=True))
    assert fetch(quick_config(max_bytes=100_000), site, url).status == "too_large"
    assert site.left.wait(180)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.parametrize("fault", ["cut", "no checksum", "bits"])
def test_a_broken_stream_is_truncated(site, answer, quick_config, encoding, fault) -> None:
    body = bytearray((gzip.compress if encoding == "gzip" else zlib.compress)(PLAIN))
    if fault == "bits":
        body[20:24] = b"\xff" * 4
    url = site.put(
        "/a",
        answer(
            bytes(body[: len(body) // 2] if fault == "cut" else body[:-1] if fault == "no checksum" else body),
            headers={"Content-Encoding": encoding},
        ),
    )
    got = fetch(quick_config(), site, url)
    assert (got.status, got.http_status, got.attempts, got.data) == ("truncated", 200, 1, b"")
    assert f"{encoding} stream" in str(got.reason)


def test_a_broken_stream_without_an_end_is_left(site, answer, quick_config) -> None:
    body = gzip.compress(PLAIN)[:10] + b"\xff" * 500
    url = site.put("/a", answer(body, headers={"Content-Encoding": "gzip"}, endless=True))
    assert fetch(quick_config(), site, url).status == "truncated"
    assert site.left.wait(180)


def test_the_ledger_speaks_of_the_decoded_body(ingest, site, answer, jpeg) -> None:
    ingest.val_fraction = 0.0
    packed = site.put("/a", answer(gzip.compress(jpeg(1)), headers={"Content-Encoding": "gzip"}))
    ingest.number([f"{packed}\tc"])
    assert ingest.run("block_00").counts == {"ok": 1}
    row = ingest.rows()[0]
    assert (row["bytes"], row["source_sha256"]) == (len(jpeg(1)), digest_bytes(jpeg(1)))
