"""Truth, reconstruction and what 4M made, side by side."""

import io

import numpy as np
from PIL import Image

from fourmill.core.names import SampleKey
from fourmill.runtime.generation import Generated
from fourmill.runtime.heldout import HeldOut
from fourmill.runtime.sheets import modality_sheets, overview

_CELL = slice(0, 128)
_STEP = 134


def maps(clip: np.ndarray) -> dict[str, np.ndarray]:
    number = len(clip)
    return {
        "rgb": np.zeros((number, 8, 8, 3), np.uint8),
        "depth": np.zeros((number, 8, 8)),
        "normal": np.zeros((number, 8, 8, 3)),
        "semseg": np.zeros((number, 8, 8), np.uint8),
        "clip": clip,
    }


def cells(png: bytes, rows: int, columns: int) -> np.ndarray:
    """The pictures of a sheet, (rows, columns, 128, 128, 3)."""
    sheet = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    sheet = sheet[-rows * _STEP :, -columns * _STEP :]
    return sheet.reshape(rows, _STEP, columns, _STEP, 3).swapaxes(1, 2)[:, :, _CELL, _CELL]


def test_near_features_have_near_colours_on_every_sheet() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(2, 8, 8, 6)) * [1.02, 1.01, 1, 0.99, 0.98, 0.97]
    rebuilt, made = truth * [0.97, 0.98, 0.99, 1, 1.01, 1.02], truth + 0.02
    keys = [SampleKey("000000003"), SampleKey("000000005")]
    heldout = HeldOut(keys, maps(truth), [[], []], ["", ""], [], 8)
    everything = heldout, maps(truth), maps(rebuilt), Generated(maps(made), [[], []], ["", ""])

    _, true, *others = cells(modality_sheets(*everything)["clip"], 4, 2)
    assert true.std() > 10
    assert all(np.abs(other - true).max() < 16 for other in others)
    true, *others = cells(overview(*everything), 2, 18)[:, 11:14].swapaxes(0, 1)
    assert true.std() > 10
    assert all(np.abs(other - true).max() < 16 for other in others)
