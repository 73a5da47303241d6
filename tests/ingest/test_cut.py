"""Pictures that end early are `truncated`, whatever their format and wherever the cut is; broken whole ones are not."""

import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fourmill.ingest.cut import check_parts
from fourmill.ingest.image import ImageError, normalise

RNG = np.random.default_rng(0)
NOISE = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
SMALL = Image.fromarray(RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8))
RAMP = Image.fromarray(np.add.outer(np.arange(24), np.arange(40)).astype(np.uint8)).convert("RGB")
WITHOUT_END = {"GIF": 2, "PNG": 20}  # bytes after the last pixel's: checks and a mark, without which a picture is good


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)  # pyright: ignore[reportArgumentType]
    return sink.getvalue()


def failure(data: bytes, config) -> str:
    with pytest.raises(ImageError) as caught:
        normalise(data, config)
    assert caught.value.reason == str(caught.value) != ""
    return caught.value.status


def failures(data: bytes, sizes: range, config) -> set[str]:
    return {failure(data[:size], config) for size in sizes}


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "AVIF"])
def test_cut_files_are_truncated(quick_config, kind, share) -> None:
    data = encode(NOISE, kind)
    assert failure(data[: int(len(data) * share)], quick_config()) == "truncated"


@pytest.mark.parametrize(
    ("kind", "least", "options"),  # bytes without which nothing tells what it is
    [
        ("JPEG", 3, {}),
        ("JPEG", 3, {"progressive": True}),  # with tables between its scans
        ("JPEG", 3, {"exif": b"Exif\0\0" + bytes(99), "icc_profile": bytes(99), "comment": b"of a picture"}),
        ("PNG", 8, {}),
        ("GIF", 6, {}),
        ("GIF", 6, {"comment": b"of a picture", "transparency": 3}),
        ("WEBP", 12, {}),
        ("WEBP", 12, {"lossless": True}),
        ("AVIF", 12, {}),
        ("BMP", 18, {}),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_a_cut_anywhere_after_the_signature_is_truncated(quick_config, kind, least, options, mode) -> None:
    picture = SMALL.convert(mode) if kind in ("PNG", "GIF", "BMP") else SMALL
    data = encode(picture, kind, **options)
    assert normalise(data, quick_config()).width == 16
    assert failures(data, range(least, len(data) - WITHOUT_END.get(kind, 0)), quick_config()) == {"truncated"}


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
@pytest.mark.parametrize("picture", [NOISE, RAMP], ids=["noise", "ramp"])
@pytest.mark.parametrize("big", [False, True], ids=["tiff", "bigtiff"])
def test_a_tiff_cut_anywhere_is_truncated(quick_config, compression, picture, big) -> None:
    data = encode(picture, "TIFF", compression=compression, big_tiff=big)
    normalise(data, quick_config())
    # Pillow writes the directory before raw pixels and behind all others
    sizes = range(len(data) - 4, 3, -max(1, len(data) // 100))
    assert failures(data, sizes, quick_config()) | failures(data, range(4, 20), quick_config()) == {"truncated"}


@pytest.mark.parametrize("start", [b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"])
@pytest.mark.parametrize("tiled", [False, True], ids=["strips", "tiles"])
def test_a_tiff_whose_directory_comes_first_is_truncated_where_its_pixels_are_cut(quick_config, start, tiled) -> None:
    pixels = Image.fromarray(np.arange(4096, dtype=np.uint8).reshape(64, 64))
    data = tiff(start, zlib.compress(pixels.tobytes()), tiled)
    if start == b"MM\0+":  # Pillow reads no such file
        assert failure(data, quick_config()) == "not_an_image"
    else:
        assert normalise(data, quick_config()).width == 64
    assert failures(data, range(4, len(data), 5), quick_config()) == {"truncated"}


@pytest.mark.parametrize("start", [b"II*\0", b"II+\0"])
def test_a_tiff_that_is_broken_but_whole_is_not_called_cut(quick_config, start) -> None:
    assert failure(tiff(start, b"no zlib stream" * 9, False), quick_config()) == "decode_error"
    for data in (start + bytes(60), b"MM\0*\0\0\0\x08\0\x01" + b"\xff" * 2 + bytes(60)):
        assert failure(data, quick_config()) == "not_an_image"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\xff\xd8\xff\xe0\0\x04ab" + b"<html>not here" * 9, "not_an_image"),
        (b"\xff\xd8\xff\xff\xd9" + bytes(60), "not_an_image"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\0IEND\xaeB`\x82", "not_an_image"),
        (b"GIF89a\x10\0\x10\0\0\0\0" + b"<html>not here", "not_an_image"),
    ],
    ids=["jpeg", "jpeg without a picture", "png without a picture", "gif"],
)
def test_what_only_begins_like_a_picture_is_not_called_cut(quick_config, data, status) -> None:
    assert failure(data, quick_config()) == status


def test_a_jpeg_with_broken_tables_is_not_called_cut(quick_config) -> None:
    for options in ({}, {"progressive": True}):
        data = bytearray(encode(SMALL, "JPEG", **options))
        table = data.rfind(b"\xff\xc4")
        data[table + 5 : table + 21] = b"\xff" * 16  # more codes than there can be
        assert failure(bytes(data), quick_config()) == "decode_error"


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0"]),
    st.binary(max_size=80),
)
def test_whatever_follows_a_signature_raises_nothing_else(signature: bytes, data: bytes) -> None:
    with suppress(ImageError):
        check_parts(signature + data)


def tiff(start: bytes, packed: bytes, tiled: bool) -> bytes:
    """A TIFF of 64 x 64 grey pixels, compressed as deflate, with its directory before them."""
    parts = (
        [(322, 64), (323, 64), (324, None), (325, len(packed))]
        if tiled
        else [(273, None), (278, 64), (279, len(packed))]
    )
    tags = sorted([(256, 64), (257, 64), (258, 8), (259, 8), (262, 1), (277, 1), *parts])
    order, big = "<" if start[:2] == b"II" else ">", b"+" in start
    header, directory, entry, kind = ("HHQ", "Q", "HHQQ", 16) if big else ("I", "H", "HHII", 4)
    offsets = (8, 0, 16) if big else (8,)
    head = start + struct.pack(f"{order}{header}{directory}", *offsets, len(tags))
    rest = struct.calcsize(f"<{entry}") * len(tags) + struct.calcsize(f"<{entry[-1]}")
    pixels_at = len(head) + rest
    entries = [
        struct.pack(f"{order}{entry}", tag, kind, 1, pixels_at if value is None else value) for tag, value in tags
    ]
    return head + b"".join(entries) + bytes(rest - len(b"".join(entries))) + packed
