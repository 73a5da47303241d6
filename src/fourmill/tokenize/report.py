"""What is published at the end of a tokenizer's training: weights, card, figures beside a baseline, a picture."""

import json
from typing import Any

import numpy as np

from fourmill.core.metrics import codebook_use
from fourmill.core.store import Store
from fourmill.tokenize.config import ImageLabel, TokenizerSpec
from fourmill.tokenize.image_tokenizer import ImageTokenizer
from fourmill.tokenize.load import save_image_tokenizer
from fourmill.tokenize.preview import preview_png
from fourmill.tokenize.score import HEADLINES, baseline_map, figures
from fourmill.tokenize.state import State
from fourmill.tokenize.train_set import LabelArrays, unpack


def report_path(spec: TokenizerSpec) -> str:
    """Store path of the report of a training from these inputs."""
    return f"models/{spec.name}/trained/{spec.input_digest}/report.json"


def publish(store: Store, spec: TokenizerSpec, state: State, labels: LabelArrays) -> None:
    """Score the weights that serve on the held-out samples; publish them with card, picture and report, this one last.

    The report holds digest, path, figures, baseline, headline, usage, perplexity, steps and how many of them were skipped,
    seconds, curve, preview; and `live_figures` of the last weights where their average is published.
    """
    label, model = spec.config.label, state.published.eval()
    true = unpack(labels.eval, label)
    scored, tokens, predicted = _scored(model, labels, label)
    use = codebook_use(tokens, spec.config.codebook_size)
    baseline = np.broadcast_to(baseline_map(label, unpack(labels.train, label)), true.shape)
    report: dict[str, Any] = {
        "name": spec.name,
        "label": label,
        "figures": scored,
        "baseline": figures(label, baseline, true, labels.eval_semseg),
        "usage": round(use.usage, 4),
        "perplexity": round(use.perplexity, 1),
        "steps": state.step,
        "skipped_steps": state.guard.skipped,
        "rollbacks": state.guard.rollbacks,
        "seconds": round(state.seconds, 1),
        "train_set": spec.train_set_digest,
        "num_train": len(labels.train),
        "num_eval": len(labels.eval),
        "curve": state.curve,
    }
    if state.ema:
        report["live_figures"] = _scored(state.model.eval(), labels, label)[0]
    name, better = HEADLINES[label]
    figure, easy = scored[name], report["baseline"][name]
    report["headline"] = {"name": name, "value": figure, "baseline": easy, "better": better}
    digest, folder = save_image_tokenizer(store, spec.name, model, _card(spec, report))
    path = report_path(spec)
    preview = path.replace("report.json", "preview.png")
    store.write(preview, preview_png(label, true, predicted))
    report |= {"digest": digest, "path": folder, "preview": preview}
    store.write(path, json.dumps(report, indent=1).encode())


def _scored(model: ImageTokenizer, labels: LabelArrays, label: ImageLabel) -> tuple[dict[str, float], Any, Any]:
    """Figures of a tokenizer on the held-out samples, with their tokens and reconstructions."""
    true = unpack(labels.eval, label)
    tokens = model.tokenize(true)
    predicted = model.detokenize(tokens)
    return figures(label, predicted, true, labels.eval_semseg), tokens, predicted


def _card(spec: TokenizerSpec, report: dict[str, Any]) -> str:
    config = spec.config
    live = report.get("live_figures", {})
    rows = [
        f"| {name} | {value} |{f' {live[name]} |' if live else ''} {report['baseline'][name]} |"
        for name, value in report["figures"].items()
    ]
    return "\n".join(
        [
            f"# {spec.name}",
            "",
            f"Tokenizer of {config.label}: {config.input_px} pixel crops to {config.grid} x {config.grid} tokens of "
            f"{config.codebook_size} codewords. Encoder {config.encoder.kind}, decoder {config.decoder.kind}.",
            "",
            "- digest of weights and config: {digest}",
            f"- training set: {spec.train_set_digest} ({report['num_train']} samples, {report['num_eval']} held out)",
            f"- trained for {report['steps']} steps of {config.training.batch_size}, of which {report['skipped_steps']} were "
            f"skipped as no numbers; went back {report['rollbacks']} times",
            f"- weights: {'moving average' if live else 'last step'}",
            f"- codebook in use on held-out samples: {report['usage']:.0%}, perplexity {report['perplexity']}",
            "",
            f"| held out | reconstruction |{' last weights |' if live else ''} mean or most common map |",
            f"|---|---|{'---|' if live else ''}---|",
            *rows,
            "",
        ]
    )
