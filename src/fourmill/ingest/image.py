"""Any picture of the open web to a plain one: 8-bit RGB, upright, sRGB, of bounded size; broken ones refused.

JPEGs, nearly all there is, go through libjpeg-turbo and OpenCV; what is unusual goes through Pillow.
"""

from dataclasses import dataclass

from fourmill.ingest.colour import foreign_profile, to_srgb
from fourmill.ingest.config import IngestConfig
from fourmill.ingest.jpeg import JpegHeader, UnsupportedJpegError, check_whole, decode_reduced, read_header
from fourmill.ingest.pictures import decode_any
from fourmill.ingest.pixels import (
    ImageError,
    ImageStatus,
    Pixels,
    Size,
    as_stored,
    check_bounds,
    encode,
    reduced_size,
    turn_upright,
)
from fourmill.ingest.reduce import reduce_to

__all__ = ["ImageError", "ImageStatus", "Normalised", "normalise"]


@dataclass(frozen=True)
class Normalised:
    """A plain picture: `jpeg` is RGB of `width` x `height`; the original sizes are those of the upright original."""

    jpeg: bytes
    width: int
    height: int
    original_width: int
    original_height: int


def normalise(data: bytes, config: IngestConfig) -> Normalised:
    """Decode strictly and bring to 8-bit RGB JPEG. The same bytes give the same bytes, in whatever thread.

    EXIF orientation and an embedded colour profile are applied; transparency is laid over white; of several frames the
    first is kept; the longer side is reduced to `max_side_px` by averaging over areas, never enlarged. A baseline or
    progressive RGB JPEG that needs none of this keeps its bytes, comment and all, when every bit of it can be read.

    Raises:
        ImageError: not an image, cut, undecodable, or outside the bounds of the config; pixels are counted before they
            are decoded.
    """
    header = read_header(data) if data.startswith(b"\xff\xd8") else None
    if header is not None:
        try:
            made = _from_jpeg(data, header, config)
        except UnsupportedJpegError:
            made = None
        if made is not None:
            return made
    rgb, orientation = decode_any(data, config)
    height, width = rgb.shape[:2]
    rgb = reduce_to(rgb, reduced_size(width, height, config.max_side_px))
    return _finished(turn_upright(rgb, orientation), as_stored((width, height), orientation), config)


def _from_jpeg(data: bytes, header: JpegHeader, config: IngestConfig) -> Normalised | None:
    """The picture of a usual JPEG; None when it is whole, as far as can be told, and Pillow must do the rest."""
    stored = header.width, header.height
    check_bounds(*stored, config)
    profile = foreign_profile(header.profile)
    if header.components not in (1, 3) or (header.components == 1 and profile):
        check_whole(data)
        return None
    size = reduced_size(*stored, config.max_side_px)
    plain = header.components == 3 and header.orientation == 1 and not profile and not header.more_frames
    if plain and size == stored:
        check_whole(data)
        return Normalised(data, *stored, *stored)
    rgb = decode_reduced(data, header, size)
    if profile:
        rgb = to_srgb(rgb, profile)
    return _finished(turn_upright(rgb, header.orientation), as_stored(stored, header.orientation), config)


def _finished(rgb: Pixels, original: Size, config: IngestConfig) -> Normalised:
    height, width = rgb.shape[:2]
    return Normalised(encode(rgb, config.jpeg_quality), width, height, *original)
