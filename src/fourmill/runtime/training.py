"""Everything that is fitted: the training set, the tokenizers, the vocabulary, the manifest, 4M. Puts rooms together."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fourmill.core.ledger import ledger_path, read_ledger
from fourmill.core.manifest import Manifest, manifest_path
from fourmill.core.modality import IMAGE_TOKENS
from fourmill.ingest.source import read_source
from fourmill.runtime.launch import run_program
from fourmill.runtime.models import ModelRef, current, set_current
from fourmill.runtime.session import Session
from fourmill.runtime.stages import LABEL_FOLDERS, BlockNotReadyError
from fourmill.runtime.token_assets import token_assets
from fourmill.runtime.tokenizer_weights import score_tokenizer
from fourmill.runtime.workers import clip_features
from fourmill.tokenize.config import TokenizerSpec
from fourmill.tokenize.manifest import build_manifest
from fourmill.train.config import TrainSpec

FourmName = Literal["fourm", "text2im", "superres"]
_TRAIN_SET = "train_set"


def make_train_set(session: Session) -> ModelRef:
    """Pack the crops and labels that tokenizers are trained on.

    Raises:
        BlockNotReadyError: one of its blocks is not labelled, or did not pass its checks.
    """
    from fourmill.tokenize.train_set import build_train_set

    p, store = session.project, session.store
    for block in p.train_set.blocks:
        for folder, asset in {"images": f"{p.dataset}/images", **_labels()}.items():
            if not store.exists(ledger_path(p.dataset, "train", folder, block)):
                raise BlockNotReadyError(f"tokenizers/train_set takes {block}: materialize {asset} for {block} first")
    made = build_train_set(store, p.dataset, p.layout, p.train_set, p.input_px, clip_features(p))
    report = {"num_train": made.num_train, "num_eval": made.num_eval}
    ref = ModelRef(name=_TRAIN_SET, digest=made.digest, path=made.path, report=report)
    set_current(store, p.dataset, ref)
    return ref


def _labels() -> dict[str, str]:
    return {folder: f"labels/{label}" for label, folder in LABEL_FOLDERS.items()}


def train_tokenizers(session: Session, labels: Sequence[str]) -> Iterator[tuple[str, ModelRef, float]]:
    """Train image tokenizers, several at a time, the longest first; as `train_several` yields them."""
    configs = {label: session.project.tokenizers[label].training for label in labels}
    by_length = sorted(labels, key=lambda label: -configs[label].steps * configs[label].batch_size)
    works = {label: partial(train_tokenizer, session, label) for label in by_length}
    return train_several(works, session.project.tokenizers_at_once)


def train_several(works: Mapping[str, Callable[[], ModelRef]], at_once: int) -> Iterator[tuple[str, ModelRef, float]]:
    """Train models in the order given, several at a time; yield each when it is done, with its seconds.

    Raises:
        ProgramError: the first that failed, after the others have ended and were yielded.
    """
    failed: Exception | None = None
    with ThreadPoolExecutor(at_once, "training") as pool:
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
    """Train one image tokenizer as a program of its own, or find the one that equal inputs gave before.

    One that was imported is not trained: it is scored on the held-out samples, and serves.
    """
    p, store = session.project, session.store
    if label in p.served_tokenizers:
        return _serve(session, label, score_tokenizer(session, label))
    train_set = current(store, p.dataset, _TRAIN_SET, "tokenizers/train_set")
    folder = session.folder(f"runs/tokenizer_{label}")
    spec = TokenizerSpec(
        store=p.store,
        name=f"tokenizer_{label}",
        config=p.tokenizers[label],
        train_set=train_set.path,
        train_set_digest=train_set.digest,
        run_folder="",
        threads=p.threads,
        processes=p.tokenizer_processes,
    )
    spec = spec.model_copy(update={"run_folder": _checkpoints(folder, spec.input_digest)})
    progress = session.progress(f"tokenizers/{label}")
    report = run_program("fourmill.tokenize", spec, folder, p.threads, progress, spec.processes)
    return _serve(session, label, report)


def fit_text(session: Session) -> ModelRef:
    """Fit the vocabulary on the captions of the training split of the training set's blocks; an imported one is only scored."""
    from fourmill.tokenize.wordpiece import fit_wordpiece, report_wordpiece

    p, store = session.project, session.store
    captions: list[str] = []
    for block in p.train_set.blocks:
        rows = read_ledger(store, p.dataset, "train", "images", block).select(["status", "caption"]).to_pylist()
        captions += [row["caption"] for row in rows if row["status"] == "ok"]
    served = p.served_tokenizers.get("text")
    report = report_wordpiece(store, served, captions) if served else fit_wordpiece(store, captions, p.text)
    return _serve(session, "text", report)


def make_manifest(session: Session) -> Manifest:
    """Gather every block into one training set."""
    p, store = session.project, session.store
    refs = {name: current(store, p.dataset, name, f"tokenizers/{name}") for name in (*IMAGE_TOKENS, "text")}
    tokenizers = {asset.modality: refs[asset.tokenizer].digest for asset in token_assets(p).values()}
    return build_manifest(
        store,
        p.dataset,
        p.layout,
        p.layout.block_keys(),
        p.modalities(),
        tokenizers,
        f"{refs['text'].path}/tokenizer.json",
        p.input_px,
        p.patch_px,
        read_source(store, p.dataset).digest,
    )


def train_fourm(session: Session, name: FourmName) -> ModelRef:
    """Train 4M, or fine-tune it from the one that serves, as a program of its own."""
    p, store = session.project, session.store
    config = {"fourm": p.pretrain, "text2im": p.text2im, "superres": p.superres}[name]
    if config is None:
        raise ValueError(
            "this project has one resolution only; give second_px, second_labels and superres in its config"
        )
    start = None if name == "fourm" else current(store, p.dataset, "fourm", "fourm/pretrain").path
    processes = p.fourm_processes if name == "fourm" else max(1, p.fourm_processes // p.fine_tunes_at_once)
    folder = session.folder(f"runs/{name}")
    spec = TrainSpec(
        store=p.store,
        manifest=manifest_path(p.dataset, make_manifest(session).digest),
        name=name,
        config=config,
        init_from=start,
        run_folder="",
        threads=p.fourm_threads,
        processes=processes,
    )
    spec = spec.model_copy(update={"run_folder": _checkpoints(folder, spec.input_digest)})
    progress = session.progress(_STAGES[name])
    report = run_program("fourmill.train", spec, folder, p.fourm_threads, progress, processes)
    return _serve(session, name, report)


_STAGES = {"fourm": "fourm/pretrain", "text2im": "fourm/text2im", "superres": "fourm/superres"}


def _checkpoints(folder: Path, input_digest: str) -> str:
    """A folder of its own for each set of inputs: another config must not end an older training's checkpoints."""
    return str(folder / f"checkpoints-{input_digest[:16]}")


def _serve(session: Session, name: str, report_path: str) -> ModelRef:
    """Let the model of a report serve under a name."""
    report: dict[str, Any] = json.loads(session.store.read(report_path))
    ref = ModelRef(name=name, digest=report["digest"], path=report["path"], report=report)
    set_current(session.store, session.project.dataset, ref)
    return ref
