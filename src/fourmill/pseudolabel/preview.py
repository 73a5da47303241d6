"""Contact sheets of a block: images beside one label, and beside all labels that the block has.

Under each image is its sample key, which `fourmill trace` and the ledgers know.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeVar

from fourmill.core.labels import decode_image
from fourmill.core.modality import IMAGES
from fourmill.core.names import SPLITS, Layout, SampleKey
from fourmill.core.shards import ShardPlace, read_members, read_receipt, read_rows
from fourmill.core.sheet import fit_picture, grid_jpeg, text_picture
from fourmill.core.spread import spread_over
from fourmill.core.store import Store
from fourmill.core.tar import TarError
from fourmill.pseudolabel.format import RGB
from fourmill.pseudolabel.members import label_format

_MAX_BYTES = 100_000  # it goes into an event's row
# Tried in turn until the sheet is small enough: side of a cell in pixels, JPEG quality. Names stay legible in all of them.
_SIZES = ((192, 85), (176, 80), (160, 75), (144, 70), (128, 60), (128, 45), (112, 45))
_CELL_PX = _SIZES[0][0]

Cell = TypeVar("Cell")


class Sample(NamedTuple):
    """A key, its image's bytes, and its labels'."""

    key: SampleKey
    image: bytes
    labels: dict[str, bytes]


def label_preview(store: Store, dataset: str, layout: Layout, block: str, label: str, num: int = 8) -> bytes:
    """JPEG under 100 kB: images of the block, with keys, beside one label in colour, with the names of classes or boxes.

    Samples are spread evenly over the block's shards that have any; a block without labels gives a line of text.

    Raises:
        ValueError: no such block or label.
    """
    samples = _choose(store, dataset, layout, block, [label], num)
    return _sheet(samples, [label], f"no {label} labels in {block}", columns=2)


def contact_sheet(store: Store, dataset: str, layout: Layout, block: str, labels: Sequence[str], num: int = 5) -> bytes:
    """JPEG under 100 kB: a row a sample, with its image and key and every label of the block that is there.

    Raises:
        ValueError: no such block or label.
    """
    there = [label for label in labels if _shards_with(store, dataset, layout, block, label)]
    samples = _choose(store, dataset, layout, block, there, num) if there else []
    return _sheet(samples, there, f"no labels in {block}", columns=1)


def _sheet(samples: Sequence[Sample], labels: Sequence[str], otherwise: str, columns: int) -> bytes:
    decoded = [shown for sample in samples if (shown := _decoded(sample)) is not None]
    if not decoded:
        words = text_picture(otherwise, 2 * _CELL_PX, _CELL_PX)
        return grid_jpeg([[words]], [""], cell_px=2 * _CELL_PX)
    titles = ["image", *(title for label in labels for title in label_format(label).titles)]
    sheet = b""
    for cell_px, quality in _SIZES:
        cells = [_cells(rgb_HWC, found, labels, cell_px) for _, rgb_HWC, found in decoded]
        rows = _in_columns(cells, columns)
        captions = _in_columns([[key, *[""] * (len(titles) - 1)] for key, _, _ in decoded], columns)
        sheet = grid_jpeg(rows, titles * min(columns, len(cells)), cell_px, quality, captions)
        if len(sheet) < _MAX_BYTES:
            break
    return sheet


def _in_columns(of_samples: Sequence[list[Cell]], columns: int) -> list[list[Cell]]:
    """Rows of `columns` samples each."""
    return [list(chain(*of_samples[i : i + columns])) for i in range(0, len(of_samples), columns)]


def _decoded(sample: Sample) -> tuple[SampleKey, RGB, dict[str, Any]] | None:
    """None for what cannot be read: the block's checks say so, and a person wants to see the others all the more."""
    try:
        found = {label: label_format(label).decode(data) for label, data in sample.labels.items()}
        return sample.key, decode_image(sample.image).rgb_HWC, found
    except ValueError:
        return None


def _cells(rgb_HWC: RGB, found: dict[str, Any], labels: Sequence[str], cell_px: int) -> list[RGB | None]:
    shown = fit_picture(rgb_HWC, cell_px)
    cells: list[RGB | None] = [shown]
    for label in labels:
        form = label_format(label)
        drawn = form.show(shown, found[label], cell_px) if label in found else []
        cells += [*drawn, *[None] * (len(form.titles) - len(drawn))]
    return cells


def _shards_with(store: Store, dataset: str, layout: Layout, block: str, label: str) -> list[tuple[ShardPlace, int]]:
    """Shards of the block in which something has this label, and how many have."""
    folder = label_format(label).folder
    places = [ShardPlace(dataset, split, folder, shard) for split in SPLITS for shard in layout.shards_of(block)]
    receipts = ((place, read_receipt(store, place)) for place in places)
    return [(place, receipt.num_ok) for place, receipt in receipts if receipt is not None and receipt.num_ok]


def _choose(store: Store, dataset: str, layout: Layout, block: str, labels: Sequence[str], num: int) -> list[Sample]:
    """Samples that have the first of the labels, from shards spread over the block."""
    filled = _shards_with(store, dataset, layout, block, labels[0])
    shares = spread_over([there for _, there in filled], num)
    chosen = (
        _from_shard(store, place, labels, share) for (place, _), share in zip(filled, shares, strict=True) if share
    )
    return list(chain(*chosen))


def _from_shard(store: Store, place: ShardPlace, labels: Sequence[str], num: int) -> list[Sample]:
    keys = [row["key"] for row in read_rows(store, place).to_pylist() if row["status"] == "ok"]
    num = min(num, len(keys))
    picked = [keys[i * len(keys) // num] for i in range(num)]

    def members(folder: str) -> dict[SampleKey, bytes]:  # of the few: a shard of the paper's labels is half a gigabyte
        tar = read_members(store, ShardPlace(place.dataset, place.split, folder, place.shard))
        return {key: data for key, data in tar if key in picked}

    try:
        images = members(IMAGES)
        found = {label: members(label_format(label).folder) for label in labels}
    except (FileNotFoundError, TarError):  # the block's checks say so
        return []
    return [
        Sample(key, images[key], {label: labelled[key] for label, labelled in found.items() if key in labelled})
        for key in picked
        if key in images and key in found[labels[0]]
    ]
