"""Images and labels as bytes and back: the member formats of `images`, `depth`, `normal`, `semseg` and `boxes`.

A label image has the pixel size of its image. Encoding is deterministic: equal arrays give equal bytes.
"""

import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fourmill.core.modality import NUM_SEMSEG_CLASSES, SEMSEG_INVALID

__all__ = [
    "DECODERS",
    "Box",
    "Picture",
    "are_no_classes",
    "clipped_box",
    "decode_boxes",
    "decode_depth",
    "decode_grey",
    "decode_image",
    "decode_normal",
    "decode_semseg",
    "encode_boxes",
    "encode_depth",
    "encode_grey",
    "encode_normal",
    "encode_semseg",
    "pack_depth",
    "pack_normal",
    "unpack_depth",
    "unpack_normal",
]

MAX_PIXELS = 100_000_000


@dataclass(frozen=True)
class Picture:
    """A decoded image."""

    rgb_HWC: NDArray[np.uint8]
    description: str | None = None  # the JPEG comment; the demo's scenes carry their description there
    _others: dict[tuple[int, int], NDArray[np.uint8]] = field(default_factory=dict, compare=False, repr=False)

    def at(self, height: int, width: int) -> NDArray[np.uint8]:
        """The image (height, width, 3) by Pillow's bilinear filter, kept for who asks again: networks are fed this.

        The original labellers resized with Pillow before anything else, and a level's difference here and there is enough to
        swap boxes and classes that are nearly tied.
        """
        size = (height, width)
        if size == self.rgb_HWC.shape[:2]:
            return self.rgb_HWC
        if size not in self._others:
            made = Image.fromarray(self.rgb_HWC).resize((width, height), Image.Resampling.BILINEAR)
            self._others[size] = np.asarray(made)
        return self._others[size]

    @property
    def num_pixels(self) -> int:
        """Pixels in memory, those of other sizes included."""
        return sum(one.shape[0] * one.shape[1] for one in (self.rgb_HWC, *self._others.values()))


@dataclass(frozen=True)
class Box:
    """A detected object: corners in fractions of the image's width and height, x to the right, y down."""

    xmin: float
    ymin: float
    xmax: float
    ymax: float
    score: float
    class_name: str

    def __post_init__(self) -> None:
        corners = (self.xmin, self.ymin, self.xmax, self.ymax)
        inside = all(0 <= v <= 1 for v in (*corners, self.score))  # also false for NaN
        if not inside or self.xmin > self.xmax or self.ymin > self.ymax or not self.class_name:
            raise ValueError(
                f"box {corners} of class {self.class_name!r} with score {self.score}: corners must be fractions of the "
                "image in [0, 1] with min <= max, the score in [0, 1], the class named"
            )


def clipped_box(corners: Sequence[float], score: float, class_name: str) -> Box | None:
    """A box that a network has found, as labels hold it: inside the image, in steps of a millionth; None where nothing is left.

    Args:
        corners: xmin, ymin, xmax, ymax in shares of the image.
    """
    xmin, ymin, xmax, ymax = (round(min(max(corner, 0.0), 1.0), 6) for corner in corners)
    if xmin >= xmax or ymin >= ymax:
        return None
    return Box(xmin, ymin, xmax, ymax, round(min(score, 1.0), 6), class_name)


def decode_image(data: bytes) -> Picture:
    """Decode a JPEG or PNG of 8-bit RGB (or grey, which becomes RGB), strictly.

    Raises:
        ValueError: not such a file, cut short, or over 100 million pixels.
    """
    image = _begin(data, ("JPEG", "PNG"), "image")
    if image.mode not in ("RGB", "L"):
        raise ValueError(f"image has PIL mode {image.mode}; the store's images are 8-bit RGB: ingest this one again")
    info = cast("dict[str, Any]", image.info)
    comment = info.get("comment")
    description = comment.decode("utf-8", "replace") if isinstance(comment, bytes) else None
    return Picture(_pixels(data, image), description)


def _pixels(data: bytes, begun: Image.Image) -> NDArray[np.uint8]:
    """The image as (H, W, 3). JPEG by libjpeg-turbo alone: less than half of the time, and without the interpreter's lock."""
    if begun.format == "JPEG":
        try:
            return simplejpeg.decode_jpeg(data, "RGB", strict=True)
        except ValueError:  # Pillow forgives what is only odd
            pass
    return np.asarray(_whole(begun, ("JPEG", "PNG"), "image").convert("RGB"))


