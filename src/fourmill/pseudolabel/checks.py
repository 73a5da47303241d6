"""What must be true of a block of labels, and the figures that a person wants to see.

Every row is checked; pixels are read again for some shards only (`_DEEP_SHARDS`), since a block of CC12M holds 80 GB.
"""

import io
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fourmill.core.digest import Json
from fourmill.core.labels import COCO_PANOPTIC
from fourmill.core.modality import SEMSEG_INVALID
from fourmill.core.names import SPLITS, Layout, shard_name
from fourmill.core.shards import ShardPlace, read_members, read_receipt, read_rows
from fourmill.core.store import Store
from fourmill.pseudolabel.members import LabelFormat, label_format

_DEEP_SHARDS = 8  # read again, spread over the block
_DEEP_SAMPLES = 64  # of each of them
_MOST_REJECTED = 0.5  # a block that loses more than half of its images has a wrong labeller, not odd images


@dataclass(frozen=True)
class CheckReport:
    """What a check found: sentences about what is wrong, and figures to look at."""

    passed: bool
    problems: tuple[str, ...]
    figures: dict[str, Json]


def check_block(store: Store, dataset: str, layout: Layout, block: str, label: str) -> CheckReport:
    """Check one label of one block.

    One row for each image, every stored label of its image's pixel size and in its range; and figures: depth range,
    class histogram, boxes an image, and what was rejected, by reason.

    Raises:
        ValueError: no such block or label.
    """
    form = label_format(label)
    problems: list[str] = []
    rows: list[dict[str, Any]] = []
    shards = layout.shards_of(block)
    deep = set(shards[:: max(1, -(-len(shards) // _DEEP_SHARDS))])
    for shard in shards:
        for split in SPLITS:
            images = ShardPlace(dataset, split, "images", shard)
            labels = ShardPlace(dataset, split, form.folder, shard)
            missing = [place.tar for place in (images, labels) if read_receipt(store, place) is None]
            if missing:
                problems.append(f"{', '.join(missing)} not there; materialize the block again")
                continue
            shard_rows = read_rows(store, labels).to_pylist()
            rows += shard_rows
            problems += _compare_rows(read_rows(store, images).to_pylist(), shard_rows, labels)
            if shard in deep:
                problems += _compare_pixels(store, images, labels, form)
    figures = _figures(label, rows)
    rejected = sum(row["status"] != "ok" for row in rows)
    if rejected > _MOST_REJECTED * len(rows):
        problems.append(f"{rejected} of {len(rows)} images were rejected: {figures['rejected']}")
    if label == "normal" and any(row["status"] == "ok" for row in rows) and figures["mean length"] == 0:
        problems.append("every normal of the block is zero; the network sees nothing")
    return CheckReport(not problems, tuple(problems), figures)


def _compare_rows(images: list[dict[str, Any]], labels: list[dict[str, Any]], place: ShardPlace) -> list[str]:
    expected = [row["key"] for row in images if row["status"] == "ok"]
    found = [row["key"] for row in labels]
    problems: list[str] = []
    if expected != found:
        odd = sorted(set(expected) ^ set(found))
        problems.append(
            f"{place.folder} {place.split} {shard_name(place.shard)} has {len(found)} rows, its images {len(expected)} "
            f"(first key that differs {odd[0] if odd else 'none: another order'}); materialize the block again"
        )
    unexplained = [row["key"] for row in labels if row["status"] != "ok" and not row["reason"]]
    if unexplained:
        problems.append(
            f"{place.folder} {shard_name(place.shard)}: sample {unexplained[0]} was rejected without a reason"
        )
    return problems


def _compare_pixels(store: Store, images: ShardPlace, labels: ShardPlace, form: LabelFormat) -> list[str]:
    members = list(read_members(store, labels))
    chosen = dict(members[:: max(1, -(-len(members) // _DEEP_SAMPLES))])
    problems: list[str] = []
    for key, data in read_members(store, images):
        if key not in chosen:
            continue
        try:
            label = form.decode(chosen[key])
        except ValueError as error:
            problems.append(f"{labels.tar}: sample {key}: {error}")
            continue
        width, height = Image.open(io.BytesIO(data)).size
        if isinstance(label, np.ndarray) and label.shape[:2] != (height, width):
            size = f"{label.shape[1]} x {label.shape[0]}"
            problems.append(f"{labels.tar}: sample {key} has {size} pixels, its image {width} x {height}")
    return problems


def _figures(label: str, rows: list[dict[str, Any]]) -> dict[str, Json]:
    good = [dict(row["figures"]) for row in rows if row["status"] == "ok"]
    rejected = Counter(row["reason"] or row["status"] for row in rows if row["status"] != "ok")
    figures: dict[str, Json] = {"images": len(rows), "labelled": len(good), "rejected": dict(rejected.most_common(10))}
    return figures | (_SUMMARIES[label](good) if good else {})


def _depth_summary(good: list[dict[str, float]]) -> dict[str, Json]:
    return {
        "least": round(min(f["least"] for f in good), 4),
        "most": round(max(f["most"] for f in good), 4),
        "mean": _mean(good, "mean"),
        "clamped share": _mean(good, "clamped"),
    }


def _normal_summary(good: list[dict[str, float]]) -> dict[str, Json]:
    return {"mean length": _mean(good, "length"), "share of unit length": _mean(good, "unit")}


def _semseg_summary(good: list[dict[str, float]]) -> dict[str, Json]:
    shares: dict[str, float] = defaultdict(float)
    for one in good:
        for name, share in one.items():
            class_id = int(name.removeprefix("class_"))
            shares["invalid" if class_id == SEMSEG_INVALID else COCO_PANOPTIC[class_id]] += share / len(good)
    ranked = sorted(shares.items(), key=lambda item: -item[1])
    return {
        "classes seen": len(shares),
        "classes in an image": round(sum(map(len, good)) / len(good), 2),
        "share of pixels": {name: round(share, 5) for name, share in ranked},
    }


def _box_summary(good: list[dict[str, float]]) -> dict[str, Json]:
    counts: Counter[str] = Counter()
    for one in good:
        counts.update({name: int(count) for name, count in one.items() if name != "boxes"})
    boxes = [int(one["boxes"]) for one in good]
    return {
        "boxes": sum(boxes),
        "boxes in an image": round(sum(boxes) / len(boxes), 2),
        "images without boxes": boxes.count(0),
        "boxes by class": dict(counts.most_common()),
    }


_SUMMARIES = {"depth": _depth_summary, "normal": _normal_summary, "semseg": _semseg_summary, "det": _box_summary}


def _mean(good: list[dict[str, float]], name: str) -> float:
    return round(sum(f[name] for f in good) / len(good), 4)
