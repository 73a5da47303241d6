"""What the store holds to what networks eat, and back. Nobody outside knows a mean, a scale or a shift.

| label  | API                                         | as files hold it | network                                         |
|--------|---------------------------------------------|------------------|-------------------------------------------------|
| rgb    | uint8 (B, S, S, 3)                          | the same         | [-1, 1]                                         |
| depth  | float32 (B, S, S), 0..1                     | uint16           | standardised per image without the outer tenths |
| normal | float32 (B, S, S, 3), components in [-1, 1] | uint8            | as it is                                        |
| semseg | uint8 (B, S, S), raw ids, 255 none          | the same         | class rows: ids + 1, 0 none                     |
| clip   | float32 (B, h, w, C)                        | never stored     | as it is                                        |

`tokenize` takes both. `detokenize` gives the API's, or with `as_stored` what files hold, whichever way labels were given.
"""

# B batch, S side of a square in pixels, C channels, h w token grid, N tokens

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fourmill.core.labels import are_no_classes, pack_depth, pack_normal
from fourmill.core.metrics import DEPTH_EPS, DEPTH_TAIL, standardise_depth
from fourmill.core.modality import NUM_SEMSEG_CLASSES, SEMSEG_INVALID
from fourmill.core.streams import to_device
from fourmill.tokenize.config import ImageLabel, ImageTokenizerConfig
from fourmill.tokenize.samples import LabelError
from fourmill.tokenize.train_set import unpack

Batch = NDArray[Any]

_KINDS: dict[ImageLabel, tuple[type[np.generic], ...]] = {
    "rgb": (np.uint8,),
    "depth": (np.float32, np.uint16),
    "normal": (np.float32, np.uint8),
    "semseg": (np.uint8,),
    "clip": (np.float32,),
}
_RANGES = {"depth": (0.0, 1.0), "normal": (-1.0, 1.0)}


def check_batch(batch: Batch | Tensor, config: ImageTokenizerConfig) -> None:
    """See that a batch is what the tokenizer's label is stored as: squares of the training's side, or of another that fits.

    Features may be a tensor on any device: they are never stored, and going by the host would take longer than making them.

    Raises:
        LabelError: another type, shape, size or range.
    """
    label = config.label
    if isinstance(batch, Tensor):
        if label != "clip":
            raise LabelError(
                f"{label} is a tensor, expected an array as the store holds it; only features may be tensors"
            )
        _check_features(batch, config)
        return
    channels = {"rgb": (3,), "normal": (3,), "clip": (config.feature_dim,)}.get(label, ())
    kinds = _KINDS[label]
    square = batch.ndim == 3 + len(channels) and batch.shape[1] == batch.shape[2] and batch.shape[3:] == channels
    if batch.dtype not in kinds or not square:
        expected = ", ".join(map(str, ("B", "S", "S", *channels)))
        known = " or ".join(np.dtype(kind).name for kind in kinds)
        raise LabelError(f"{label} is {batch.dtype} {batch.shape}, expected {known} ({expected})")
    grid_of(batch.shape[1] * config.patch_px if label == "clip" else batch.shape[1], config)
    if batch.dtype == np.float32:
        _check_range(batch, label)
    elif label == "semseg":
        wrong = are_no_classes(batch)
        if wrong.any():
            raise LabelError(
                f"semseg holds class {batch[wrong][0]}, expected 0..{NUM_SEMSEG_CLASSES - 1}, or {SEMSEG_INVALID} for none"
            )


def _check_features(features: Tensor, config: ImageTokenizerConfig) -> None:
    shape = features.shape
    if features.dtype != torch.float32 or len(shape) != 4 or shape[1] != shape[2] or shape[3] != config.feature_dim:
        raise LabelError(
            f"clip is {features.dtype} {tuple(shape)}, expected float32 (B, S, S, {config.feature_dim}) of square crops"
        )
    grid_of(shape[1] * config.patch_px, config)
    if not bool(torch.isfinite(features).all()):
        raise _out_of_range("clip", features)


def check_tokens(tokens_BN: NDArray[Any], config: ImageTokenizerConfig) -> int:
    """Tokens along a side of what can be decoded.

    Raises:
        LabelError: tokens that are no integers, of no square grid, of a size that does not fit, or outside the codebook.
    """
    label, size = config.label, config.codebook_size
    if not np.issubdtype(tokens_BN.dtype, np.integer):  # bool is none
        raise LabelError(f"{label} tokens are {tokens_BN.dtype}, expected integers in 0..{size - 1}")
    grid = math.isqrt(tokens_BN.shape[1]) if tokens_BN.ndim == 2 else 0
    if tokens_BN.ndim != 2 or tokens_BN.shape[1] != grid**2:
        raise LabelError(
            f"{label} tokens have shape {tokens_BN.shape}, expected (B, N) with N a square number, {config.num_tokens} at the "
            f"training's {config.input_px} pixels"
        )
    grid_of(grid * config.patch_px, config)
    if tokens_BN.size and not (tokens_BN.min() >= 0 and tokens_BN.max() < size):
        raise LabelError(f"{label} tokens span {tokens_BN.min()}..{tokens_BN.max()}, expected 0..{size - 1}")
    return grid


