"""`fourm/evaluation` and `fourm/samples`: figures and pictures of what 4M makes of held-out images."""

import json
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourmill.core import metrics
from fourmill.core.coco import COCO_PANOPTIC, COCO_THINGS
from fourmill.core.digest import digest_bytes, digest_json
from fourmill.core.labels import Box
from fourmill.core.manifest import Manifest
from fourmill.core.modality import NUM_SEMSEG_CLASSES
from fourmill.runtime.generation import Generated, Generator, joined
from fourmill.runtime.heldout import HeldOut, read_heldout
from fourmill.runtime.labeller_weights import require_labellers
from fourmill.runtime.launch import run_warm, run_warm_parts
from fourmill.runtime.manifests import current_manifest
from fourmill.runtime.models import current
from fourmill.runtime.session import Session
from fourmill.runtime.sheets import caption_sheet, modality_sheets, overview
from fourmill.runtime.superres import superres_picture
from fourmill.runtime.workers import clip_features

_NUM_THINGS = len(COCO_THINGS)  # raw ids below are things, from it on stuff
_MATCH_IOU = 0.5
EVALUATION = "evaluation"
_FIGURES = f"{EVALUATION}/figures.json"  # among the runs of a project


@dataclass(frozen=True)
class Evaluation:
    """Figures of 4M from RGB alone, and of a per-pixel mean map of the training set."""

    figures: dict[str, float]
    baseline: dict[str, float]
    num_samples: int
    path: str
    digest: str


@dataclass(frozen=True)
class Samples:
    """Where the page and the grid are, and the pictures for Dagster."""

    page: str
    grid: str
    digest: str
    pictures: dict[str, bytes] = field(default_factory=dict)


def evaluate(session: Session) -> Evaluation:
    """Score what 4M generates from the pixels of held-out samples; keep the figures beside the model's runs."""
    manifest, _ = current_manifest(session)
    heldout = read_heldout(session.store, manifest, session.project.samples.num_scored)
    parts = min(len(heldout), session.project.fourm_processes)
    generated = joined(run_warm_parts(partial(_generate_part, manifest), session, parts))
    # Not here: this process would load torch and torchmetrics for it, which takes longer than all the scoring.
    figures, baseline = run_warm(partial(_scores, generated, heldout), session)
    result = {"figures": figures, "baseline": baseline, "samples": len(heldout), "manifest": manifest.digest}
    path = session.project.runs_path(_FIGURES)
    session.store.write(path, json.dumps(result, indent=1).encode())
    return Evaluation(figures, baseline, len(heldout), path, digest_json(result))