def pack_depth(depth: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Depth of any shape in [0, 1] as files hold it, in steps of 1/65535; what lies outside is not looked for."""
    return np.rint(depth * np.float32(65535)).astype(np.uint16)


def unpack_depth(packed: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Depth in [0, 1] of what files hold."""
    return packed.astype(np.float32) / np.float32(65535)


def pack_normal(normal: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Components in [-1, 1] of any shape as files hold them: n becomes round((n + 1) / 2 * 255); what lies outside is not looked for."""
    return np.rint((normal + np.float32(1)) * np.float32(127.5)).astype(np.uint8)


def unpack_normal(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Components in [-1, 1] of what files hold."""
    return packed.astype(np.float32) / np.float32(127.5) - np.float32(1)


def encode_depth(depth_HW: NDArray[np.float32]) -> bytes:
    """16-bit PNG of a depth map, (H, W) float in [0, 1], far is large; steps of 1/65535.

    Raises:
        ValueError: another shape, or a value outside [0, 1] or not finite.
    """
    _expect(depth_HW, "depth map", 2, None, 0.0, 1.0)
    return _png(pack_depth(depth_HW), cv2.IMWRITE_PNG_FILTER_PAETH)


def decode_depth(data: bytes) -> NDArray[np.float32]:
    """Depth map of a 16-bit PNG, (H, W) float32 in [0, 1]. Raises ValueError."""
    image = _open(data, ("PNG",), "depth map")
    if image.mode != "I;16":
        raise ValueError(f"depth map has PIL mode {image.mode}, expected a 16-bit grey PNG (I;16)")
    return unpack_depth(np.asarray(image))


def encode_normal(normal_HWC: NDArray[np.float32]) -> bytes:
    """8-bit RGB PNG of a normal map, (H, W, 3) float in [-1, 1], packed by `pack_normal`.

    Vectors are stored as given: the DPT network's own are not exactly of unit length.

    Raises:
        ValueError: another shape, or a value outside [-1, 1] or not finite.
    """
    _expect(normal_HWC, "normal map", 3, 3, -1.0, 1.0)
    return _png(pack_normal(normal_HWC[..., ::-1]), cv2.IMWRITE_PNG_FILTER_PAETH)  # OpenCV has BGR


def decode_normal(data: bytes) -> NDArray[np.float32]:
    """Normal map of an 8-bit RGB PNG, (H, W, 3) float32 in [-1, 1]. Raises ValueError."""
    image = _open(data, ("PNG",), "normal map")
    if image.mode != "RGB":
        raise ValueError(f"normal map has PIL mode {image.mode}, expected an 8-bit RGB PNG")
    return unpack_normal(np.asarray(image))


def encode_semseg(ids_HW: NDArray[np.uint8]) -> bytes:
    """8-bit grey PNG of a class map, (H, W) uint8, ids 0..132 of `COCO_PANOPTIC`, 255 where invalid.

    Raises:
        ValueError: another shape or type, or an id in between.
    """
    data = encode_grey(ids_HW, "class map")
    _check_ids(ids_HW)
    return data


def decode_semseg(data: bytes) -> NDArray[np.uint8]:
    """Class map of an 8-bit grey PNG, (H, W) uint8, ids 0..132, 255 where invalid. Raises ValueError."""
    ids_HW = decode_grey(data, "class map")
    _check_ids(ids_HW)
    return ids_HW


def encode_grey(grey_HW: NDArray[np.uint8], what: str) -> bytes:
    """8-bit grey PNG of any map (H, W) uint8: for labels of one whole number a pixel.

    Args:
        what: what the map is called in an error.

    Raises:
        ValueError: another shape or type.
    """
    if grey_HW.ndim != 2 or grey_HW.dtype != np.uint8 or 0 in grey_HW.shape:
        raise ValueError(f"{what} is {grey_HW.dtype} of shape {grey_HW.shape}, expected uint8 of shape (H, W)")
    return _png(grey_HW, cv2.IMWRITE_PNG_FILTER_UP)


def decode_grey(data: bytes, what: str) -> NDArray[np.uint8]:
    """Map (H, W) uint8 of an 8-bit grey PNG.

    Args:
        what: what the map is called in an error.

    Raises:
        ValueError: not such a file, cut short, or over 100 million pixels.
    """
    image = _open(data, ("PNG",), what)
    if image.mode != "L":
        raise ValueError(f"{what} has PIL mode {image.mode}, expected an 8-bit grey PNG (L)")
    return np.asarray(image)


DECODERS: dict[str, Callable[[bytes], NDArray[Any]]] = {
    "rgb": lambda data: decode_image(data).rgb_HWC,
    "depth": decode_depth,
    "normal": decode_normal,
    "semseg": decode_semseg,
}
"""By what is a map of its image's size: `DECODERS["depth"](data)`."""


def encode_boxes(boxes: list[Box]) -> bytes:
    """The public detection JSON, one instance a box, in order.

    {"instances": [{"boxes": [xmin, ymin, xmax, ymax], "score": .., "class_name": ..}]}
    """
    instances = [
        {"boxes": [b.xmin, b.ymin, b.xmax, b.ymax], "score": b.score, "class_name": b.class_name} for b in boxes
    ]
    return json.dumps({"instances": instances}, allow_nan=False).encode()


def decode_boxes(data: bytes) -> list[Box]:
    """Boxes of a detection JSON, in the file's order. Raises ValueError."""
    try:
        return [
            Box(*(float(v) for v in one["boxes"]), score=float(one["score"]), class_name=str(one["class_name"]))
            for one in json.loads(data)["instances"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"not a detection file ({type(error).__name__}: {error}); expected "
            '{"instances": [{"boxes": [xmin, ymin, xmax, ymax], "score": .., "class_name": ..}]}'
        ) from error


def _expect(array: NDArray[Any], what: str, ndim: int, channels: int | None, low: float, high: float) -> None:
    shape = "(H, W)" if channels is None else f"(H, W, {channels})"
    right = array.ndim == ndim and 0 not in array.shape and (channels is None or array.shape[-1] == channels)
    if not right or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{what} is {array.dtype} of shape {array.shape}, expected floats of shape {shape}")
    least, most = float(array.min()), float(array.max())  # NaN spreads to both
    if not (math.isfinite(least) and low <= least and most <= high):
        raise ValueError(f"{what} holds values from {least} to {most}, expected [{low:g}, {high:g}]")


def are_no_classes(ids: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Where a map of any shape holds neither a class nor the id of none."""
    return (ids >= NUM_SEMSEG_CLASSES) & (ids != SEMSEG_INVALID)


def _check_ids(ids_HW: NDArray[np.uint8]) -> None:
    wrong = are_no_classes(ids_HW)
    if wrong.any():
        first = int(ids_HW[wrong][0])
        raise ValueError(
            f"class map holds id {first}, expected 0..{NUM_SEMSEG_CLASSES - 1}, or {SEMSEG_INVALID} where invalid"
        )


def _png(array: NDArray[Any], filter_kind: int) -> bytes:
    """Runs of equal differences, without a search for longer repetitions: a third of the time for no more bytes."""
    options = [cv2.IMWRITE_PNG_FILTER, filter_kind, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
    is_done, data = cv2.imencode(".png", array, [cv2.IMWRITE_PNG_COMPRESSION, 1, *options])
    if not is_done:
        raise ValueError(f"no PNG could be made of {array.dtype} {array.shape}")
    return data.tobytes()


def _open(data: bytes, formats: tuple[str, ...], what: str) -> Image.Image:
    return _whole(_begin(data, formats, what), formats, what)


def _begin(data: bytes, formats: tuple[str, ...], what: str) -> Image.Image:
    """An image of which only the header is read yet."""
    with _told(formats, what):
        image = Image.open(io.BytesIO(data), formats=formats)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, over {MAX_PIXELS}")
        return image


def _whole(image: Image.Image, formats: tuple[str, ...], what: str) -> Image.Image:
    with _told(formats, what):
        image.load()
    return image


@contextmanager
def _told(formats: tuple[str, ...], what: str) -> Iterator[None]:
    try:
        yield
    except UnidentifiedImageError as error:  # names an object by its address, which no ledger may hold
        raise ValueError(f"not a readable {what}: its bytes are no {' or '.join(formats)} file's") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a readable {what} ({' or '.join(formats)}): {error}") from error
