"""What is published at the end of a tokenizer's training: weights, card, figures beside a baseline, a picture."""

import json
from typing import Any

from fourmill.core.store import Store
from fourmill.tokenize.card import card
from fourmill.tokenize.journal import Journal
from fourmill.tokenize.load import save_image_tokenizer
from fourmill.tokenize.preview import preview_png
from fourmill.tokenize.score import score_model, scored_report
from fourmill.tokenize.spec import TokenizerSpec
from fourmill.tokenize.state import State, uncompiled
from fourmill.tokenize.train_set import LabelArrays


def report_path(spec: TokenizerSpec) -> str:
    """Store path of the report of a training from these inputs."""
    return f"models/{spec.name}/trained/{spec.input_digest}/report.json"


def publish(store: Store, spec: TokenizerSpec, state: State, labels: LabelArrays, journal: Journal) -> None:
    """Score the weights that serve on the held-out samples; publish them with card, picture and report, this one last.

    The report holds digest, path, figures, baseline, headline, usage, perplexity, steps and how many of them were skipped,
    seconds, curve, preview, the stages before and this one, and the folder of the TensorBoard log; and `live_figures` of the
    last weights where their average is published.
    """
    label, model = spec.config.label, state.published.eval()
    with uncompiled(spec.config.training):
        scored = score_model(model, labels, label)
    journal.score(state.step, scored)
    report: dict[str, Any] = {
        "name": spec.name,
        "label": label,
        **scored_report(scored, labels, label, spec.config.codebook_size),
        "steps": state.step,
        "skipped_steps": state.guard.skipped,
        "rollbacks": state.guard.rollbacks,
        "seconds": round(state.seconds, 1),
        "train_set": spec.train_set_digest,
        "num_train": labels.num_samples,
        "num_eval": len(labels.eval),
        "stage": spec.config.training.name,
        "earlier_stages": [stage.model_dump() for stage in spec.earlier],
        "tensorboard": f"{spec.run_folder}/tensorboard",
        "curve": state.curve,
    }
    if state.ema:
        with uncompiled(spec.config.training):
            report["live_figures"] = score_model(state.model.eval(), labels, label).figures
    digest, folder = save_image_tokenizer(store, spec.name, model, card(spec, report))
    path = report_path(spec)
    preview = path.replace("report.json", "preview.png")
    store.write(preview, preview_png(label, scored.true, scored.predicted))
    report |= {"digest": digest, "path": folder, "preview": preview}
    store.write(path, json.dumps(report, indent=1).encode())
