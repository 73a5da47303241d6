"""Crop settings and how each modality is cropped, resized and mirrored.

A crop is a row (top, left, height, width, hflip) in pixels of the full image; row 0 of a sample's settings is the
centre square. Labels have their image's pixel size, so one row serves all modalities. Mirroring a normal map also turns its
x axis round. Images, depth and normals are resized as the public code's tokenizers have seen them, by PIL's default for pictures (bicubic
with antialiasing); classes by the nearest pixel.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fourmill.core.digest import digest_config
from fourmill.core.labels import pack_normal, unpack_normal
from fourmill.core.names import SampleKey

CropRow = tuple[int, int, int, int, int]
"""top, left, height, width, hflip (0 or 1)."""

CropBox = tuple[float, float, float, float, int]
"""A row of which fractions of pixels count, as croppers take it; every `CropRow` is one."""

_Edges = tuple[float, float, float, float]
_RATIO = (0.75, 4 / 3)  # width over height, as torchvision's and the public code's
_SLACK_PX = 1e-6  # fractions add up to a little more than a side


def centre_crop(width: int, height: int) -> CropRow:
    """The largest centred square of an image, not mirrored.

    Raises:
        ValueError: a side is not positive.
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} x {height} pixels has no crop; both sides must be at least 1")
    side = min(width, height)
    return (height - side) // 2, (width - side) // 2, side, side, 0


