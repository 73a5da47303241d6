"""Any picture of the open web to a plain one: 8-bit RGB, upright, sRGB, of bounded size; broken ones refused."""

import io
import logging
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from fourmill.ingest.config import IngestConfig

ImageStatus = Literal["not_an_image", "truncated", "decode_error", "too_many_pixels"]

_LOG = logging.getLogger(__name__)
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_UPRIGHT = {  # EXIF orientations; from 5 on, width and height change places
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_CUT_SIGNS = ("truncated", "broken data stream", "unexpected end", "not enough data", "ran out of")


class ImageError(ValueError):
    """A picture that cannot be used: its class for the ledger, and a sentence."""

    def __init__(self, status: ImageStatus, reason: str) -> None:
        super().__init__(reason)
        self.status: ImageStatus = status
        self.reason = reason


@dataclass(frozen=True)
class Normalised:
    """A plain picture: `jpeg` is RGB of `width` x `height`; the original sizes are those of the upright original."""

    jpeg: bytes
    width: int
    height: int
    original_width: int
    original_height: int


def normalise(data: bytes, config: IngestConfig) -> Normalised:
    """Decode strictly and bring to 8-bit RGB JPEG.

    EXIF orientation and an embedded colour profile are applied; transparency is laid over white; of several frames the
    first is kept; the longer side is reduced to `max_side_px` (Lanczos), never enlarged. An RGB JPEG that needs none of
    this keeps its bytes, comment and all.

    Raises:
        ImageError: not an image, cut, undecodable, or of more than `max_pixels`.
    """
    image = _open(data, config.max_pixels)
    orientation = _orientation(image)
    turn = _UPRIGHT.get(orientation)
    width, height = image.size[::-1] if orientation >= 5 and turn is not None else image.size
    profile = _profile(image)
    longer = max(width, height)
    if (image.format, image.mode) == ("JPEG", "RGB") and turn is None and not profile and longer <= config.max_side_px:
        return Normalised(data, width, height, width, height)
    try:
        rgb = _to_rgb(image, profile)
        if turn is not None:  # one of them is 0
            rgb = rgb.transpose(turn)
        if longer > config.max_side_px:
            scale = config.max_side_px / longer
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            rgb = rgb.resize(size, Image.Resampling.LANCZOS)
        sink = io.BytesIO()
        rgb.info = {}  # no comment, profile or date of the original
        rgb.save(sink, "JPEG", quality=config.jpeg_quality, subsampling=0)
    except Exception as error:
        raise ImageError("decode_error", f"{image.format} of mode {image.mode}: {_said(error)}") from error
    return Normalised(sink.getvalue(), rgb.width, rgb.height, width, height)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    Image.init()
    try:
        image = Image.open(io.BytesIO(data), formats=[name for name in _FORMATS if name in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too_many_pixels", _said(error)) from error
    except Exception as error:  # decoders raise whatever they trip over
        if not isinstance(error, UnidentifiedImageError) and _is_cut(error):
            raise ImageError("truncated", _said(error)) from error
        raise ImageError("not_an_image", f"no picture in {len(data)} bytes beginning {data[:12]!r}") from error
    if image.width * image.height > max_pixels:
        raise ImageError("too_many_pixels", f"{image.width} x {image.height} pixels, over {max_pixels}")
    try:
        image.load()
    except Exception as error:
        status = "truncated" if _is_cut(error) else "decode_error"
        raise ImageError(status, f"{image.format}: {_said(error)}") from error
    return image


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception as error:
        _LOG.debug("unreadable EXIF taken as none: %s", error)
        return 1


def _profile(image: Image.Image) -> bytes:
    """The embedded colour profile, empty when there is none, it is broken, or it is sRGB anyway."""
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or not profile:
        return b""
    try:
        described = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile)))
    except Exception as error:
        _LOG.debug("unreadable colour profile taken as none: %s", error)
        return b""
    return b"" if "srgb" in described.lower() else profile


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
    rgb = _to_srgb(image, profile) if profile else image.convert("RGB")
    if alpha is None:
        return rgb
    white = Image.new("RGB", rgb.size, "white")
    white.paste(rgb, mask=alpha)
    return white


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        made = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError) as error:  # a grey profile in a colour picture, and the like
        _LOG.debug("colour profile does not fit %s and is passed over: %s", image.mode, error)
        made = None
    return made if made is not None else image.convert("RGB")


def _to_8_bit(grey_HW: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
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
