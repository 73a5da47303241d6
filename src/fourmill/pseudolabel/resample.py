"""Pillow's bilinear resize of 8-bit images, on whatever device the network is on.

The original labellers resized with Pillow before anything else, and a level's difference here and there is enough to swap
boxes and classes that are nearly tied. On a CPU Pillow itself does it; on a GPU its arithmetic is done again: weights in
22 bits, one side after the other, rounded to 8 bits after each. The two are equal to the last bit, but for some images that
are made smaller along both sides, for which Pillow may begin with the other one: then some pixels differ by one level.

C channels, H and W pixels.
"""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

_BITS = 22  # of Pillow's weights: 32 less 8 for the pixel and 2 to spare


def resized(rgb_HWC: NDArray[np.uint8], height: int, width: int, device: torch.device) -> Tensor:
    """An image as (C, height, width) float32, whole numbers in 0..255, on a device."""
    if rgb_HWC.shape[:2] == (height, width):
        return torch.from_numpy(np.array(rgb_HWC)).to(device).permute(2, 0, 1).float()
    if device.type == "cpu":
        made = Image.fromarray(rgb_HWC).resize((width, height), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(made)).permute(2, 0, 1).float()
    pixels_HWC = torch.from_numpy(np.array(rgb_HWC)).to(device)
    return resized_on_device(pixels_HWC.permute(2, 0, 1), height, width)


def resized_on_device(pixels_CHW: Tensor, height: int, width: int) -> Tensor:
    """The same for 8-bit pixels (C, H, W) that are on the device already; sums are exact in float64."""
    x_CHW = pixels_CHW.double()
    if height < x_CHW.shape[1] and width > x_CHW.shape[2]:  # the smaller image of the two ways, as in Pillow 13
        return _along_rows(_along_columns(x_CHW, height), width).float()
    return _along_columns(_along_rows(x_CHW, width), height).float()


def _along_rows(x_CHW: Tensor, width: int) -> Tensor:
    return x_CHW if width == x_CHW.shape[2] else _rounded(x_CHW @ _matrix(x_CHW.shape[2], width, x_CHW.device).T)


def _along_columns(x_CHW: Tensor, height: int) -> Tensor:
    return x_CHW if height == x_CHW.shape[1] else _rounded(_matrix(x_CHW.shape[1], height, x_CHW.device) @ x_CHW)


def _rounded(sums: Tensor) -> Tensor:
    return ((sums + 2 ** (_BITS - 1)) / 2**_BITS).floor_().clamp_(0, 255)


@lru_cache(maxsize=64)  # some 5 MB each, which would take longer to bring to a GPU than to multiply with
def _matrix(size: int, new_size: int, device: torch.device) -> Tensor:
    return torch.from_numpy(_weights(size, new_size)).to(device)


def _weights(size: int, new_size: int) -> NDArray[np.float64]:
    """What each old pixel adds to each new one (new_size, size), in units of 2**-22."""
    scale = size / new_size
    support = max(scale, 1.0)  # of the triangle, which is as wide as a new pixel where these are larger
    centres = (np.arange(new_size) + 0.5) * scale
    first = np.maximum((centres - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centres + support + 0.5).astype(np.int64), size)
    places = np.arange(size)
    triangle = np.maximum(1 - np.abs((places + 0.5 - centres[:, None]) / support), 0)
    triangle[(places < first[:, None]) | (places >= last[:, None])] = 0
    return np.floor(triangle / triangle.sum(1, keepdims=True) * 2**_BITS + 0.5)
