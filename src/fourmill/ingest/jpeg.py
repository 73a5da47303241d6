"""JPEG by libjpeg-turbo: the header read before anything is decoded, strict decoding, at a reduced scale where that is as good."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fourmill.ingest.cut import check_parts
from fourmill.ingest.pixels import ImageError, Pixels, Size
from fourmill.ingest.reduce import MAX_ERROR, Detail, reduce_to

_SOI, _SOS, _EOI, _APP1, _APP2 = 0xD8, 0xDA, 0xD9, 0xE1, 0xE2
_STANDALONE = {0x01, *range(0xD0, 0xD8)}
_CODINGS: dict[int, Literal["baseline", "progressive"]] = {0xC0: "baseline", 0xC1: "baseline", 0xC2: "progressive"}
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # 0xC4, 0xC8, 0xCC are tables and reserved
_ORIENTATION = 0x0112

MAX_SCANS = 100
"""Scans a picture may have. Encoders make about ten; each costs a pass over all pixels, however few bytes it has."""

# Reduced decoding keeps the low frequencies of each 8 x 8 block, area averaging a little of the others too, so what they
# differ by grows with the sharpness of the picture and falls with the pixels averaged after it. Fitted from above on 79
# photographs and on noise, text, edges and zone plates of 600 to 4000 pixels; tests/ingest/test_image_quality.py holds it.
_ERROR_OF_SHARPNESS = {2: 0.04, 4: 0.08, 8: 0.08}
_ERROR_FALL = 2.2
# An attempt that fails costs most of a decoding. Of 64 photographs these pass in eight cases of ten and more; soft ones all.
_SURE_MARGIN = 1.8  # times the target's size
_SOFT_MARGIN, _SOFT_BITS = 1.5, 1.2  # that of pictures of few bits of the file a pixel
_FAIR_BITS = (
    2.0  # up to here half size is tried with any margin: it saves more than decoding, the averages of a full picture
)
# A pixel decoded at 1/2, 1/4 or 1/8 is the mean of those it stands for, so where these fill the areas wanted, reduced decoding
# gives the same, whatever the picture: all but what colours stored at half size lose at the borders, less in larger areas.
_SURE_AREA_PX = 6  # a side: 43 dB on photographs, 38 on noise

_CUT = ("premature end", "empty")
_BROKEN = ("corrupt jpeg data", "corrupt", "inconsistent progression", "bogus")


@dataclass(frozen=True)
class JpegHeader:
    """What the markers before the first scan say. Sizes in pixels, as stored: not yet turned upright."""

    width: int
    height: int
    components: int
    coding: Literal["baseline", "progressive"]
    orientation: int  # of EXIF, 1..8
    profile: bytes  # ICC, empty when there is none
    more_frames: bool  # further pictures follow the first one


class UnsupportedJpegError(ValueError):
    """A JPEG that this decoder does not know; another one may."""


def read_header(data: bytes) -> JpegHeader | None:
    """The header of a JPEG of 8 bits, or None for what is no JPEG or an unusual one.

    Raises:
        ImageError: more than `MAX_SCANS` scans.
    """
    frame, orientation, xmp_turns, more_frames = None, 0, False, False
    profile: dict[int, bytes] = {}
    for marker, start, end in _segments(data):
        if marker in _FRAMES:
            if frame is not None or marker not in _CODINGS or end - start < 6:
                return None
            bits, height, width, components = struct.unpack_from(">BHHB", data, start)
            if bits != 8 or not height or not width:
                return None
            frame = (width, height, components, _CODINGS[marker])
        elif marker == _APP1 and data.startswith(b"Exif\0\0", start):
            orientation = orientation or _orientation(data[start + 6 : end])
        elif marker == _APP1 and data.startswith(b"http://ns.adobe.com/xap/1.0/\0", start):
            xmp_turns = xmp_turns or b"tiff:Orientation" in data[start:end]
        elif marker == _APP2 and data.startswith(b"ICC_PROFILE\0", start) and end - start > 14:
            profile.setdefault(data[start + 12], data[start + 14 : end])
        elif marker == _APP2 and data.startswith(b"MPF\0", start):
            more_frames = True
        elif marker == _SOS:
            break
    else:
        return None
    if frame is None or (xmp_turns and not orientation):
        return None
    scans = data.count(b"\xff\xda") if frame[3] == "progressive" else 1
    if scans > MAX_SCANS:
        raise ImageError("decode_error", f"JPEG: {scans} scans, more than {MAX_SCANS}, which no encoder makes")
    whole_profile = b"".join(part for _, part in sorted(profile.items()))
    return JpegHeader(*frame, orientation or 1, whole_profile, more_frames)


def check_whole(data: bytes) -> None:
    """Read every bit of a JPEG strictly, at the smallest scale and without its colours, a third of the cost of decoding.

    Raises:
        ImageError: cut or damaged.
        UnsupportedJpegError: this decoder does not know it.
    """
    _decode(data, 1, 1, 8, "GRAY")


def decode_reduced(data: bytes, header: JpegHeader, size: Size) -> Pixels:
    """Decode strictly to RGB (height, width, 3) of `size`, as stored (not turned), never enlarged.

    Decoded at a half, a quarter or an eighth where that gives what a full decode reduced by area gives (38 dB and more): at once
    where the ratio is a whole multiple of it; else a picture too sharp for it is decoded again at twice the size, in the end in
    full.

    Args:
        size: width and height wanted, in the picture's proportions.

    Raises:
        ImageError: cut or damaged.
        UnsupportedJpegError: this decoder does not know it.
    """
    whole = _whole_factor(header, size)
    if whole:
        return reduce_to(_decode(data, header.height // whole, header.width // whole, whole, "RGB"), size)
    ratio = max(header.width, header.height) / max(size)
    for factor in _factors(ratio, len(data) * 8 / (header.width * header.height)):
        rgb = _decode(data, -(-header.height // factor), -(-header.width // factor), factor, "RGB")
        detail = Detail.of(rgb)
        error = _expected_error(rgb, detail, header, factor, ratio / factor)
        if error <= MAX_ERROR:
            return reduce_to(rgb, size, detail, error)
    return reduce_to(_decode(data, header.height, header.width, 1, "RGB"), size)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, and where its content begins and ends, up to the first scan."""
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return
        marker = data[at + 1]
        if marker == 0xFF:  # fill
            at += 1
            continue
        if marker in _STANDALONE:
            at += 2
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        end = at + 2 + length
        if marker in (_SOI, _EOI) or length < 2 or end > len(data):
            return
        yield marker, at + 4, end
        at = end


