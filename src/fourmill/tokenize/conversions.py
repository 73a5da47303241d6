"""What the store holds to what networks eat, and back. Nobody outside knows a mean, a scale or a shift.

| label  | store and API                              | network                                             |
|--------|--------------------------------------------|-----------------------------------------------------|
| rgb    | uint8 (B, S, S, 3)                         | [-1, 1]                                             |
| depth  | float32 (B, S, S), 0..1                    | standardised per image without the outer tenths     |
| normal | float32 (B, S, S, 3), components in [-1, 1] | as it is                                            |
| semseg | uint8 (B, S, S), raw ids, 255 none         | class rows: ids + 1, 0 none                         |
| clip   | float32 (B, h, w, C)                       | as it is                                            |
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fourmill.core.metrics import standardise_depth
from fourmill.core.modality import NUM_SEMSEG_CLASSES, SEMSEG_INVALID
from fourmill.tokenize.config import ImageTokenizerConfig
from fourmill.tokenize.samples import LabelError

Batch = NDArray[Any]


def check_batch(batch: Batch, config: ImageTokenizerConfig) -> None:
    """See that a batch is what the tokenizer's label is stored as.

    Raises:
        LabelError: another type, size or range.
    """
    label, side = config.label, config.grid if config.label == "clip" else config.input_px
    channels = {"rgb": (3,), "normal": (3,), "clip": (config.feature_dim,)}.get(label, ())
    shape = (len(batch), side, side, *channels) if batch.ndim else ()
    kind = np.uint8 if label in ("rgb", "semseg") else np.float32
    if batch.dtype != kind or batch.shape != shape:
        expected = ", ".join(map(str, ("B", side, side, *channels)))
        raise LabelError(f"{label} is {batch.dtype} {batch.shape}, expected {np.dtype(kind)} ({expected})")
    if kind is np.float32:
        _check_range(batch, label)
    elif label == "semseg":
        wrong = (batch >= NUM_SEMSEG_CLASSES) & (batch != SEMSEG_INVALID)
        if wrong.any():
            raise LabelError(
                f"semseg holds class {batch[wrong][0]}, expected 0..{NUM_SEMSEG_CLASSES - 1}, or {SEMSEG_INVALID} for none"
            )


def _check_range(batch: Batch, label: str) -> None:
    low, high = {"depth": (0.0, 1.0), "normal": (-1.0, 1.0)}.get(label, (-np.inf, np.inf))
    if batch.size and not (np.isfinite(batch).all() and low <= batch.min() and batch.max() <= high):
        raise LabelError(f"{label} spans {batch.min()}..{batch.max()}, expected finite numbers in {low}..{high}")


def to_network(batch: Batch, label: str) -> Tensor:
    """A checked batch as the network sees it: float32 (B, C, H, W), or int64 class rows (B, H, W) for semseg."""
    if label == "depth":
        return torch.from_numpy(standardise_depth(batch))[:, None]
    if label == "semseg":
        return torch.from_numpy(batch + np.uint8(1)).long()  # 255 wraps to row 0
    x_BCHW = torch.from_numpy(np.ascontiguousarray(np.moveaxis(batch, -1, 1))).float()
    return x_BCHW / 127.5 - 1 if label == "rgb" else x_BCHW


def to_store(x_BCHW: Tensor, label: str, depth_span: tuple[float, float]) -> Batch:
    """A network's output as the store holds it.

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


def mirror(batch: Batch, flips_B: NDArray[np.bool_], label: str) -> Batch:
    """Mirror the flagged items of a batch left to right; a normal map's x axis turns round too."""
    flipped = batch[:, :, ::-1]
    if label == "normal":
        flipped = flipped * np.array([-1, 1, 1], batch.dtype)
    return np.where(flips_B.reshape(-1, *[1] * (batch.ndim - 1)), flipped, batch)
