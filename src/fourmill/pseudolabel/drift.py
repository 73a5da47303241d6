"""Whether a block's labels look like those of the blocks before it: a warning for people, never a reason to stop.

The rule: a figure has drifted when its mean over the block lies more than a quarter of an image's standard deviation from
its mean over the published blocks, and more than four standard errors. The first asks for a change that matters, the second
for one that chance does not make. Both sides need a hundred labelled images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fourmill.core.ledger import ledger_path
from fourmill.core.names import SPLITS, Layout
from fourmill.core.store import Store
from fourmill.pseudolabel.members import label_format
from fourmill.pseudolabel.statistics import Statistics, read_statistics

MIN_IMAGES = 100
MIN_DEVIATIONS = 0.25
MIN_ERRORS = 4.0
_MOST_BLOCKS = 8  # the nearest before, then the nearest after: what is far away in the list was labelled long ago
REJECTED = "rejected"


@dataclass(frozen=True)
class Drift:
    """One figure that is not what it was."""

    figure: str
    block: float  # mean over the block's images
    published: float  # mean over those of the published blocks
    deviations: float  # between them, in standard deviations of a single image


def published_statistics(
    store: Store, dataset: str, layout: Layout, block: str, label: str
) -> tuple[Statistics, list[str]]:
    """What the published blocks nearest to this one add up to, and which they are."""
    folder = label_format(label).folder
    keys = layout.block_keys()
    here = keys.index(block)
    merged, used = Statistics(), []
    for other in (*reversed(keys[:here]), *keys[here + 1 :]):
        if len(used) == _MOST_BLOCKS:
            break
        is_published = all(store.exists(ledger_path(dataset, split, folder, other)) for split in SPLITS)
        found = read_statistics(store, dataset, folder, other) if is_published else None
        if found is not None:
            merged.merge(found)
            used.append(other)
    return merged, used


def drifts(block: Statistics, published: Statistics) -> list[Drift]:
    """The figures that have drifted, the farthest first; none where either side is too small to tell."""
    if min(block.labelled, published.labelled) < MIN_IMAGES:
        return []
    names = sorted(block.figures.keys() | published.figures.keys())
    compared = [_compare(name, _figure(block, name), _figure(published, name)) for name in names]
    compared.append(_compare(REJECTED, _rejected(block), _rejected(published)))
    return sorted((drift for drift in compared if drift is not None), key=lambda drift: -abs(drift.deviations))


class _Sample(NamedTuple):
    """One figure of one side."""

    mean: float
    variance: float  # of a single image's
    size: int  # images


def _figure(side: Statistics, name: str) -> _Sample:
    return _Sample(side.mean(name), side.variance(name), side.labelled)


def _rejected(side: Statistics) -> _Sample:
    share = (side.rows - side.labelled) / side.rows
    return _Sample(share, share * (1 - share), side.rows)


def _compare(name: str, block: _Sample, published: _Sample) -> Drift | None:
    gap = block.mean - published.mean
    deviation = math.sqrt((block.variance + published.variance) / 2)
    error = math.sqrt(block.variance / block.size + published.variance / published.size)
    if abs(gap) <= max(MIN_DEVIATIONS * deviation, MIN_ERRORS * error, 1e-6):
        return None
    return Drift(name, block.mean, published.mean, gap / deviation if deviation else math.copysign(math.inf, gap))


def drift_rows(found: Sequence[Drift]) -> list[list[str | float]]:
    """As a table: [figure, block, published, deviations]."""
    return [[one.figure, round(one.block, 5), round(one.published, 5), round(one.deviations, 2)] for one in found]