def _orientation(tiff: bytes) -> int:
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 0
    try:
        (folder,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, folder)
        for at in range(folder + 2, folder + 2 + 12 * count, 12):
            tag, kind, _ = struct.unpack_from(order + "HHI", tiff, at)
            if tag == _ORIENTATION:
                (value,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), tiff, at + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass  # broken EXIF is taken as none
    return 0


def _whole_factor(header: JpegHeader, size: Size) -> int:
    """The largest reduction whose pixels fill large areas without a rest; 0 when there is none."""
    across, down = header.width // size[0], header.height // size[1]
    if (across * size[0], down * size[1]) != (header.width, header.height) or min(across, down) < _SURE_AREA_PX:
        return 0
    return next((factor for factor in (8, 4, 2) if across % factor == down % factor == 0), 0)


def _factors(ratio: float, bits_a_pixel: float) -> list[int]:
    """Reductions worth an attempt, the largest first."""
    margin = _SOFT_MARGIN if bits_a_pixel <= _SOFT_BITS else _SURE_MARGIN
    coarse = [factor for factor in (8, 4, 2) if ratio / factor >= margin]
    if not coarse and ratio >= 2 and bits_a_pixel <= _FAIR_BITS:
        coarse = [2]
    return coarse


def _expected_error(rgb: Pixels, detail: Detail, header: JpegHeader, factor: int, margin: float) -> float:
    """Upper estimate of the mean square that reduced decoding puts in, in 8-bit steps, after reducing by `margin`.

    Two parts: sharpness (a sharper picture has more of the frequencies that reduced decoding drops), and the picture's shift
    where its size is no multiple of the factor.
    """
    height, width = rgb.shape[:2]
    shift_x, shift_y = width - header.width / factor, height - header.height / factor
    shift = shift_x**2 * detail.across + shift_y**2 * detail.down
    return _ERROR_OF_SHARPNESS[factor] * margin**-_ERROR_FALL * detail.sharpness + shift / 3 / margin**0.5


def _decode(data: bytes, min_height: int, min_width: int, factor: int, colours: Literal["RGB", "GRAY"]) -> Pixels:
    import simplejpeg

    try:
        return simplejpeg.decode_jpeg(
            data, colours, min_height=min_height, min_width=min_width, min_factor=factor, strict=True
        )
    except ValueError as error:
        said = str(error)
        if any(sign in said.lower() for sign in _CUT):
            raise ImageError("truncated", f"JPEG: {said[:200]}") from error
        if any(sign in said.lower() for sign in _BROKEN):
            check_parts(data)  # one that ends within a table between its scans
            raise ImageError("decode_error", f"JPEG: {said[:200]}") from error
        raise UnsupportedJpegError(said) from error
