"""Which tokens a sample shows and which it must predict: budgets by modality, image masks, span masking (4M, 2.3, C.1).

All of it is a function of a random generator, one a sample, seeded by (seed, step, row); numpy only.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from fourmill.core.modality import TEXT_MAX_TOKENS, Modality
from fourmill.core.sequences import FIRST_SENTINEL, NUM_SENTINELS, sentinel
from fourmill.train.config import RESOLUTION_NAMES, Alphas, Keep, MaskingConfig

Rng = np.random.Generator
Ids = NDArray[np.int64]
_SHRINK = 0.9  # a text over its budget is masked anew with this share of the tokens it kept


class MaskingError(ValueError):
    """A mixture that does not fit the modalities there are."""


@dataclass(frozen=True)
class Component:
    """A mixture component with its alphas as arrays, in the order of the modalities."""

    input_alphas: NDArray[np.float64]
    target_alphas: NDArray[np.float64]
    keep: Keep


@dataclass(frozen=True)
class Budgets:
    """Tokens by modality, in the order of the modalities."""

    inputs: Ids
    targets: Ids
    keep: Keep


class Mixture:
    """A masking config resolved against the modalities of a manifest.

    Args:
        modalities: sorted by name.

    Raises:
        MaskingError: a component leaves nothing to see or nothing to predict.
    """

    def __init__(self, config: MaskingConfig, modalities: Sequence[Modality]) -> None:
        self.config, self.modalities = config, tuple(modalities)
        names, resolutions = [m.name for m in modalities], resolution_names(modalities)
        predicted = np.array([m.kind != "pixels" for m in modalities])

        def by_modality(alphas: Alphas) -> NDArray[np.float64]:
            return np.array([alpha_of(alphas, name, resolutions.get(name, "")) for name in names])

        self.components = [
            Component(by_modality(c.input_alphas), by_modality(c.target_alphas) * predicted, c.keep)
            for c in config.components
        ]
        for i, component in enumerate(self.components):
            if not component.input_alphas.any() or not component.target_alphas.any():
                raise MaskingError(
                    f"component {i} of the mixture has no {'input' if not component.input_alphas.any() else 'target'} among "
                    f"{', '.join(names)}; give one of them an alpha above 0"
                    + ("" if resolutions else " (they have one resolution: low: and high: name none of them)")
                )
        weights = np.array([c.weight for c in config.components])
        self._odds = weights / weights.sum()
        self._caps = np.array([m.max_tokens for m in modalities])
        self._is_image = np.array([m.kind != "text" for m in modalities])

    @property
    def predicted(self) -> list[str]:
        """Names of the modalities that are a target of some component."""
        alphas = sum(c.target_alphas for c in self.components)
        return [m.name for m, alpha in zip(self.modalities, np.asarray(alphas), strict=True) if alpha]

    def draw(self, rng: Rng) -> Budgets:
        """Budgets of one sample. Tokens that a modality has no room for are not given to another, as in public."""
        component = self.components[int(rng.choice(len(self._odds), p=self._odds))]
        visible, predicted = (
            int(rng.integers(least, most + 1))
            for least, most in (self.config.num_input_tokens, self.config.num_target_tokens)
        )
        inputs = np.minimum(split_budget(visible, component.input_alphas, rng), self._caps)
        room = self._caps - inputs * self._is_image
        targets = np.minimum(split_budget(predicted, component.target_alphas, rng), room)
        return Budgets(inputs, targets, component.keep)


def taking_part(config: MaskingConfig, modalities: Iterable[Modality]) -> list[Modality]:
    """The modalities that some component shows or predicts, sorted by name: a model has no need of the others."""
    ordered = sorted(modalities, key=lambda m: m.name)
    alphas = sum(c.input_alphas + c.target_alphas for c in Mixture(config, ordered).components)
    return [m for m, alpha in zip(ordered, np.asarray(alphas), strict=True) if alpha]


def resolution_names(modalities: Sequence[Modality]) -> dict[str, str]:
    """`low` or `high` of each image modality where there are two resolutions; empty where there is one.

    Raises:
        MaskingError: there are more than two.
    """
    sides = sorted({m.px for m in modalities if m.px is not None})
    if len(sides) < len(RESOLUTION_NAMES):
        return {}
    if len(sides) > len(RESOLUTION_NAMES):
        raise MaskingError(f"images of {', '.join(map(str, sides))} pixels: one mixture spans two resolutions at most")
    by_side = dict(zip(sides, RESOLUTION_NAMES, strict=True))
    return {m.name: by_side[m.px] for m in modalities if m.px is not None}


def alpha_of(alphas: Alphas, name: str, resolution: str = "") -> float:
    """The alpha of a modality: by full name, label at its resolution, label, else by the longest wildcard, else 0."""
    label = name.split("@")[0]
    placed = f"{resolution}:{label}"
    for key in (name, placed, label):
        if key in alphas:
            return alphas[key]
    wild = sorted((key for key in alphas if "*" in key), key=len, reverse=True)
    return next((alphas[key] for key in wild if fnmatchcase(placed if ":" in key else label, key)), 0.0)


def split_budget(budget: int, alphas: NDArray[np.float64], rng: Rng) -> Ids:
    """Tokens by modality: the Dirichlet shares rounded down, each token left over to the largest share of a fresh draw.

    Returns:
        Counts that add up to the budget; 0 where alpha is 0.
    """
    counts = np.zeros(len(alphas), np.int64)
    chosen = np.flatnonzero(alphas)
    if len(chosen) == 1:
        counts[chosen] = budget
        return counts
    counts[chosen] = np.floor(rng.dirichlet(alphas[chosen]) * budget)
    left = budget - int(counts.sum())
    if left:
        counts[chosen] += np.bincount(rng.dirichlet(alphas[chosen], left).argmax(1), minlength=len(chosen))
    return counts


def mask_image(length: int, num_inputs: int, num_targets: int, rng: Rng) -> tuple[Ids, Ids]:
    """Places of the visible and of the predicted tokens of an image: disjoint, each ascending."""
    order = rng.permutation(length)
    return np.sort(order[:num_inputs]), np.sort(order[num_inputs : num_inputs + num_targets])


def mask_text(ids: Sequence[int], num_inputs: int, num_targets: int, keep: Keep, rng: Rng) -> tuple[Ids, Ids]:
    """The visible part of a text and the part to predict, by span masking.

    Args:
        ids: tokens, [EOS] last.
        num_inputs: most visible tokens; with 0 nothing is visible, not even a sentinel.
        num_targets: most tokens of the target part.

    Returns:
        Ids of the visible part and of the target part. Of the latter, the first token is only fed and the last only predicted.
    """
    if num_inputs == 0:
        _, target = mask_spans(ids, np.zeros(len(ids), bool))
        return np.zeros(0, np.int64), cut_target(target, num_targets, rng)
    share = {"random": rng.random(), "all": 1.0, "binary": float(rng.integers(2))}[keep]
    visible, target = mask_spans(ids, rng.random(len(ids)) < share)
    while len(visible) > num_inputs:
        share *= _SHRINK
        visible, target = mask_spans(ids, rng.random(len(ids)) < share)
    return visible, cut_target(target, num_targets, rng)


def mask_spans(ids: Sequence[int], kept: NDArray[np.bool_]) -> tuple[Ids, Ids]:
    """Replace each run of hidden tokens by a sentinel, numbered from 1.

    Returns:
        The visible part with its sentinels; the target part: each sentinel before its run, and one more at the end.
    """
    visible: list[int] = []
    target: list[int] = []
    spans, hiding = 0, False
    for token, is_kept in zip(ids, kept.tolist(), strict=True):
        if is_kept:
            visible.append(token)
        else:
            if not hiding:
                spans += 1
                visible.append(sentinel(spans))
                target.append(sentinel(spans))
            target.append(token)
        hiding = not is_kept
    target.append(sentinel(spans + 1))
    return np.array(visible, np.int64), np.array(target, np.int64)


def cut_target(target: Ids, num_targets: int, rng: Rng) -> Ids:
    """A target part within its budget: it starts at a random span, or at the first whose rest fits."""
    if len(target) <= num_targets or not num_targets:
        return target[:num_targets]
    starts = np.flatnonzero((target > FIRST_SENTINEL) & (target < FIRST_SENTINEL + NUM_SENTINELS))
    start = int(starts[rng.integers(len(starts) - 1)])
    if len(target) - start < num_targets:
        start = int(starts[np.flatnonzero(len(target) - starts <= num_targets)[0]])
    return target[start : start + num_targets]


def text_positions_of(length: int) -> Ids:
    """Positions of a text's tokens: their rank; beyond the longest text all are 0, as in public."""
    ranks = np.arange(length)
    return np.where(ranks < TEXT_MAX_TOKENS, ranks, 0)


def visible_counts(is_text: bool, length: int) -> NDArray[np.int32]:
    """How many targets become visible at each slot of one modality: an image's all at its first, a text's one by one."""
    if is_text:
        return np.ones(length, np.int32)
    return np.array([length] + [0] * (length - 1), np.int32)[:length]
