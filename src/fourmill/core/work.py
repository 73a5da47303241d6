"""The seam between the rooms and the runtime: a worker takes one shard at a time, path in, tar out.

A room writes a worker (a plain class made from small arguments); the runtime decides where it runs: in this process, or
as Ray actors that load weights once and are handed shard after shard. No image crosses between processes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fourmill.core.names import Split
from fourmill.core.shards import Receipt, Recipe

Progress = Callable[[int, int, str], None]
"""Called with (done, total, note) as long work moves on."""


@dataclass(frozen=True)
class ShardJob:
    """One shard of one split to be made by a recipe, for a run."""

    split: Split
    shard: int
    recipe: Recipe
    run_id: str


class ShardWorker(Protocol):
    """Makes shards of one stage. Construction may be slow (weights); `run` is called once a shard and split."""

    def run(self, job: ShardJob) -> Receipt:
        """Make the shard whole: tar, rows, receipt."""
        ...


@runtime_checkable
class GroupWorker(ShardWorker, Protocol):
    """A worker that gains from having several shards at once; those that are finished already it leaves as they are."""

    def run_together(self, jobs: Sequence[ShardJob]) -> list[Receipt]:
        """Make the shards one after the other, each whole."""
        ...


def no_progress(done: int, total: int, note: str) -> None:
    """A progress listener that says nothing."""
