"""The card of a tokenizer: what it eats, what it gives, what it was trained on, and how good it is. No torch."""

from collections.abc import Sequence
from typing import Any

from fourmill.core.modality import TEXT_MAX_TOKENS
from fourmill.core.sequences import FIRST_CLASS, FIRST_COORDINATE, FIRST_SENTINEL, FIRST_WORD_PIECE
from fourmill.tokenize.config import ImageLabel, ImageTokenizerConfig, TextTokenizerConfig
from fourmill.tokenize.spec import TokenizerSpec

_EATS: dict[ImageLabel, str] = {
    "rgb": "8-bit RGB images (B, S, S, 3)",
    "depth": "relative depth (B, S, S), float32 in 0..1 or uint16 as files hold it, near small; standardised inside, so scale and "
    "shift are not in the tokens",
    "normal": "unit normals (B, S, S, 3), float32 in -1..1 or uint8 as files hold them",
    "semseg": "COCO panoptic class ids (B, S, S), uint8 0..132, 255 none",
    "clip": "dense CLIP features (B, h, w, C), float32",
}


_UNKNOWN_DATA = "- training data: not known here, ask its origin"
_FIGURES = "## Figures"


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
            *_eats_and_gives(config),
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


def imported_card(name: str, config: ImageTokenizerConfig, file_digest: str, origin: Sequence[str]) -> str:
    """The card of an imported image tokenizer, without figures until `with_figures`; `{digest}` as in `card`.

    Args:
        file_digest: of the file it was made from.
        origin: lines that say where it is from and its licence.
    """
    return "\n".join(
        [
            f"# {name}",
            "",
            f"Imported tokenizer of {config.label}: positions of {config.grid} x {config.grid} patches of {config.patch_px} pixels, "
            f"{config.codebook_size} codewords. Encoder {config.encoder.kind}, decoder {config.decoder.kind}.",
            "",
            *_eats_and_gives(config),
            "- digest of weights and config: {digest}",
            f"- sha256 of the file it was made from: {file_digest}",
            *origin,
            _UNKNOWN_DATA,
            "",
        ]
    )


def fitted_text_card(report: dict[str, Any], config: TextTokenizerConfig) -> str:
    """The card of a vocabulary that was fitted here, with its figures.

    Args:
        report: as `tokenize.wordpiece` makes it.
    """
    about = [
        f"- fitted on {report['num_captions']} captions, digest {report['captions_digest']}",
        f"- asked for {config.vocab_size} ids, of word pieces that occur {config.min_frequency} times or more",
    ]
    return with_figures(_text_card("Fitted", report["digest"], report["vocab_size"], about), report)


def is_of_fitted_text(card: str) -> bool:
    """Whether a text tokenizer's card is of one that was fitted here."""
    return card.startswith(_text_title("Fitted"))


def imported_text_card(digest: str, vocab_size: int, origin: Sequence[str]) -> str:
    """The card of an imported vocabulary, without figures until `with_figures`.

    Args:
        origin: lines that say where it is from and its licence.
    """
    return _text_card("Imported", digest, vocab_size, [*origin, _UNKNOWN_DATA])


def with_figures(text: str, report: dict[str, Any]) -> str:
    """A card with the figures of a report, in the place of those of an earlier one."""
    if "captions_digest" in report:
        scored_on = f"{report['num_captions']} captions, digest {report['captions_digest']}"
    else:
        scored_on = f"the {report['num_eval']} held-out samples of the training set {report['train_set']}"
    used = (
        [f"- codebook in use: {report['usage']:.0%}, perplexity {report['perplexity']}", ""]
        if "usage" in report
        else []
    )
    baseline = report["baseline"]
    return "\n".join(
        [
            text.partition(f"\n{_FIGURES}\n")[0].rstrip("\n"),
            "",
            _FIGURES,
            "",
            f"Of {scored_on}.",
            "",
            *used,
            f"| figure | value |{' mean or most common map |' if baseline else ''}",
            f"|---|---|{'---|' if baseline else ''}",
            *(
                f"| {name} | {value} |{f' {baseline[name]} |' if baseline else ''}"
                for name, value in report["figures"].items()
            ),
            "",
        ]
    )


def _text_title(made: str) -> str:
    return f"# text\n\n{made} WordPiece vocabulary"


def _text_card(made: str, digest: str, vocab_size: int, about: Sequence[str]) -> str:
    return "\n".join(
        [
            f"{_text_title(made)} of {vocab_size} ids for captions and boxes.",
            "",
            "- eats captions as they are written, and boxes as `v0=100 v1=0 v2=400 v3=300 person`",
            f"- gives at most {TEXT_MAX_TOKENS} ids, [EOS] last unless they were cut",
            f"- digest of tokenizer.json: {digest}",
            *about,
            "",
            "| ids | are |",
            "|---|---|",
            f"| 0..{FIRST_SENTINEL - 1} | [PAD] [UNK] [SOS] [EOS] |",
            f"| {FIRST_SENTINEL}..{FIRST_COORDINATE - 1} | sentinels [S_0] and so on |",
            f"| {FIRST_COORDINATE}..{FIRST_CLASS - 1} | coordinates, a thousand each for v0, v1, v2, v3 |",
            f"| {FIRST_CLASS}..{FIRST_WORD_PIECE - 1} | the 80 COCO things, by name |",
            f"| {FIRST_WORD_PIECE}..{vocab_size - 1} | word pieces |",
            "",
        ]
    )


def _eats_and_gives(config: ImageTokenizerConfig) -> list[str]:
    return [
        f"- eats {_EATS[config.label]}",
        f"- gives {config.grid} x {config.grid} tokens, 0..{config.codebook_size - 1}, int16 in raster order; sides that are "
        f"multiples of {config.side_multiple} give other grids",
    ]
