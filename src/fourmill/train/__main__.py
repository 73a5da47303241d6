"""`python -m fourmill.train --spec spec.json`: train one 4M.

Prints JSON lines: {"done", "total", "note"} as it goes, {"report": store path} at the end. Exit code 1 on failure, with
the reason on stderr.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

from pydantic import ValidationError

from fourmill.train.config import TrainSpec


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns the exit code: 0 done, 1 failed, 2 misused."""
    parser = argparse.ArgumentParser(prog="python -m fourmill.train", description="Train one 4M.")
    parser.add_argument("--spec", type=Path, required=True, help="JSON file of a TrainSpec")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        spec = TrainSpec.model_validate_json(given.spec.read_text())
    except (OSError, ValidationError) as error:
        logging.error("%s is not a training spec: %s", given.spec, error)
        return 2
    from fourmill.train.loop import TrainingError, train_fourm

    try:
        report = train_fourm(spec, _say)
    except (TrainingError, ValueError, OSError) as error:
        logging.error("%s", error)
        return 1
    _line({"report": report})
    return 0


def _say(done: int, total: int, note: str) -> None:
    _line({"done": done, "total": total, "note": note})


def _line(event: dict[str, str | int]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
