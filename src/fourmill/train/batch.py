"""What a step eats: the chosen tokens only, B samples of N inputs and M targets, padded.

A token is a modality (its index in the model's sorted list, -1 on padding), a position and an id. Nothing else of the
samples is kept: no full grids, no masks to sort away.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PADDING = -1


@dataclass(frozen=True)
class Inputs:
    """Visible tokens. Padding stands last in each row."""

    modality_BN: NDArray[np.int16]
    position_BN: NDArray[np.int16]  # place in the grid, or rank among the text's visible tokens
    id_BN: NDArray[np.int32]  # token id; 0 for pixels
    patches_PK: NDArray[np.uint8]  # visible pixel patches, (row, column, channel) order, as (b, n) ascends


@dataclass(frozen=True)
class Targets:
    """Predicted tokens, modality by modality."""

    modality_BM: NDArray[np.int16]
    position_BM: NDArray[np.int16]
    given_BM: NDArray[np.int32]  # texts: the token before, fed to the decoder; 0 for images
    id_BM: NDArray[np.int32]  # what is to be predicted; 0 on padding
    visible_BM: NDArray[np.int32]  # number of tokens that become visible here: an image's all at its first, else 1 or 0


@dataclass(frozen=True)
class Batch:
    """One step's samples."""

    inputs: Inputs
    targets: Targets

    def __len__(self) -> int:
        return len(self.inputs.modality_BN)


def cut_patches(rgb_BHWC: NDArray[np.uint8], patch_px: int) -> NDArray[np.uint8]:
    """Images to patches, (B, H, W, 3) to (B, L, K), each in (row, column, channel) order."""
    batch, height, width, channels = rgb_BHWC.shape
    split = rgb_BHWC.reshape(batch, height // patch_px, patch_px, width // patch_px, patch_px, channels)
    return np.ascontiguousarray(split.transpose(0, 1, 3, 2, 4, 5)).reshape(batch, -1, patch_px * patch_px * channels)
