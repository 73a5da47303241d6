"""What every training program is on the outside: a spec file in, JSON lines out, an exit code.

Prints `{"done", "total", "note"}` as it goes and `{"report": store path}` at the end. Exit codes: 0 done, 1 failed with the
reason on stderr, 2 misused.
"""

import argparse
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from fourmill.core.work import Progress

Spec = TypeVar("Spec", bound=BaseModel)


def run_spec_program(
    module: str,
    summary: str,
    spec_type: type[Spec],
    work: Callable[[Spec, Progress], str],
    arguments: Sequence[str] | None,
) -> int:
    """Parse the command line, do the work, and say how it went.

    Args:
        module: as in `python -m MODULE --spec FILE`.
        work: takes the spec and a listener, returns the store path of its report. ValueError, OSError and RuntimeError are
            failures that it explains itself.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=summary)
    parser.add_argument("--spec", type=Path, required=True, help=f"JSON file of a {spec_type.__name__}")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        spec = spec_type.model_validate_json(given.spec.read_text())
    except (OSError, ValidationError) as error:
        logging.error("%s is not a %s: %s", given.spec, spec_type.__name__, error)
        return 2
    try:
        report = work(spec, _say)
    except (RuntimeError, ValueError, OSError) as error:
        logging.error("%s", error)
        _leave_others()
        return 1
    except BaseException:
        _leave_others(traceback.format_exc())
        raise
    _line({"report": report})
    return 0


def _leave_others(last_words: str = "") -> None:
    """End at once where this process shares a training: an orderly end would wait for those who wait for it."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stderr.write(last_words)
        sys.stderr.flush()
        os._exit(1)


def _say(done: int, total: int, note: str) -> None:
    _line({"done": done, "total": total, "note": note})


def _line(event: dict[str, str | int]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()