def _generate_part(manifest: Manifest, session: Session, part: int, parts: int) -> Generated:
    """What 4M makes of one of so many equal parts of the held-out samples."""
    import torch

    torch.set_num_threads(session.project.fourm_threads)
    heldout = read_heldout(session.store, manifest, session.project.samples.num_scored)
    first, end = (len(heldout) * edge // parts for edge in (part, part + 1))
    return Generator(session).from_rgb(heldout.maps["rgb"][first:end], first)


def _scores(generated: Generated, heldout: HeldOut, session: Session) -> tuple[dict[str, float], dict[str, float]]:
    """Figures of what was generated, and of the mean maps."""
    figures = {**score_maps(generated.maps, heldout), **score_texts(generated, heldout)}
    return figures, score_maps(_mean_maps(session, len(heldout)), heldout)


def score_maps(maps: dict[str, NDArray[Any]], heldout: HeldOut) -> dict[str, float]:
    """Figures of depth, normals and classes against the truth; each class by name too."""
    from fourmill.tokenize import score  # torch

    true = heldout.maps["semseg"]
    ious = score.class_ious(maps["semseg"], true)
    things, true_things = maps["semseg"] < _NUM_THINGS, true < _NUM_THINGS
    union = (things | true_things).sum()
    return {
        "depth_error": round(metrics.depth_error(maps["depth"], heldout.maps["depth"]), 4),
        "normal_degrees": round(metrics.normal_error_degrees(maps["normal"], heldout.maps["normal"]), 3),
        "classes_miou": round(float(np.mean(list(ious.values()))), 4),
        "object_iou": round(float((things & true_things).sum() / union), 4) if union else 0.0,
        **{f"iou/{COCO_PANOPTIC[c]}": round(iou, 4) for c, iou in sorted(ious.items()) if c < NUM_SEMSEG_CLASSES},
    }


def score_texts(generated: Generated, heldout: HeldOut) -> dict[str, float]:
    """Share of true boxes that a generated box of the same class meets, and of the captions' words that are named."""
    wanted = [box for boxes in heldout.boxes for box in boxes]
    met = sum(_is_met(box, made) for boxes, made in zip(heldout.boxes, generated.boxes, strict=True) for box in boxes)
    words = [
        (set(true.split()), set(made.split())) for true, made in zip(heldout.captions, generated.captions, strict=True)
    ]
    share = [len(true & made) / len(true) for true, made in words if true]
    return {
        "boxes_found": round(met / len(wanted), 4) if wanted else 0.0,
        "caption_words": round(float(np.mean(share)), 4) if share else 0.0,
    }


def _is_met(box: Box, made: list[Box]) -> bool:
    return any(other.class_name == box.class_name and _iou(box, other) >= _MATCH_IOU for other in made)


def _iou(a: Box, b: Box) -> float:
    width = min(a.xmax, b.xmax) - max(a.xmin, b.xmin)
    height = min(a.ymax, b.ymax) - max(a.ymin, b.ymin)
    both = max(width, 0.0) * max(height, 0.0)
    areas = [(box.xmax - box.xmin) * (box.ymax - box.ymin) for box in (a, b)]
    return both / (sum(areas) - both) if both else 0.0


def _mean_maps(session: Session, number: int) -> dict[str, NDArray[Any]]:
    """Per-pixel mean (most common class) of the training set, as often as there are held-out samples."""
    from fourmill.tokenize.train_set import centre_squares, read_label

    train_set = current(session.store, session.project.dataset, "train_set", "tokenizers/train_set")

    def train(label: Any) -> NDArray[Any]:
        labels = read_label(session.store, train_set.path, train_set.digest, label)
        return np.concatenate([*centre_squares(labels, label, session.project.input_px)])

    one = {
        "depth": metrics.mean_map(train("depth")),
        "normal": metrics.mean_map(train("normal")),
        "semseg": metrics.most_common_map(train("semseg")),
    }
    return {label: np.broadcast_to(array, (number, *array.shape)) for label, array in one.items()}


def make_samples(session: Session) -> Samples:
    """The page and the grid: held-out images, labels, reconstructions, and what 4M generates, side by side.

    Raises:
        WeightsMissingError: the CLIP network, whose features are shown, is not there.
        ValueError: the figures beside them are of other samples.
    """
    from fourmill.runtime.page import GRID_PATH, write_page

    require_labellers(session.project, ["clip"])
    manifest, _ = current_manifest(session)
    figures = _figures(session, manifest)
    heldout = read_heldout(session.store, manifest, session.project.samples.num_shown)
    generator = Generator(session)
    rebuilt = generator.reconstruct(heldout.tokens)
    generated = generator.from_rgb(heldout.maps["rgb"])
    truth = {**heldout.maps, "clip": clip_features(session.project)(heldout.maps["rgb"])}
    painted = generator.from_captions(heldout.captions)
    sheets = {
        **modality_sheets(heldout, truth, rebuilt, generated),
        "caption to image": caption_sheet(heldout, painted),
        **({} if session.project.second_px is None else {"superres": superres_picture(generator, heldout)}),
    }
    grid = overview(heldout, truth, rebuilt, generated)
    grid_path = session.project.runs_path(GRID_PATH)
    session.store.write(grid_path, grid)
    page = write_page(session, manifest, sheets, figures, heldout.keys[0])
    return Samples(
        page=f"{session.store.root}/{page}",
        grid=f"{session.store.root}/{grid_path}",
        digest=digest_json([digest_bytes(grid), manifest.digest]),
        pictures=sheets,
    )


def _figures(session: Session, manifest: Manifest) -> dict[str, Any]:
    """What `evaluate` found.

    Raises:
        ValueError: nothing yet, or of other samples than the pictures would show.
    """
    path = session.project.runs_path(_FIGURES)
    found = json.loads(session.store.read(path)) if session.store.exists(path) else {"manifest": None}
    if found["manifest"] != manifest.digest:
        raise ValueError(
            f"{path} has figures of manifest {found['manifest']}, and the samples are of {manifest.digest}; materialize "
            f"fourm/{EVALUATION} first"
        )
    return found
