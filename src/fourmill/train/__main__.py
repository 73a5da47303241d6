"""`python -m fourmill.train --spec spec.json`: train one 4M; see `core.program` for what it prints and returns."""

import sys

from fourmill.core.program import run_spec_program
from fourmill.core.work import Progress
from fourmill.train.config import TrainSpec


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns the exit code: 0 done, 1 failed, 2 misused."""
    return run_spec_program("fourmill.train", "Train one 4M.", TrainSpec, _train, arguments)


def _train(spec: TrainSpec, progress: Progress) -> str:
    from fourmill.train.loop import train_fourm  # torch, once the spec is known to be one

    return train_fourm(spec, progress)


if __name__ == "__main__":
    sys.exit(main())
