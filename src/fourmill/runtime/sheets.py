"""Pictures side by side: truth, reconstruction, and what 4M generated from the pixels."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourmill.core.modality import IMAGE_TOKENS
from fourmill.core.names import SampleKey
from fourmill.core.pictures import boxes_picture, painter_of
from fourmill.core.sheet import grid_png, text_picture
from fourmill.runtime.generation import Generated
from fourmill.runtime.heldout import HeldOut

Maps = Mapping[str, NDArray[Any]]
_CELL_PX = 128


def modality_sheets(heldout: HeldOut, truth: Maps, rebuilt: Maps, generated: Generated) -> dict[str, bytes]:
    """One PNG a modality: a column a sample; rows image, truth, the tokenizer's reconstruction, 4M from RGB alone."""
    images = list(heldout.maps["rgb"])
    sheets: dict[str, bytes] = {}
    for label in IMAGE_TOKENS:
        draw = painter_of(label, truth[label])
        rows = [images] if label != "rgb" else []
        titles = ["image"] if label != "rgb" else []
        for title, maps in (("truth", truth), ("tokenizer", rebuilt), ("4M", generated.maps)):
            if label in maps:
                rows.append([draw(one) for one in maps[label]])
                titles.append(title)
        sheets[label] = grid_png(rows, list(heldout.keys), titles, _CELL_PX)
    rows = [_boxes(heldout.maps["rgb"], heldout.boxes), _boxes(heldout.maps["rgb"], generated.boxes)]
    sheets["det"] = grid_png(rows, list(heldout.keys), ["truth", "4M"], 128)
    texts = [_texts(heldout.captions), _texts(generated.captions)]
    sheets["caption"] = grid_png([images, *texts], list(heldout.keys), ["image", "truth", "4M"], 128)
    return sheets


def caption_sheet(heldout: HeldOut, painted_BHWC: NDArray[np.uint8]) -> bytes:
    """Captions, what the text-to-image fine-tune painted, and the picture each was written for."""
    rows = [_texts(heldout.captions), list(painted_BHWC), list(heldout.maps["rgb"])]
    return grid_png(rows, list(heldout.keys), ["caption", "text2im", "its picture"], 128)


def superres_sheet(keys: list[SampleKey], low: Maps, high: Maps, made_BHWC: NDArray[np.uint8]) -> bytes:
    """Super-resolution: a column a sample; from the small image to the large one.

    Args:
        low: `image` and `tokenizer` (its reconstruction) at the lower resolution.
        high: the same at the higher one.
        made_BHWC: what 4M made of the small image's tokens.
    """
    rows = [low["image"], low["tokenizer"], made_BHWC, high["tokenizer"], high["image"]]
    titles = ["small image", "its tokens", "superres", "tokens of the truth", "truth"]
    return grid_png([list(row) for row in rows], list(keys), titles, _CELL_PX)


def overview(heldout: HeldOut, truth: Maps, rebuilt: Maps, generated: Generated) -> bytes:
    """Everything in one PNG: a row a sample, three columns a modality."""
    columns: list[tuple[str, list[NDArray[np.uint8]]]] = [("image", list(heldout.maps["rgb"]))]
    columns.append(("image, tokenizer", list(rebuilt["rgb"])))
    for label in IMAGE_TOKENS[1:]:
        draw = painter_of(label, truth[label])
        for title, maps in ((label, truth), ("tokenizer", rebuilt), ("4M from RGB", generated.maps)):
            columns.append((title, [draw(one) for one in maps[label]]))
    columns.append(("boxes", _boxes(heldout.maps["rgb"], heldout.boxes)))
    columns.append(("4M from RGB", _boxes(heldout.maps["rgb"], generated.boxes)))
    columns.append(("caption", _texts(heldout.captions)))
    columns.append(("4M from RGB", _texts(generated.captions)))
    rows = [list(row) for row in zip(*(pictures for _, pictures in columns), strict=True)]
    return grid_png(rows, [title for title, _ in columns], list(heldout.keys), _CELL_PX)


def _boxes(rgb_BHWC: NDArray[np.uint8], boxes: Any) -> list[NDArray[np.uint8]]:
    return [boxes_picture(image, found) for image, found in zip(rgb_BHWC, boxes, strict=True)]


def _texts(texts: list[str]) -> list[NDArray[np.uint8]]:
    return [text_picture(text or "(nothing)", _CELL_PX, _CELL_PX) for text in texts]
