"""Whether the bytes of a picture end early, by what its format says of its own parts."""

import re
import struct
from typing import Any

import numpy as np

from fourmill.ingest.pixels import ImageError

_LARGEST_BOXES = 64  # top-level boxes of an AVIF that are looked at
_TIFF_ORDERS = {b"II": "<", b"MM": ">"}
_TIFF_STRIPS, _TIFF_TILES = (273, 279), (324, 325)  # tags of their offsets and lengths
_TIFF_PARTS = {*_TIFF_STRIPS, *_TIFF_TILES}
_TIFF_SIZES = {
    **{1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8},
    **{13: 4, 16: 8, 17: 8, 18: 8},
}  # bytes, by type
_TIFF_UNSIGNED = (3, 4, 16)  # types, of 2, 4 and 8 bytes
_JPEG_SOS, _JPEG_EOI = 0xDA, 0xD9
_JPEG_AFTER_SCAN = re.compile(rb"\xff[\xc4\xd9-\xdd\xe0-\xef\xfe]")  # any other mark there is damage, not a part


def check_announced(data: bytes) -> None:
    """Refuse as cut what is shorter than it says: formats that announce their length, WebP and AVIF.

    Raises:
        ImageError: "truncated".
    """
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        _check("WEBP", data, 8 + int.from_bytes(data[4:8], "little"))
    elif data[4:12] in (b"ftypavif", b"ftypavis"):
        _check_avif(data)


def check_parts(data: bytes) -> None:
    """Refuse as cut what ends within a part of the picture: a header, a palette, a chunk, a strip that is pointed to.

    To be asked only after decoding has failed: there are whole pictures with wrong lengths in them.

    Raises:
        ImageError: "truncated".
    """
    if data[:3] == b"\xff\xd8\xff":
        _check("JPEG", data, _jpeg_bytes(data))
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        _check("PNG", data, _png_bytes(data))
    elif data[:6] in (b"GIF87a", b"GIF89a"):
        _check("GIF", data, _gif_bytes(data))
    elif data[:4] in (b"II*\0", b"MM\0*"):
        _check("TIFF", data, _tiff_bytes(data, 4))
    elif data[:4] in (b"II+\0", b"MM\0+"):
        _check("BigTIFF", data, _tiff_bytes(data, 8))


def _check(name: str, data: bytes, needed: int) -> None:
    if needed > len(data):
        raise ImageError("truncated", f"{name}: {len(data)} of at least {needed} bytes")


def _check_avif(data: bytes) -> None:
    at, kinds = 0, set[bytes]()
    for _ in range(_LARGEST_BOXES):
        if at + 8 > len(data):
            break
        size = int.from_bytes(data[at : at + 4], "big")
        if size < 8:  # to the end, or of 64 bits: the decoder will say
            return
        kinds.add(data[at + 4 : at + 8])
        at += size
        _check("AVIF", data, at)
    else:
        return
    if b"meta" not in kinds or (b"mdat" not in kinds and b"idat" not in data):
        raise ImageError("truncated", f"AVIF: {len(data)} bytes, which end before the picture's")


def _jpeg_bytes(data: bytes) -> int:
    """Bytes up to the mark of the end; 0 where what should be marks are none."""
    at = 2
    while at + 4 <= len(data):
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:  # fill
            at += 1
            continue
        if marker == _JPEG_EOI:
            return at + 2
        if data[at] != 0xFF or length < 2:
            return 0
        at += 2 + length
        if marker == _JPEG_SOS:
            after = _JPEG_AFTER_SCAN.search(data, at)
            at = after.start() if after else len(data)
    return at + 2 if data[at : at + 2] == b"\xff\xd9" else max(at, len(data) + 1)


def _png_bytes(data: bytes) -> int:
    at = 8
    while at + 8 <= len(data):
        kind = data[at + 4 : at + 8]
        at += 12 + int.from_bytes(data[at : at + 4], "big")
        if kind == b"IEND":
            return at
    return max(at, len(data) + 1)


def _gif_bytes(data: bytes) -> int:
    """Bytes up to the first picture's, which the decoder looks after; 0 where there is none or the blocks are none."""
    at = 13 + (_gif_palette_bytes(data[10]) if len(data) > 10 else 0)
    while at < len(data):
        if data[at] == 0x2C:
            at += 10
            return at + 1 + (_gif_palette_bytes(data[at - 1]) if at <= len(data) else 0)
        if data[at] != 0x21:
            return 0
        at += 2
        while at < len(data) and data[at]:
            at += 1 + data[at]
        at += 1
    return max(at, len(data) + 1)


def _gif_palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _tiff_bytes(data: bytes, word: int) -> int:
    """Bytes up to the end of all that the first directory points to; 0 where it is none.

    Args:
        word: bytes of an offset and of a count of values; 4, or 8 in a BigTIFF.
    """
    order, word_code, count_code = _TIFF_ORDERS[data[:2]], *(("I", "H") if word == 4 else ("Q", "Q"))
    if len(data) < 2 * word:
        return 2 * word
    count_bytes, entry_bytes = struct.calcsize(f"<{count_code}"), 4 + 2 * word
    start = struct.unpack_from(f"{order}{word_code}", data, word)[0] + count_bytes
    if start < 2 * word + count_bytes:
        return 0  # a directory within the header is none
    if start > len(data):
        return start
    end = start + entry_bytes * struct.unpack_from(f"{order}{count_code}", data, start - count_bytes)[0]
    if end > len(data):
        return end
    parts: dict[int, np.ndarray[Any, np.dtype[np.int64]]] = {}
    for entry in range(start, end, entry_bytes):
        tag, kind, count = struct.unpack_from(f"{order}HH{word_code}", data, entry)
        size, value = count * _TIFF_SIZES.get(kind, 0), entry + 4 + word
        at = value if size <= word else struct.unpack_from(f"{order}{word_code}", data, value)[0]
        if at + size > len(data):
            return at + size
        if kind in _TIFF_UNSIGNED and tag in _TIFF_PARTS and tag not in parts:
            parts[tag] = np.frombuffer(data, f"{order}u{_TIFF_SIZES[kind]}", count, at).astype(np.int64)
    return max(_last_end(parts.get(offsets), parts.get(lengths)) for offsets, lengths in (_TIFF_STRIPS, _TIFF_TILES))


def _last_end(starts: np.ndarray | None, sizes: np.ndarray | None) -> int:
    if starts is None or sizes is None:
        return 0
    known = min(len(starts), len(sizes))
    return int((starts[:known] + sizes[:known]).max(initial=0))
