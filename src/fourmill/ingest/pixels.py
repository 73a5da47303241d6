"""Pixels between decoding and encoding: their bounds, turned upright, written as JPEG. OpenCV and libjpeg-turbo."""

from typing import Any, Literal

import numpy as np

from fourmill.ingest.config import IngestConfig

ImageStatus = Literal["not_an_image", "truncated", "decode_error", "too_many_pixels", "too_small", "too_elongated"]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Size = tuple[int, int]  # width, height


class ImageError(ValueError):
    """A picture that cannot be used: its class for the ledger, and a sentence."""

    def __init__(self, status: ImageStatus, reason: str) -> None:
        super().__init__(reason)
        self.status: ImageStatus = status
        self.reason = reason


def use_one_thread() -> None:
    """Keep OpenCV of this process to the calling thread: for workers that share a machine with as many as it has cores."""
    import cv2

    cv2.setNumThreads(1)


def check_bounds(width: int, height: int, config: IngestConfig) -> None:
    """Refuse a picture by its upright size, before it is decoded.

    Raises:
        ImageError: more pixels than `max_pixels`, a side below `min_side_px`, or longer than `max_aspect` times its other.
    """
    shorter, longer = sorted((width, height))
    if width * height > config.max_pixels:
        raise ImageError("too_many_pixels", f"{width} x {height} pixels, over {config.max_pixels}")
    if shorter < config.min_side_px:
        raise ImageError("too_small", f"{width} x {height} pixels, a side below {config.min_side_px}")
    if config.max_aspect is not None and longer > shorter * config.max_aspect:
        raise ImageError("too_elongated", f"{width} x {height} pixels, its sides more than {config.max_aspect:g} to 1")


def reduced_size(width: int, height: int, max_side_px: int) -> Size:
    """Width and height with the longer side bounded, proportions kept, never enlarged, never 0."""
    longer = max(width, height)
    if longer <= max_side_px:
        return width, height
    scale = max_side_px / longer
    return max(1, round(width * scale)), max(1, round(height * scale))


def as_stored(size: Size, orientation: int) -> Size:
    """An upright size before the picture is turned, and the other way round."""
    width, height = size
    return (height, width) if orientation >= 5 else size


def turn_upright(rgb: Pixels, orientation: int) -> Pixels:
    """Undo an EXIF orientation, 1..8; from 5 on, width and height change places."""
    import cv2

    match orientation:
        case 2:
            turned = cv2.flip(rgb, 1)
        case 3:
            turned = cv2.rotate(rgb, cv2.ROTATE_180)
        case 4:
            turned = cv2.flip(rgb, 0)
        case 5:
            turned = cv2.transpose(rgb)
        case 6:
            turned = cv2.rotate(rgb, cv2.ROTATE_90_CLOCKWISE)
        case 7:
            turned = cv2.rotate(cv2.transpose(rgb), cv2.ROTATE_180)
        case 8:
            turned = cv2.rotate(rgb, cv2.ROTATE_90_COUNTERCLOCKWISE)
        case _:
            return rgb
    return np.asarray(turned, np.uint8)


def encode(rgb: Pixels, quality: int) -> bytes:
    """Baseline JPEG, chroma 4:2:0, nothing but the picture in it."""
    import simplejpeg

    return simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), quality=quality, colorspace="RGB", colorsubsampling="420")
