"""What the rows of a block's labels add up to: enough to show, to check, and to compare one block with others.

Kept as small JSON beside the ledgers, so that a later block can be compared without reading old rows again.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from fourmill.core.store import Store

_NUMBER = re.compile(r"\b\d+(\.\d+)?\b")


class Sums(BaseModel):
    """One figure over the images that have it."""

    model_config = ConfigDict(extra="forbid")

    num: int = 0  # images with it
    nonzero: int = 0
    total: float = 0.0
    squares: float = 0.0
    least: float = float("inf")
    most: float = float("-inf")

    def add(self, value: float) -> None:
        """Count one image."""
        self.num += 1
        self.nonzero += value != 0
        self.total += value
        self.squares += value * value
        self.least, self.most = min(self.least, value), max(self.most, value)

    def merge(self, other: "Sums") -> None:
        """Count another block's images too."""
        self.num += other.num
        self.nonzero += other.nonzero
        self.total += other.total
        self.squares += other.squares
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)


class Statistics(BaseModel):
    """The rows of one label over a block, or over several."""

    model_config = ConfigDict(extra="forbid")

    rows: int = 0
    labelled: int = 0
    rejected: dict[str, int] = {}  # by reason, numbers in it left out
    figures: dict[str, Sums] = {}

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Count ledger rows of the label stage."""
        reasons = Counter(self.rejected)
        for row in rows:
            self.rows += 1
            if row["status"] != "ok":
                # A size or a count of bytes is a sample's own: with it every one would have a reason of its own.
                reasons[_NUMBER.sub("N", row["reason"] or row["status"])] += 1
                continue
            self.labelled += 1
            for name, value in row["figures"]:
                self.figures.setdefault(name, Sums()).add(value)
        self.rejected = dict(reasons)

    def merge(self, other: "Statistics") -> None:
        """Count another block's rows too."""
        self.rows += other.rows
        self.labelled += other.labelled
        self.rejected = dict(Counter(self.rejected) + Counter(other.rejected))
        for name, sums in other.figures.items():
            self.figures.setdefault(name, Sums()).merge(sums)

    def mean(self, name: str) -> float:
        """Mean of a figure over the labelled images; those that lack it count as 0."""
        return self.figures[name].total / self.labelled if name in self.figures else 0.0

    def variance(self, name: str) -> float:
        """Variance of a figure over the labelled images; those that lack it count as 0."""
        if name not in self.figures:
            return 0.0
        return max(0.0, self.figures[name].squares / self.labelled - self.mean(name) ** 2)


def statistics_path(dataset: str, folder: str, block: str) -> str:
    """Where a block's statistics are kept."""
    return f"{dataset}/_statistics/{folder}/{block}.json"


def write_statistics(store: Store, dataset: str, folder: str, block: str, found: Statistics) -> None:
    """Keep a block's statistics."""
    store.write(statistics_path(dataset, folder, block), found.model_dump_json().encode())


def read_statistics(store: Store, dataset: str, folder: str, block: str) -> Statistics | None:
    """A block's statistics; None where there are none, or none that this version can read."""
    try:
        return Statistics.model_validate_json(store.read(statistics_path(dataset, folder, block)))
    except (FileNotFoundError, ValueError):
        return None
