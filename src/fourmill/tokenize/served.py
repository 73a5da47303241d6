"""A tokenizer that was imported and serves without training: its figures on the held-out samples, as trained ones have them."""

import json
from typing import Any

import torch

from fourmill.core.digest import digest_json
from fourmill.core.store import Store
from fourmill.tokenize.card import with_figures
from fourmill.tokenize.config import TRAIN_VERSION, ImageTokenizerConfig
from fourmill.tokenize.exchange import Origin, read_origin
from fourmill.tokenize.load import ModelError, load_image_tokenizer, read_config
from fourmill.tokenize.preview import preview_png
from fourmill.tokenize.score import score_model, scored_report
from fourmill.tokenize.train_set import read_label


def report_tokenizer(
    store: Store, name: str, folder: str, wanted: ImageTokenizerConfig, train_set: str, train_set_digest: str
) -> str:
    """Score a stored tokenizer on the held-out samples of a packed training set, unless that was done before.

    Args:
        folder: store path of `models/{name}/{digest}`.
        wanted: the project's config of it.

    Returns:
        Store path of the report: what a training's has but steps and curve, and `origin` and `licence`.

    Raises:
        ModelError: it is not there, or of another label, patch, vocabulary or width than the project says.
        TrainSetError: the training set is not the one that is named.
        LabelError: its crops do not fit the tokenizer.
    """
    _check_fits(read_config(store, folder), wanted, folder)
    digest = folder.rpartition("/")[2]
    made_of = digest_json([TRAIN_VERSION, digest, train_set_digest, wanted.input_px])
    report_path = f"models/{name}/served/{made_of}/report.json"
    origin = read_origin(store, folder)
    if store.exists(report_path):
        _keep_on_card(store, folder, origin, json.loads(store.read(report_path)))
        return report_path
    model = load_image_tokenizer(store, folder, "cuda" if torch.cuda.is_available() else "cpu")
    labels = read_label(store, train_set, train_set_digest, wanted.label)
    label = wanted.label
    scored = score_model(model, labels, label)
    report: dict[str, Any] = {
        "name": name,
        "label": label,
        "digest": digest,
        "path": folder,
        "origin": origin.source if origin else "trained here",
        "licence": origin.licence if origin else "",
        **scored_report(scored, labels, label, model.config.codebook_size),
        "train_set": train_set_digest,
        "num_eval": len(labels.eval),
        "preview": report_path.replace("report.json", "preview.png"),
    }
    store.write(report["preview"], preview_png(label, scored.true, scored.predicted))
    _keep_on_card(store, folder, origin, report)
    store.write(report_path, json.dumps(report, indent=1).encode())
    return report_path


def _keep_on_card(store: Store, folder: str, origin: Origin | None, report: dict[str, Any]) -> None:
    """Importing it again has written a card without figures; one that was trained here has its training's."""
    path = f"{folder}/card.md"
    if origin is not None and store.exists(path):
        store.write(path, with_figures(store.read(path).decode(), report).encode())


def _check_fits(found: ImageTokenizerConfig, wanted: ImageTokenizerConfig, folder: str) -> None:
    for field, value in found.interface.items():
        if value != wanted.interface[field]:
            raise ModelError(
                f"{folder} has {field} {value}, the project's {wanted.label} tokenizer {wanted.interface[field]}: "
                "add it to the project with `fourmill weights add`"
            )
