"""The guard of a training: steps that are no number are skipped, and after several in a row the training goes back.

A skipped step leaves weights, optimiser, average and codebook as they were. Going back means the last checkpoint's weights
with other draws: the order of the data is moved on past the batches that failed, so a resumed training fails and goes back at
the same places.
"""

from dataclasses import asdict, dataclass
from typing import Literal

from fourmill.tokenize.config import GuardConfig

Advice = Literal["go on", "go back", "stop"]


class TrainingError(RuntimeError):
    """A training that cannot go on: where it stood, and what to change."""


@dataclass
class Guard:
    """What a training's guard has seen so far."""

    skipped: int = 0  # steps, also those that going back undid
    in_row: int = 0  # skipped since the last step that was taken
    rollbacks: int = 0
    moved_on: int = 0  # batches by which the order of the data is ahead of the steps

    def advice(self, is_finite: bool, config: GuardConfig) -> Advice:
        """Count a step, and say what to do after it."""
        if is_finite:
            self.in_row = 0
            return "go on"
        self.skipped += 1
        self.in_row += 1
        if self.in_row < config.max_in_row:
            return "go on"
        return "go back" if self.rollbacks < config.max_rollbacks else "stop"

    def gone_back(self, steps: int) -> "Guard":
        """The guard after going back by so many steps."""
        return Guard(self.skipped, 0, self.rollbacks + 1, self.moved_on + steps)

    def snapshot(self) -> dict[str, int]:
        """The guard as a checkpoint holds it."""
        return asdict(self)

    @classmethod
    def of(cls, snapshot: dict[str, int]) -> "Guard":
        """The guard of a snapshot."""
        return cls(**snapshot)
