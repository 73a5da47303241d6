"""`python -m fourmill.tokenize --spec spec.json`: train one image tokenizer; see `core.program` for what it prints and returns."""

import sys

from fourmill.core.program import run_spec_program
from fourmill.core.work import Progress
from fourmill.tokenize.spec import TokenizerSpec


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns the exit code: 0 done, 1 failed, 2 misused."""
    return run_spec_program("fourmill.tokenize", "Train one image tokenizer.", TokenizerSpec, _train, arguments)


def _train(spec: TokenizerSpec, progress: Progress) -> str:
    from fourmill.tokenize.train import train_tokenizer  # torch, once the spec is known to be one

    return train_tokenizer(spec, progress)


if __name__ == "__main__":
    sys.exit(main())
