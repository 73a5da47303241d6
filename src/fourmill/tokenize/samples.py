"""A sample's image and labels: which folder, how decoded, how cropped to what tokenizers take. No torch."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourmill.core.crops import CROPPERS, CropRow
from fourmill.core.labels import DECODERS
from fourmill.core.modality import IMAGES, LABEL_FOLDERS

Features = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""Crops (B, S, S, 3) uint8 to dense features (B, h, w, C)."""

FOLDERS = {label: LABEL_FOLDERS.get(label, IMAGES) for label in DECODERS}
"""Folder of the shards of an image and of each label that is a map."""


class LabelError(ValueError):
    """A label that a tokenizer cannot take: found, expected."""


def crop_label_at(
    label: str, data: bytes, input_px: int, size: tuple[int, int], rows: Sequence[CropRow]
) -> NDArray[Any]:
    """Crops of one member.

    Args:
        size: (width, height) of the sample's image, which the label must have.
        rows: in pixels of the image.

    Returns:
        (crops, S, S) or (crops, S, S, 3), of the type that the label's tokenizer takes.

    Raises:
        LabelError: it does not decode, or has another size.
    """
    try:
        array = DECODERS[label](data)
    except ValueError as error:
        raise LabelError(str(error)) from error
    height, width = array.shape[:2]
    if (width, height) != size:
        raise LabelError(f"{label} has {width} x {height} pixels, its image has {size[0]} x {size[1]}")
    return np.stack([CROPPERS[label](array, row, input_px) for row in rows])
