"""Every label that the store holds: 4M's four, and the table of those that stand beside them."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from fourmill.core import labels as formats
from fourmill.core.coco import COCO_PANOPTIC, COCO_THINGS
from fourmill.core.digest import Json
from fourmill.core.labels import Box
from fourmill.core.modality import LABEL_FOLDERS, NUM_SEMSEG_CLASSES, SEMSEG_INVALID
from fourmill.core.pictures import (
    boxes_picture,
    depth_picture,
    nearest_pixels,
    normal_picture,
    semseg_legend,
    semseg_picture,
)
from fourmill.pseudolabel import canny
from fourmill.pseudolabel.format import RGB, Figures, LabelFormat, OwnConfig, OwnLabel
from fourmill.pseudolabel.statistics import Statistics

OWN: Mapping[str, OwnLabel] = {"canny": canny.LABEL}
"""Labels beside 4M's own, by name: an entry here, and a config in a project's `labellers`, adds one."""

ROW_EXTRA = pa.schema(
    [
        ("width", pa.int32()),  # of the image and its label, in pixels
        ("height", pa.int32()),
        ("figures", pa.map_(pa.string(), pa.float64())),
    ]
)
"""What the label stage adds to each row."""

_MAX_LENGTH = math.sqrt(3) + 1e-3  # of a normal whose components are all 1
_MANY = 1000  # images that no right network finds all without a thing, or of one class


def _depth_figures(depth_HW: np.ndarray) -> Figures:
    clamped = float(((depth_HW <= 0) | (depth_HW >= 1)).mean())
    return {"least": float(depth_HW.min()), "most": float(depth_HW.max()), "mean": float(depth_HW.mean())} | {
        "clamped": clamped
    }


def _depth_summary(found: Statistics) -> dict[str, Json]:
    return {
        "least": round(found.figures["least"].least, 4),
        "most": round(found.figures["most"].most, 4),
        "mean": round(found.mean("mean"), 4),
        "clamped share": round(found.mean("clamped"), 4),
    }


def _depth_impossible(found: Statistics) -> list[str]:
    least, most = found.figures["least"].least, found.figures["most"].most
    return [] if 0 <= least <= most <= 1 else [f"depths lie in [{least}, {most}], expected [0, 1]"]


def _normal_figures(normal_HWC: np.ndarray) -> Figures:
    length_HW = np.sqrt(np.einsum("hwc,hwc->hw", normal_HWC, normal_HWC))  # a third of the time of linalg.norm
    return {"length": float(length_HW.mean()), "unit": float((np.abs(length_HW - 1) < 0.05).mean())}


def _normal_summary(found: Statistics) -> dict[str, Json]:
    clamped = {"clamped share": round(found.mean("clamped"), 4)} if "clamped" in found.figures else {}
    return {
        "mean length": round(found.mean("length"), 4),
        "share of unit length": round(found.mean("unit"), 4),
        **clamped,
    }


def _normal_impossible(found: Statistics) -> list[str]:
    problems: list[str] = []
    if found.mean("length") == 0:
        problems.append("every normal of the block is zero; the network sees nothing")
    longest = found.figures["length"].most
    if longest > _MAX_LENGTH:
        problems.append(f"normals of an image are {longest:.3f} long on average, which no components in [-1, 1] make")
    return problems


def _semseg_figures(ids_HW: np.ndarray) -> Figures:
    counts = np.bincount(ids_HW.ravel(), minlength=NUM_SEMSEG_CLASSES)
    return {f"class_{i:03d}": float(counts[i] / ids_HW.size) for i in np.flatnonzero(counts)}


def _class_ids(found: Statistics) -> dict[str, int]:
    return {name: int(name.removeprefix("class_")) for name in found.figures if name.startswith("class_")}


def _semseg_summary(found: Statistics) -> dict[str, Json]:
    ids = _class_ids(found)
    names = {name: "invalid" if i == SEMSEG_INVALID else COCO_PANOPTIC[i] for name, i in ids.items() if _is_class(i)}
    largest_first = sorted(names, key=lambda name: -found.mean(name))
    return {
        "classes seen": len(ids),
        "classes in an image": round(sum(found.figures[name].num for name in ids) / found.labelled, 2),
        "share of pixels": {names[name]: round(found.mean(name), 5) for name in largest_first},
    }


def _is_class(class_id: int) -> bool:
    return class_id < NUM_SEMSEG_CLASSES or class_id == SEMSEG_INVALID


def _semseg_impossible(found: Statistics) -> list[str]:
    ids = list(_class_ids(found).values())
    odd = sorted(i for i in ids if not _is_class(i))
    if odd:
        return [f"ids {odd} are no classes; there are 0..{NUM_SEMSEG_CLASSES - 1}, and {SEMSEG_INVALID}"]
    if len(ids) == 1 and found.labelled >= _MANY:
        return [f"every pixel of {found.labelled} images has one class, {ids[0]}; the network sees nothing"]
    return []


def _box_figures(boxes: list[Box]) -> Figures:
    figures: Figures = {"boxes": float(len(boxes))}
    for box in boxes:
        figures[box.class_name] = figures.get(box.class_name, 0.0) + 1
    return figures


def _box_summary(found: Statistics) -> dict[str, Json]:
    boxes = found.figures["boxes"]
    counts = {name: int(sums.total) for name, sums in found.figures.items() if name != "boxes"}
    return {
        "boxes": int(boxes.total),
        "boxes in an image": round(found.mean("boxes"), 2),
        "most boxes in an image": int(boxes.most),
        "images without boxes": boxes.num - boxes.nonzero,
        "boxes by class": {name: counts[name] for name in sorted(counts, key=lambda name: (-counts[name], name))},
    }


def _box_impossible(found: Statistics) -> list[str]:
    odd = sorted(found.figures.keys() - {"boxes", *COCO_THINGS})
    if odd:
        return [f"boxes are called {', '.join(odd[:5])}, which are none of COCO's 80 things"]
    if found.labelled >= _MANY and found.figures["boxes"].total == 0:
        return [
            f"there is no box in any of {found.labelled} images; the network sees nothing, or its threshold is too high"
        ]
    return []


def _show_classes(shown: RGB, ids_HW: Any, cell_px: int) -> list[RGB]:
    height, width = shown.shape[:2]
    return [semseg_picture(nearest_pixels(ids_HW, height, width)), semseg_legend(ids_HW, cell_px, cell_px)]


FORMATS: dict[str, LabelFormat] = {
    "depth": LabelFormat(
        folder=LABEL_FOLDERS["depth"],
        ext="png",
        about="Depth of every image, 16-bit, near small and far large.",
        encode=formats.encode_depth,
        decode=formats.decode_depth,
        figures=_depth_figures,
        summarise=_depth_summary,
        titles=("depth",),
        show=lambda shown, depth_HW, cell_px: [depth_picture(depth_HW)],
        impossible=_depth_impossible,
    ),
    "normal": LabelFormat(
        folder=LABEL_FOLDERS["normal"],
        ext="png",
        about="Surface normals of every image in the camera's frame, 8 bits a channel.",
        encode=formats.encode_normal,
        decode=formats.decode_normal,
        figures=_normal_figures,
        summarise=_normal_summary,
        titles=("normals",),
        show=lambda shown, normal_HWC, cell_px: [normal_picture(normal_HWC)],
        impossible=_normal_impossible,
    ),
    "semseg": LabelFormat(
        folder=LABEL_FOLDERS["semseg"],
        ext="png",
        about="COCO panoptic class of every pixel, raw ids 0..132, 255 where there is none.",
        encode=formats.encode_semseg,
        decode=formats.decode_semseg,
        figures=_semseg_figures,
        summarise=_semseg_summary,
        titles=("classes", ""),
        show=_show_classes,
        impossible=_semseg_impossible,
    ),
    "det": LabelFormat(
        folder=LABEL_FOLDERS["det"],
        ext="json",
        about="Boxes of COCO's 80 things in every image, corners as shares of the sides.",
        encode=formats.encode_boxes,
        decode=formats.decode_boxes,
        figures=_box_figures,
        summarise=_box_summary,
        titles=("boxes",),
        show=lambda shown, boxes, cell_px: [boxes_picture(shown, boxes, scale=1)],
        impossible=_box_impossible,
    ),
    **{label: own.format for label, own in OWN.items()},
}
"""By label."""


def label_format(label: str) -> LabelFormat:
    """How a label is kept. Raises ValueError for one that is not stored."""
    if label not in FORMATS:
        raise ValueError(f"no stored label {label!r}; there are {', '.join(FORMATS)}")
    return FORMATS[label]


def own_labellers(labels: Iterable[str]) -> dict[str, OwnConfig]:
    """Labellers with their usual settings for labels beside 4M's own. Raises ValueError for one that there is none for."""
    labels = list(labels)
    unknown = [label for label in labels if label not in OWN]
    if unknown:
        raise ValueError(f"no label {unknown[0]!r} beside 4M's own; there are {', '.join(OWN)}")
    return {label: OWN[label].config.model_validate({}) for label in labels}


def own_label(config: OwnConfig) -> str:
    """The label that a config of the table makes. Raises ValueError when none of the table's has it."""
    for label, own in OWN.items():
        if isinstance(config, own.config):
            return label
    raise ValueError(f"no label beside 4M's own has a labeller {config.kind!r}; there are {', '.join(OWN)}")


def own_config(value: Any) -> Any:
    """What a project file says of a labeller, as the config of its own class; anything else as it is."""
    if isinstance(value, Mapping):
        for own in OWN.values():
            if value.get("kind") == own.config.model_fields["kind"].default:
                return own.config.model_validate(value)
    return value
