"""Everything that is fitted: the training set, the tokenizers, the vocabulary, 4M. Puts rooms together."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fourmill.core.ledger import ledger_path, read_ledger
from fourmill.core.modality import IMAGES, LABEL_FOLDERS
from fourmill.runtime.launch import program_threads, run_program
from fourmill.runtime.manifests import current_manifest
from fourmill.runtime.models import FOURM_ASSETS, ModelRef, current, set_current
from fourmill.runtime.project import Project
from fourmill.runtime.session import Session
from fourmill.runtime.stages import BlockNotReadyError
from fourmill.runtime.tokenizer_weights import score_tokenizer
from fourmill.runtime.workers import clip_features
from fourmill.tokenize.config import TrainingConfig
from fourmill.tokenize.spec import StageRecord, TokenizerSpec
from fourmill.train.config import TrainSpec

FourmName = Literal["fourm", "text2im", "superres"]
MIN_ROUND_TRIPS = 0.9
_MAX_LOSS_SHARE = 1.1  # of the first steps' loss; a fine-tune starts low and its batches differ
_TRAIN_SET = "train_set"


def make_train_set(session: Session, name: str | None = None) -> ModelRef:
    """Pack the images and labels that tokenizers are trained on.

    Args:
        name: one of the project's `more_train_sets`; the main one by default.

    Raises:
        BlockNotReadyError: one of its blocks is not labelled, or did not pass its checks.
    """
    from fourmill.tokenize.train_set import build_train_set

    whole, store = session.project, session.store
    config = whole.train_set_of(name)
    p = whole.for_dataset(config.dataset or whole.dataset)
    labels = "labels" if p.dataset == whole.dataset else f"{p.dataset}/labels"
    assets = {folder: f"{labels}/{label}" for label, folder in LABEL_FOLDERS.items()}
    for block in config.blocks:
        for folder, asset in {IMAGES: f"{p.dataset}/images", **assets}.items():
            if not store.exists(ledger_path(p.dataset, "train", folder, block)):
                raise BlockNotReadyError(
                    f"{train_set_asset(name)} takes {block} of {p.dataset}: materialize {asset} for {block} first"
                )
    features_at = partial(clip_features, whole) if config.clip_px else None
    features, scratch = clip_features(whole), session.folder("train_set")
    progress, place = session.progress(train_set_asset(name)), (store, p.dataset, p.layout)
    made = build_train_set(*place, config, p.input_px, features, features_at, scratch, labels, progress)
    report = {"num_train": made.num_train, "num_eval": made.num_eval}
    ref = ModelRef(name=_train_set_model(name), digest=made.digest, path=made.path, report=report)
    set_current(store, whole.dataset, ref)
    return ref


def train_set_asset(name: str | None) -> str:
    """The asset of a training set, as paths of asset keys are written."""
    return f"tokenizers/{_train_set_model(name)}"


def _train_set_model(name: str | None) -> str:
    return _TRAIN_SET if name is None else f"{_TRAIN_SET}_{name}"


def train_tokenizers(session: Session, labels: Sequence[str]) -> Iterator[tuple[str, ModelRef, float]]:
    """Train image tokenizers, several at a time, the longest first; as `train_several` yields them."""
    stages = {label: session.project.tokenizers[label].stages for label in labels}
    by_length = sorted(labels, key=lambda label: -sum(stage.steps * stage.batch_size for stage in stages[label]))
    works = {label: partial(train_tokenizer, session, label) for label in by_length}
    return train_several(works, session.project.tokenizers_at_once)


def train_several(works: Mapping[str, Callable[[], ModelRef]], at_once: int) -> Iterator[tuple[str, ModelRef, float]]:
    """Train models in the order given, several at a time; yield each when it is done, with its seconds.

    Raises:
        ProgramError: the first that failed, after the others have ended and were yielded.

    When it is interrupted or closed, what runs is ended and what waits is not begun.
    """
    failed: Exception | None = None
    with program_threads(at_once, "training") as pool:
        running = [pool.submit(_timed, name, work) for name, work in works.items()]
        for done in as_completed(running):
            error = done.exception()
            if isinstance(error, Exception):
                failed = failed or error
            else:
                yield done.result()
    if failed:
        raise failed


def _timed(name: str, work: Callable[[], ModelRef]) -> tuple[str, ModelRef, float]:
    start = time.monotonic()
    ref = work()
    return name, ref, round(time.monotonic() - start, 2)


def train_tokenizer(session: Session, label: str) -> ModelRef:
    """Train one image tokenizer, stage after stage, each as a program of its own, or find what equal inputs gave before.

    One that was imported is not trained but scored on the held-out samples. It serves from then on if it reaches its bounds;
    else the one before it goes on serving.
    """
    if label in session.project.served_tokenizers:
        report = json.loads(session.store.read(score_tokenizer(session, label)))
    else:
        report = _train_stages(session, label)
    ref = _ref(label, report)
    if is_good_enough(session.project, label, ref):
        set_current(session.store, session.project.dataset, ref)
    return ref


def is_good_enough(project: Project, label: str, ref: ModelRef) -> bool:
    """Whether an image tokenizer reaches what the project asks of its modality."""
    bounds = project.bounds_of(label)
    return bounds.reaches(ref.report["headline"]) and bounds.is_used(ref.report["usage"])


def _train_stages(session: Session, label: str) -> dict[str, Any]:
    """The report of the last stage."""
    earlier: list[StageRecord] = []
    report: dict[str, Any] = {}
    for stage in session.project.tokenizers[label].stages:
        report = json.loads(session.store.read(_train_stage(session, label, stage, earlier)))
        earlier.append(_record(stage, report))
    return report


def _train_stage(session: Session, label: str, stage: TrainingConfig, earlier: Sequence[StageRecord]) -> str:
    p, store = session.project, session.store
    train_set = current(store, p.dataset, _train_set_model(stage.train_set), train_set_asset(stage.train_set))
    name = f"tokenizer_{label}"
    folder = session.folder(name if not p.tokenizers[label].earlier_stages else f"{name}/{stage.name}")
    spec = TokenizerSpec(
        store=p.store,
        name=name,
        config=p.tokenizers[label].at_stage(stage),
        train_set=train_set.path,
        train_set_digest=train_set.digest,
        earlier=tuple(earlier),
        run_folder="",
        threads=p.threads,
        processes=p.tokenizer_processes,
    )
    spec = spec.model_copy(update={"run_folder": _checkpoints(folder, spec.input_digest)})
    progress = session.progress(f"tokenizers/{label}")
    return run_program("fourmill.tokenize", spec, folder, p.threads, progress, spec.processes)


def _record(stage: TrainingConfig, report: Mapping[str, Any]) -> StageRecord:
    kept = {key: report[key] for key in ("digest", "path", "train_set", "steps", "skipped_steps")}
    headline = report["headline"]
    return StageRecord(name=stage.name, headline=headline["name"], value=headline["value"], **kept)


def fit_text(session: Session) -> ModelRef:
    """Fit the vocabulary on the captions of the training split of the training set's blocks; an imported one is only scored.

    Not on those of every block there is: a block that comes later would change the vocabulary, and with it every token of every
    block before. Images whose list has no caption are passed over. It serves from then on if captions come back from their ids; else
    the one before it goes on serving.
    """
    from fourmill.tokenize.wordpiece import fit_wordpiece, report_wordpiece

    p, store = session.project, session.store
    dataset = p.train_set.dataset or p.dataset
    captions: list[str] = []
    for block in p.train_set.blocks:
        rows = read_ledger(store, dataset, "train", IMAGES, block).select(["status", "caption"]).to_pylist()
        captions += [row["caption"] for row in rows if row["status"] == "ok" and row["caption"] is not None]
    served = p.served_tokenizers.get("text")
    report = report_wordpiece(store, served, captions) if served else fit_wordpiece(store, captions, p.text)
    ref = _ref("text", json.loads(store.read(report)))
    if captions_come_back(ref):
        set_current(store, p.dataset, ref)
    return ref


def captions_come_back(ref: ModelRef) -> bool:
    """Whether enough captions are what their ids decode to."""
    return ref.report["figures"]["round_trip_share"] >= MIN_ROUND_TRIPS


def train_fourm(session: Session, name: FourmName) -> ModelRef:
    """Train 4M, or fine-tune it from the one that serves, as a program of its own.

    It serves from then on if its loss holds; else the one before it goes on serving. `train_superres` decides of its own, with
    figures in the report.
    """
    p, store = session.project, session.store
    config = {"fourm": p.pretrain, "text2im": p.text2im, "superres": p.superres}[name]
    if config is None:
        raise ValueError(
            "this project has one resolution only; give second_px, second_labels and superres in its config"
        )
    start = None if name == "fourm" else current(store, p.dataset, "fourm", "fourm/pretrain").path
    processes = p.fourm_processes if name == "fourm" else max(1, p.fourm_processes // p.fine_tunes_at_once)
    folder = session.folder(name)
    spec = TrainSpec(
        store=p.store,
        manifest=current_manifest(session)[1],
        name=name,
        config=config,
        init_from=start,
        run_folder="",
        threads=p.fourm_threads,
        processes=processes,
    )
    spec = spec.model_copy(update={"run_folder": _checkpoints(folder, spec.input_digest)})
    progress = session.progress(FOURM_ASSETS[name])
    report = run_program("fourmill.train", spec, folder, p.fourm_threads, progress, processes)
    ref = _ref(name, json.loads(store.read(report)))
    if loss_holds(ref) and name != "superres":
        set_current(store, p.dataset, ref)
    return ref


def loss_holds(ref: ModelRef) -> bool:
    """Whether the last loss of a training of 4M is finite and less than `_MAX_LOSS_SHARE` times the first."""
    curve = ref.report["loss_curve"]
    first, last = curve[0][1], curve[-1][1]
    return math.isfinite(last) and last < first * _MAX_LOSS_SHARE


def _checkpoints(folder: Path, input_digest: str) -> str:
    """A folder of its own for each set of inputs: another config must not end an older training's checkpoints."""
    return str(folder / f"checkpoints-{input_digest[:16]}")


def _ref(name: str, report: dict[str, Any]) -> ModelRef:
    return ModelRef(name=name, digest=report["digest"], path=report["path"], report=report)
