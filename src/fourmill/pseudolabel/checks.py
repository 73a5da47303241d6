"""What must be true of a block of labels, and the figures that a person wants to see.

Every row is checked; pixels are read again for some shards only (`_DEEP_SHARDS`), since a block of CC12M holds 80 GB.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from fourmill.core.digest import Json
from fourmill.core.modality import IMAGES
from fourmill.core.names import SPLITS, Layout, shard_name
from fourmill.core.shards import (
    MissingShardError,
    ShardPlace,
    damage_of,
    needed_members,
    read_members,
    read_receipt,
    read_rows,
)
from fourmill.core.store import Store
from fourmill.core.tar import TarError
from fourmill.pseudolabel.members import LabelFormat, label_format
from fourmill.pseudolabel.statistics import Statistics

_DEEP_SHARDS = 8  # read again, spread over the block
_DEEP_SAMPLES = 64  # of each of them
_MOST_REJECTED = 0.5  # a block that loses more than half of its images has a wrong labeller, not odd images
_MOST_REASONS = 10

MATCH, RANGE, REJECTED = "labels_match_images", "values_in_range", "most_are_labelled"
CHECKS = {
    MATCH: "One row for each image, in order, and labels of their image's size.",
    RANGE: "Stored labels can be read, and every value lies where its label's values lie.",
    REJECTED: f"At most {_MOST_REJECTED:.0%} of the images were rejected, each with a reason.",
}
"""The blocking checks of a block of labels, with what they hold."""


@dataclass(frozen=True)
class CheckReport:
    """What the checks found: sentences about what is wrong, by check, and figures to look at."""

    found: dict[str, list[str]]
    statistics: Statistics
    figures: dict[str, Json] = field(default_factory=dict)

    @property
    def problems(self) -> tuple[str, ...]:
        return tuple(problem for problems in self.found.values() for problem in problems)

    @property
    def passed(self) -> bool:
        return not self.problems


def check_block(store: Store, dataset: str, layout: Layout, block: str, label: str) -> CheckReport:
    """Check one label of one block.

    One row for each image, every stored label of its image's pixel size and in its range; and figures: depth range,
    class histogram, boxes an image, and what was rejected, by reason. Memory: the rows of one shard, and one tar, of the
    labels or of the images, where pixels are read again.

    Raises:
        ValueError: no such block or label.
    """
    form = label_format(label)
    found: dict[str, list[str]] = {check: [] for check in CHECKS}
    statistics = Statistics()
    shards = layout.shards_of(block)
    deep = set(shards[:: max(1, -(-len(shards) // _DEEP_SHARDS))])
    for shard in shards:
        for split in SPLITS:
            images = ShardPlace(dataset, split, IMAGES, shard)
            labels = ShardPlace(dataset, split, form.folder, shard)
            missing = [place.tar for place in (images, labels) if read_receipt(store, place) is None]
            if missing:
                found[MATCH].append(f"{', '.join(missing)} not there; materialize the block again")
                continue
            rows = read_rows(store, labels).to_pylist()
            statistics.add(rows)
            found[MATCH] += _compare_rows(read_rows(store, images).to_pylist(), rows, labels)
            found[REJECTED] += _unexplained(rows, labels)
            if shard in deep:
                num_labels = sum(row["status"] == "ok" for row in rows)
                _compare_pixels(store, images, labels, num_labels, form, found)
    figures = _figures(form, statistics)
    rejected = statistics.rows - statistics.labelled
    if rejected > _MOST_REJECTED * statistics.rows:
        found[REJECTED].append(f"{rejected} of {statistics.rows} images were rejected: {figures['rejected']}")
    if statistics.labelled:
        found[RANGE] += form.impossible(statistics)
    return CheckReport(found, statistics, figures)


def _compare_rows(images: Sequence[dict[str, Any]], labels: Sequence[dict[str, Any]], place: ShardPlace) -> list[str]:
    expected = [row["key"] for row in images if row["status"] == "ok"]
    found = [row["key"] for row in labels]
    if expected == found:
        return []
    odd = sorted(set(expected) ^ set(found))
    return [
        f"{place.folder} {place.split} {shard_name(place.shard)} has {len(found)} rows, its images {len(expected)} "
        f"(first key that differs {odd[0] if odd else 'none: another order'}); materialize the block again"
    ]


def _unexplained(labels: Sequence[dict[str, Any]], place: ShardPlace) -> list[str]:
    keys = [row["key"] for row in labels if row["status"] != "ok" and not row["reason"]]
    return [f"{place.folder} {shard_name(place.shard)}: sample {keys[0]} was rejected without a reason"] if keys else []


def _compare_pixels(
    store: Store,
    images: ShardPlace,
    labels: ShardPlace,
    num_labels: int,
    form: LabelFormat,
    found: dict[str, list[str]],
) -> None:
    step = max(1, -(-num_labels // _DEEP_SAMPLES))
    try:
        chosen = dict(islice(read_members(store, labels), 0, None, step))
    except (FileNotFoundError, TarError) as error:
        found[MATCH].append(damage_of(labels, error))
        return
    try:
        of_images = needed_members(store, images, f"{images.dataset}/images")
        sizes = [(key, Image.open(io.BytesIO(data)).size) for key, data in of_images if key in chosen]
    except (MissingShardError, TarError) as error:
        found[MATCH].append(str(error))
        return
    for key, (width, height) in sizes:
        try:
            label = form.decode(chosen[key])
        except ValueError as error:
            found[RANGE].append(f"{labels.tar}: sample {key}: {error}")
            continue
        if isinstance(label, np.ndarray) and label.shape[:2] != (height, width):
            size = f"{label.shape[1]} x {label.shape[0]}"
            found[MATCH].append(f"{labels.tar}: sample {key} has {size} pixels, its image {width} x {height}")


def _figures(form: LabelFormat, found: Statistics) -> dict[str, Json]:
    reasons = sorted(found.rejected.items(), key=lambda one: (-one[1], one[0]))[:_MOST_REASONS]
    figures: dict[str, Json] = {"images": found.rows, "labelled": found.labelled, "rejected": dict(reasons)}
    return figures | (form.summarise(found) if found.labelled else {})
