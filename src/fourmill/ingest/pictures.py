"""Every format but the usual JPEG, by Pillow (plain WebP by OpenCV, which takes half the time for the same pixels).

PNG stays with Pillow: OpenCV is a tenth faster at it, but its libpng writes to the process's stderr what it dislikes.
"""

import io
import logging
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from fourmill.ingest.colour import foreign_profile, image_to_srgb
from fourmill.ingest.config import IngestConfig
from fourmill.ingest.cut import check_announced, check_parts
from fourmill.ingest.pixels import ImageError, Pixels, check_bounds

_LOG = logging.getLogger(__name__)
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_ORIENTATION = 0x0112
_CUT_SIGNS = ("truncated", "unexpected end", "not enough data", "ran out of")


def decode_any(data: bytes, config: IngestConfig) -> tuple[Pixels, int]:
    """Decode the first frame strictly to RGB (H, W, 3) in sRGB, over white, not turned; and its EXIF orientation, 1..8.

    Raises:
        ImageError: not an image, cut, undecodable, or outside the bounds of the config.
    """
    check_announced(data)
    plain = _plain_webp(data, config)
    if plain is not None:
        return plain, 1
    image = _open(data, config)
    orientation = _orientation(image)
    try:
        profile = image.info.get("icc_profile")
        return np.asarray(_to_rgb(image, foreign_profile(profile) if isinstance(profile, bytes) else b"")), orientation
    except Exception as error:
        raise ImageError("decode_error", f"{image.format} of mode {image.mode}: {_said(error)}") from error


def _plain_webp(data: bytes, config: IngestConfig) -> Pixels | None:
    """The pixels of a WebP without alpha, frames, profile or EXIF; None for others, and for damaged ones."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    if data[12:16] == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width = int.from_bytes(data[26:28], "little") & 0x3FFF
        height = int.from_bytes(data[28:30], "little") & 0x3FFF
    elif data[12:16] == b"VP8L" and data[20] == 0x2F and not data[24] & 0x10:
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        return None
    import cv2

    check_bounds(width, height, config)
    rgb = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    return None if rgb is None or rgb.shape != (height, width, 3) else np.asarray(rgb, np.uint8)


def _open(data: bytes, config: IngestConfig) -> Image.Image:
    Image.init()
    try:
        image = Image.open(io.BytesIO(data), formats=[name for name in _FORMATS if name in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too_many_pixels", _said(error)) from error
    except Exception as error:  # decoders raise whatever they trip over
        if not isinstance(error, UnidentifiedImageError) and _is_cut(error):
            raise ImageError("truncated", _said(error)) from error
        check_parts(data)
        raise ImageError("not_an_image", f"no picture in {len(data)} bytes beginning {data[:12]!r}") from error
    check_bounds(image.width, image.height, config)
    try:
        image.load()
    except Exception as error:
        check_parts(data)
        status = "truncated" if _is_cut(error) else "decode_error"
        raise ImageError(status, f"{image.format}: {_said(error)}") from error
    return image


def _orientation(image: Image.Image) -> int:
    try:
        orientation = int(image.getexif().get(_ORIENTATION, 1))
    except Exception as error:
        _LOG.debug("unreadable EXIF taken as none: %s", error)
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def _to_rgb(image: Image.Image, profile: bytes) -> Image.Image:
    alpha = None
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8_bit(np.asarray(image)))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    rgb = image_to_srgb(image, profile) if profile else image.convert("RGB")
    if alpha is None:
        return rgb
    white = Image.new("RGB", rgb.size, "white")
    white.paste(rgb, mask=alpha)
    return white


def _to_8_bit(grey_HW: np.ndarray[Any, Any]) -> Pixels:
    """Deep grey to 8 bits: by its type's range, or for floats from 0..1 (or 0..255 when they go beyond 1)."""
    values = np.nan_to_num(grey_HW.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    most = values.max(initial=0.0)
    if grey_HW.dtype.kind == "f":
        scale = 255.0 if most <= 1 else 1.0
    elif grey_HW.dtype.itemsize == 2:
        scale = 255 / 65535
    else:  # Pillow widens what it cannot name to 32 bits; the values tell what was meant
        scale = 1.0 if most <= 255 else 255 / 65535 if most <= 65535 else 255 / (2**31 - 1)
    return np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)


def _is_cut(error: Exception) -> bool:
    return isinstance(error, EOFError) or any(sign in str(error).lower() for sign in _CUT_SIGNS)


def _said(error: BaseException) -> str:
    return (str(error) or type(error).__name__)[:200]