def grid_of(side_px: int, config: ImageTokenizerConfig) -> int:
    """Tokens along a side of crops of any size.

    Raises:
        LabelError: a side that the patches, or the levels of the U-Net, do not divide.
    """
    if side_px < 1 or side_px % config.side_multiple:
        raise LabelError(
            f"{config.label} crops of {side_px} pixels: this tokenizer takes squares whose side is a multiple of "
            f"{config.side_multiple}; it was trained on {config.input_px}"
        )
    return side_px // config.patch_px


def _check_range(batch: Batch, label: str) -> None:
    low, high = _RANGES.get(label, (-np.inf, np.inf))
    if batch.size and not (np.isfinite(batch).all() and low <= batch.min() and batch.max() <= high):
        raise _out_of_range(label, batch)


def _out_of_range(label: str, found: Batch | Tensor) -> LabelError:
    within = "in {}..{}".format(*_RANGES[label]) if label in _RANGES else "of any size"
    return LabelError(f"{label} spans {found.min()}..{found.max()}, expected finite numbers {within}")


def to_network(batch: Batch | Tensor, label: str, device: torch.device | str = "cpu") -> Tensor:
    """A checked batch as the network sees it: float32 (B, C, H, W), or int64 class rows (B, H, W) for semseg.

    It travels to the device as it is stored and is converted there: a GPU would wait longer for the host's arithmetic than
    for its own network.
    """
    if isinstance(batch, np.ndarray) and label in ("depth", "normal") and batch.dtype != np.float32:
        batch = unpack(batch, label)
    if label == "depth" and torch.device(device).type == "cpu":
        return torch.from_numpy(standardise_depth(np.asarray(batch)))[:, None]
    stored = batch.to(device) if isinstance(batch, Tensor) else to_device(batch, torch.device(device))
    if label == "depth":
        return standardised(stored)[:, None]
    if label == "semseg":
        return (stored + 1).long()  # in 8 bits, where 255 wraps to row 0
    x_BCHW = stored.movedim(-1, 1).float().contiguous()
    return x_BCHW / 127.5 - 1 if label == "rgb" else x_BCHW


def standardised(depth_BHW: Tensor) -> Tensor:
    """`core.metrics.standardise_depth` on a device, to float32's rounding."""
    flat_BN = depth_BHW.flatten(1).sort(1).values.double()
    cut = int(flat_BN.shape[1] * DEPTH_TAIL)
    core_BN = flat_BN[:, cut : flat_BN.shape[1] - cut]
    mean_B11, variance_B11 = core_BN.mean(1)[:, None, None], core_BN.var(1)[:, None, None]
    return ((depth_BHW.double() - mean_B11) / (variance_B11 + DEPTH_EPS).sqrt()).float()


def to_store(x_BCHW: Tensor, label: str, depth_span: tuple[float, float]) -> Batch:
    """A network's output as the API has it.

    One image's own scale and shift of depth are not in its tokens, so depth comes back relative: `depth_span` is what
    becomes 0 and 1. Normals come back of unit length; class maps are the best class of each pixel.
    """
    x_BCHW = x_BCHW.detach().float().cpu()
    if label == "semseg":
        return (x_BCHW.argmax(1).to(torch.uint8) - 1).numpy()  # row 0 wraps to 255
    if label == "depth":
        low, high = depth_span
        return ((x_BCHW[:, 0] - low) / (high - low)).clamp(0, 1).numpy()
    if label == "rgb":
        return ((x_BCHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, -1).contiguous().numpy()
    if label == "normal":
        x_BCHW = F.normalize(x_BCHW, dim=1)
    return x_BCHW.movedim(1, -1).contiguous().numpy()


def packed(batch: Batch, label: str) -> Batch:
    """A label of the API as files hold it: what `core.labels` would encode. Features stay as they are, in no file."""
    if label == "depth":
        return pack_depth(batch)
    return pack_normal(batch) if label == "normal" else batch


def mirror(batch: Batch, flips_B: NDArray[np.bool_], label: str) -> Batch:
    """Mirror the flagged items of a batch left to right; a normal map's x axis turns round too."""
    flipped = batch[:, :, ::-1]
    if label == "normal":
        flipped = flipped * np.array([-1, 1, 1], batch.dtype)
    return np.where(flips_B.reshape(-1, *[1] * (batch.ndim - 1)), flipped, batch)