class CropConfig(BaseModel):
    """Which crops of an image are tokenized: the centre square, and further ones at random, mirrored at random.

    The defaults of the random ones are those of the public `save_vq_tokens`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num: Annotated[int, Field(gt=0, le=100)] = Field(default=1, description="Crops a sample; the first is the centre.")
    scale: tuple[float, float] = Field(default=(0.8, 1.0), description="Share of the image's area, from and to.")
    ratio: tuple[float, float] = Field(default=_RATIO, description="Width over height, from and to.")
    hflip: Annotated[float, Field(ge=0, le=1)] = Field(default=0.5, description="Share that is mirrored.")
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Of what is drawn, with the sample's key.")

    @model_validator(mode="after")
    def _ranges(self) -> "CropConfig":
        if not 0 < self.scale[0] <= self.scale[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(
                f"scale {self.scale} must lie in (0, 1] and ratio {self.ratio} be positive, the lower first"
            )
        return self

    @property
    def digest(self) -> str:
        """Digest of all that decides the crops; empty for the centre alone, where nothing is drawn."""
        return digest_config(self) if self.num > 1 else ""


def crop_rows(key: SampleKey, width: int, height: int, config: CropConfig) -> list[CropRow]:
    """The crops of one sample: a function of its key, its image's size and the config, so all its modalities have the same.

    Row 0 is the centre square. Further ones are drawn as torchvision's RandomResizedCrop does: area and aspect, then the
    place.

    Args:
        width: of the full image, in pixels, as its height.
    """
    centre = centre_crop(width, height)
    return [centre, *(_random_crop(int(key), i, width, height, config) for i in range(1, config.num))]


def _random_crop(number: int, i: int, width: int, height: int, config: CropConfig) -> CropRow:
    draw = np.random.default_rng([config.seed, number, i])
    is_mirrored = int(draw.random() < config.hflip)
    return (*random_crop(draw, width, height, config.scale, config.ratio)[:4], is_mirrored)


def random_crop(
    draw: np.random.Generator,
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float] = _RATIO,
) -> CropRow:
    """A crop of an image, not mirrored, as torchvision's RandomResizedCrop draws it: area, aspect, then the place.

    Args:
        scale: share of the image's area, from and to.
        ratio: width over height, from and to; its logarithm is uniform.

    Returns:
        Its row; where no draw of ten fits, that of the largest crop in the centre whose ratio is in the range.
    """
    for _ in range(10):
        area = width * height * draw.uniform(*scale)
        aspect = math.exp(draw.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(draw.integers(height - crop_height + 1))
            return top, int(draw.integers(width - crop_width + 1)), crop_height, crop_width, 0
    crop_width = min(width, max(1, round(height * ratio[1])))
    crop_height = min(height, max(1, round(width / ratio[0])))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width, 0


def crop_rgb(rgb_HWC: NDArray[np.uint8], row: CropBox, size_px: int) -> NDArray[np.uint8]:
    """Crop and resize an image, (H, W, 3) uint8 to (S, S, 3) uint8, bicubic with antialiasing as PIL does it."""
    part, edges = _cut(rgb_HWC, row)
    return _resized(part, edges, size_px, Image.Resampling.BICUBIC)


def crop_depth(depth_HW: NDArray[np.float32], row: CropBox, size_px: int) -> NDArray[np.float32]:
    """Crop and resize a depth map, (H, W) float32 to (S, S) float32, both in [0, 1]; as an image is, bicubic with antialiasing."""
    part, edges = _cut(depth_HW, row)
    resized = _resized(np.asarray(part, np.float32), edges, size_px, Image.Resampling.BICUBIC)
    return np.clip(resized, 0, 1)  # which bicubic leaves beside an edge


def crop_normal(normal_HWC: NDArray[np.float32], row: CropBox, size_px: int) -> NDArray[np.float32]:
    """Crop and resize a normal map, (H, W, 3) float32 to (S, S, 3) float32, both in [-1, 1].

    Resized as the 8-bit image that files hold, bicubic with antialiasing: lengths are what becomes of them, as they are those of the
    network where nothing is resized. A mirrored map's x component changes sign.
    """
    part, edges = _cut(normal_HWC, row)
    if not _fits(part, edges, size_px):
        part = unpack_normal(_resized(pack_normal(part), edges, size_px, Image.Resampling.BICUBIC))
    if row[4]:
        part = part * np.array([-1, 1, 1], np.float32)
    return np.ascontiguousarray(part, np.float32)


def crop_semseg(ids_HW: NDArray[np.uint8], row: CropBox, size_px: int) -> NDArray[np.uint8]:
    """Crop and resize a class map, (H, W) uint8 to (S, S) uint8, by the nearest pixel."""
    part, edges = _cut(ids_HW, row)
    return _resized(part, edges, size_px, Image.Resampling.NEAREST)


CROPPERS: dict[str, Callable[[Any, CropBox, int], Any]] = {
    "rgb": crop_rgb,
    "depth": crop_depth,
    "normal": crop_normal,
    "semseg": crop_semseg,
}
"""By what is cropped: `CROPPERS["depth"](depth_HW, row, size_px)`."""


def _cut(array: NDArray[Any], row: CropBox) -> tuple[NDArray[Any], _Edges]:
    """The pixels that a crop touches, mirrored where it is, and its edges (left, top, right, bottom) among them."""
    top, left, height, width, hflip = row
    full_height, full_width = array.shape[:2]
    bottom, right = top + height, left + width
    inside = 0 <= top < bottom <= full_height + _SLACK_PX and 0 <= left < right <= full_width + _SLACK_PX
    if not inside or hflip not in (0, 1):
        raise ValueError(
            f"crop (top {top}, left {left}, height {height}, width {width}, hflip {hflip}) does not fit an image of "
            f"{full_width} x {full_height} pixels; labels must have their image's size, and crops come from crop_rows"
        )
    first, start = math.floor(top), math.floor(left)
    part = array[first : math.ceil(bottom), start : math.ceil(right)]
    down, across = part.shape[:2]
    edges = left - start, top - first, min(right - start, across), min(bottom - first, down)
    return (part[:, ::-1], (across - edges[2], edges[1], across - edges[0], edges[3])) if hflip else (part, edges)


def _fits(part: NDArray[Any], edges: _Edges, size_px: int) -> bool:
    """Whether the pixels are the crop as they are."""
    return part.shape[:2] == (size_px, size_px) and edges == (0, 0, size_px, size_px)


def _resized(part: NDArray[Any], edges: _Edges, size_px: int, how: Image.Resampling) -> NDArray[Any]:
    part = np.ascontiguousarray(part)
    if _fits(part, edges, size_px):
        return part
    return np.asarray(Image.fromarray(part).resize((size_px, size_px), how, edges))
