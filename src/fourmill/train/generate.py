"""Decoding: image tokens by MaskGIT or in random order, texts left to right, each from all that is visible so far.

The draws of a sample depend on (seed, its row, modality, step) alone, not on the samples beside it. B samples, L tokens of a
grid, M targets, V ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fourmill.core.modality import TEXT_MAX_TOKENS, Modality
from fourmill.core.sequences import EOS, is_sentinel, sentinel
from fourmill.train.assemble import Part, assemble_targets, text_target
from fourmill.train.model import FourM
from fourmill.train.sampling import Schedule, draw_tokens, step_sizes
from fourmill.train.visible import Visible, visible_inputs, visible_rgb

Tokens = NDArray[np.int64] | list[list[int]]
_BATCH = 64


@dataclass(frozen=True)
class Decoding:
    """How one modality is decoded."""

    name: str
    scheme: Literal["maskgit", "roar"] = "maskgit"  # images; texts always go left to right
    steps: int = 4
    schedule: Schedule = "cosine"  # roar is always linear
    temperature: float = 0.0
    top_k: int | float = 0
    top_p: float = 0.0
    max_text: int = 80  # tokens of a text


def generate_from_rgb(
    model: FourM,
    rgb_BHWC: NDArray[np.uint8],
    targets: Sequence[str] | None = None,
    steps: int = 4,
    temperature: float = 0.0,
    seed: int = 0,
    chain: bool = False,
    first_row: int = 0,
    **options: float,
) -> dict[str, Tokens]:
    """Every modality from pixels alone.

    Args:
        rgb_BHWC: uint8, of the model's size.
        targets: modality names; all that the model predicts by default.
        steps: decoding steps of an image.
        chain: let what is decoded be seen by the modalities after it.
        first_row: number of the first image, where these are a part of more: what is drawn depends on it.
        options: `top_k`, `top_p`, `max_text` of `Decoding`.

    Returns:
        By name: tokens (B, L) of images, lists of ids of texts (no sentinels, no end token).

    Raises:
        ValueError: images of another size, or a modality the model does not predict.
    """
    names = [n for n in model.decoder_embeddings] if targets is None else list(targets)
    plan = [Decoding(name, steps=steps, temperature=temperature, **options) for name in names]  # type: ignore[arg-type]
    return generate(model, visible_rgb(model, rgb_BHWC), plan, seed, chain, first_row)


def generate_from_caption(
    model: FourM,
    ids: Sequence[Sequence[int]],
    targets: Sequence[str] | None = None,
    steps: int = 8,
    temperature: float = 1.0,
    seed: int = 0,
    chain: bool = True,
    **options: float,
) -> dict[str, Tokens]:
    """Images from captions: by default CLIP tokens first, then RGB tokens that see them (public text2im).

    Args:
        ids: of each caption, [EOS] last.
    """
    names = (
        list(targets)
        if targets is not None
        else [m.name for m in model.modalities if m.label in ("tok_clip", "tok_rgb")]
    )
    plan = [Decoding(name, steps=steps, temperature=temperature, **options) for name in names]  # type: ignore[arg-type]
    return generate(model, Visible(len(ids), texts={"caption": [list(row) for row in ids]}), plan, seed, chain)


def super_resolve(
    model: FourM,
    tokens: Mapping[str, NDArray[np.integer]],
    targets: Sequence[str],
    steps: int = 8,
    temperature: float = 1.0,
    seed: int = 0,
    texts: Mapping[str, Sequence[Sequence[int]]] | None = None,
    **options: float,
) -> dict[str, Tokens]:
    """Tokens of the higher resolution from whole grids of the lower one, by MaskGIT with the cosine schedule (4M, A.1, A.3).

    Args:
        tokens: low-resolution tokens by modality name, (B, L) each.
        targets: high-resolution modalities, one after the other, each seen by those after it.
        steps: decoding steps of an image; 8 as public.
        texts: ids of captions or boxes that are known too, by name, [EOS] last.
        options: `top_k`, `top_p` of `Decoding`.

    Raises:
        ValueError: no tokens, grids of another size than the model's, or a modality that it does not predict.
    """
    if not tokens:
        raise ValueError("nothing to super-resolve: give the tokens of at least one low-resolution modality")
    for name, grid in tokens.items():
        modality = model.by_name.get(name)
        if modality is None or grid.ndim != 2 or grid.shape[1] != modality.max_tokens:
            expected = "one of " + ", ".join(model.by_name) if modality is None else f"(B, {modality.max_tokens})"
            raise ValueError(f"{name} tokens of shape {grid.shape}; this model takes {expected}")
    unseen = sorted((texts or {}).keys() - model.by_name.keys())
    if unseen:
        raise ValueError(f"{', '.join(unseen)}: not seen by this model, only {', '.join(model.by_name)}")
    known = {name: grid.astype(np.int64) for name, grid in tokens.items()}
    written = {name: [list(row) for row in rows] for name, rows in (texts or {}).items()}
    visible = Visible(len(next(iter(known.values()))), tokens=known, texts=written)
    plan = [Decoding(name, steps=steps, temperature=temperature, **options) for name in targets]  # type: ignore[arg-type]
    return generate(model, visible, plan, seed)


@torch.inference_mode()
def generate(
    model: FourM, visible: Visible, plan: Sequence[Decoding], seed: int = 0, chain: bool = True, first_row: int = 0
) -> dict[str, Tokens]:
    """Decode modalities one after the other.

    Args:
        visible: what is known; not changed.
        chain: whether a decoded modality is visible to those after it.
        first_row: number of the first sample, where these are a part of more.

    Raises:
        ValueError: a modality that the model does not predict, or that is visible already.
    """
    for decoding in plan:
        if decoding.name not in model.decoder_embeddings:
            raise ValueError(
                f"{decoding.name!r} is not predicted by this model, only {', '.join(model.decoder_embeddings)}"
            )
        if decoding.name in visible.tokens or decoding.name in visible.texts:
            raise ValueError(f"{decoding.name!r} is given and to be decoded; leave one out")
    parts = []
    for first in range(0, visible.num_samples, _BATCH):
        rows = visible.rows(first, first + _BATCH)
        found: dict[str, Tokens] = {}
        for decoding in plan:
            found[decoding.name] = _decode(model, rows, decoding, seed, first_row + first)
            if chain:
                _show(rows, model.by_name[decoding.name], found[decoding.name])
        parts.append(found)
    return {d.name: _joined([part[d.name] for part in parts]) for d in plan}


def _decode(model: FourM, visible: Visible, decoding: Decoding, seed: int, first: int) -> Tokens:
    if model.by_name[decoding.name].kind == "text":
        return _decode_text(model, visible, decoding, seed, first)
    return _decode_image(model, visible, decoding, seed, first)


def _decode_image(model: FourM, visible: Visible, decoding: Decoding, seed: int, first: int) -> NDArray[np.int64]:
    modality, number = model.by_name[decoding.name], visible.num_samples
    tokens_BL = np.full((number, modality.max_tokens), -1, np.int64)
    sight = Visible(number, visible.patches, {**visible.tokens, decoding.name: tokens_BL}, visible.texts)
    schedule = "linear" if decoding.scheme == "roar" else decoding.schedule
    for step, size in enumerate(step_sizes(modality.max_tokens, decoding.steps, schedule)):
        if not size:
            continue
        rngs = [_rng(seed, first + row, modality, step) for row in range(number)]
        wanted_BM = np.stack([np.flatnonzero(row < 0) for row in tokens_BL])
        if decoding.scheme == "roar":
            wanted_BM = np.stack(
                [np.sort(rng.permutation(row)[:size]) for rng, row in zip(rngs, wanted_BM, strict=True)]
            )
        ids_BM, sure_BM = _predict_image(model, sight, modality, wanted_BM, rngs, decoding)
        best_BM = np.argsort(-sure_BM, axis=1, kind="stable")[:, :size]
        rows = np.arange(number)[:, None]
        tokens_BL[rows, np.take_along_axis(wanted_BM, best_BM, 1)] = np.take_along_axis(ids_BM, best_BM, 1)
    return tokens_BL


def _predict_image(
    model: FourM,
    visible: Visible,
    modality: Modality,
    wanted_BM: NDArray[np.int64],
    rngs: Sequence[np.random.Generator],
    decoding: Decoding,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    index, shape = model.index(modality.name), wanted_BM.shape
    targets = assemble_targets([[Part(index, row, np.zeros(len(row), np.int64))] for row in wanted_BM], shape[1])
    y_BMD = model.decode(targets, *model.encode(visible_inputs(model, visible)), full=True)
    uniform = np.concatenate([rng.random(shape[1]) for rng in rngs])
    scores_TV = model.logits(y_BMD.flatten(0, 1), modality.name)
    ids, sure = draw_tokens(scores_TV, uniform, decoding.temperature, decoding.top_k, decoding.top_p)
    return ids.reshape(shape), sure.reshape(shape)


def _decode_text(model: FourM, visible: Visible, decoding: Decoding, seed: int, first: int) -> list[list[int]]:
    """From [S_1] on, each row until [EOS] or a sentinel closes its span. Few are long, and those go on alone."""
    modality, number = model.by_name[decoding.name], visible.num_samples
    context_BND, bias = model.encode(visible_inputs(model, visible))
    found: list[list[int]] = [[] for _ in range(number)]
    open_rows = list(range(number))
    rngs = [_rng(seed, first + row, modality, 0) for row in range(number)]
    for _ in range(min(decoding.max_text, TEXT_MAX_TOKENS)):
        prefixes = [[sentinel(1), *found[row], 0] for row in open_rows]  # the last one is only a place to predict
        targets = assemble_targets(
            [[text_target(model.index(modality.name), np.array(prefix))] for prefix in prefixes], len(prefixes[0]) - 1
        )
        y_BMD = model.decode(targets, context_BND[open_rows], None if bias is None else bias[open_rows])
        uniform = np.array([rngs[row].random() for row in open_rows])
        scores_BV = model.logits(y_BMD[:, -1], modality.name)
        ids_B, _ = draw_tokens(scores_BV, uniform, decoding.temperature, decoding.top_k, decoding.top_p)
        still_open = []
        for row, token in zip(open_rows, ids_B.tolist(), strict=True):
            if not _closes(token):
                found[row].append(token)
                still_open.append(row)
        open_rows = still_open
        if not open_rows:
            break
    return found


def _closes(token: int) -> bool:
    return token == EOS or is_sentinel(token)


def _show(visible: Visible, modality: Modality, found: Tokens) -> None:
    if isinstance(found, list):
        visible.texts[modality.name] = [[*ids, EOS] for ids in found]
    else:
        visible.tokens[modality.name] = found


def _joined(parts: Sequence[Tokens]) -> Tokens:
    texts = [row for part in parts if isinstance(part, list) for row in part]
    arrays = [part for part in parts if not isinstance(part, list)]
    return np.concatenate(arrays) if arrays else texts


def _rng(seed: int, row: int, modality: Modality, step: int) -> np.random.Generator:
    return np.random.default_rng([seed, row, modality.id, step])
