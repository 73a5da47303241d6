"""The card of a tokenizer: what it eats, what it gives, what it was trained on, and how good it is. No torch."""

from typing import Any

from fourmill.tokenize.config import ImageLabel, TokenizerSpec

_EATS: dict[ImageLabel, str] = {
    "rgb": "8-bit RGB images (B, S, S, 3)",
    "depth": "relative depth (B, S, S), float32 in 0..1, near small; standardised inside, so scale and shift are not in the tokens",
    "normal": "unit normals (B, S, S, 3), float32 in -1..1",
    "semseg": "COCO panoptic class ids (B, S, S), uint8 0..132, 255 none",
    "clip": "dense CLIP features (B, h, w, C), float32",
}


def card(spec: TokenizerSpec, report: dict[str, Any]) -> str:
    """The card as Markdown; `{digest}` in it stands for the digest of weights and config.

    Args:
        report: as `tokenize.report` makes it.
    """
    config, training = spec.config, spec.config.training
    live = report.get("live_figures", {})
    skipped = f"{report['skipped_steps']} skipped as no numbers, gone back {report['rollbacks']} times"
    return "\n".join(
        [
            f"# {spec.name}",
            "",
            f"Tokenizer of {config.label}: {config.input_px} pixel crops to {config.grid} x {config.grid} tokens of "
            f"{config.codebook_size} codewords. Encoder {config.encoder.kind}, decoder {config.decoder.kind}.",
            "",
            f"- eats {_EATS[config.label]}",
            f"- gives {config.grid} x {config.grid} tokens, 0..{config.codebook_size - 1}, int16 in raster order; sides that are "
            f"multiples of {config.side_multiple} give other grids",
            "- digest of weights and config: {digest}",
            f"- training set: {spec.train_set_digest} ({report['num_train']} samples, {report['num_eval']} held out)",
            f"- trained for {report['steps']} steps of {training.batch_size} (stage {training.name}; {skipped})",
            f"- weights: {f'moving average, decay {training.ema_decay}' if live else 'of the last step'}",
            f"- codebook in use on held-out samples: {report['usage']:.0%}, perplexity {report['perplexity']}",
            "",
            *_stages(spec),
            f"| held out | reconstruction |{' last weights |' if live else ''} mean or most common map |",
            f"|---|---|{'---|' if live else ''}---|",
            *(
                f"| {name} | {value} |{f' {live[name]} |' if live else ''} {report['baseline'][name]} |"
                for name, value in report["figures"].items()
            ),
            "",
        ]
    )


def _stages(spec: TokenizerSpec) -> list[str]:
    if not spec.earlier:
        return []
    rows = [
        f"| {s.name} | {s.steps} | {s.skipped_steps} | {s.headline} {s.value} | {s.digest} | {s.train_set} |"
        for s in spec.earlier
    ]
    return [
        "| stage before | steps | skipped | held out | digest | training set |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
    ]
