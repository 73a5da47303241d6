"""What every training program is on the outside: a spec file in, JSON lines out, an exit code; and settings of a whole process.

Prints `{"done", "total", "note"}` as it goes and `{"report": store path}` at the end. Exit codes: 0 done, 1 failed with the
reason on stderr, 2 misused.
"""

import argparse
import ctypes
import gc
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
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_COLLECT_AFTER = 20_000  # new containers, instead of 700


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


def prepare_torch(threads: int, half_precision: bool) -> None:
    """Let torch compute with so many threads: on a CPU with deterministic kernels, on a GPU with the fastest.

    Deterministic not by `use_deterministic_algorithms`, which imports the compiler; and without its filling of fresh memory,
    up to a sixth of a step. Numbers below 1e-38 are zero: CPUs compute with them ten times slower, and gradients have some.

    Args:
        half_precision: what is left in float32 is multiplied with ten bits; see `core.precision`.
    """
    import torch

    torch.set_flush_denormal(True)  # this thread's, and of those that it begins: before there are any
    torch.set_num_threads(threads)
    _keep_freed_memory()
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high" if half_precision else "highest")
        torch.backends.cudnn.allow_tf32 = half_precision
        return
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def collect_rarely() -> None:
    """Spare Python's cycle collector what lives as long as the process: all objects that there are now, modules among them.

    For a process that makes a worker and then thousands of short-lived objects with it; reference counting frees those. Looking
    through everything again and again was a twentieth of the CPU time of a download (docs/benchmarks.md).
    """
    gc.unfreeze()  # of an earlier worker, which may be gone
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER, 20, 20)


def give_memory_back() -> None:
    """Free what nobody uses any more, cycles too, and what torch keeps of a GPU for later."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_worker() -> None:
    """Free a worker that was let go of, before the next one is loaded: its network is in cycles that `collect_rarely` froze."""
    gc.unfreeze()
    give_memory_back()


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed for what is allocated next; does nothing where malloc is another one.

    A training step frees and allocates its gradients and activations again. Returned to the system and filled with zeros at their
    next use, they cost 5 % of a step on one thread, and more where threads wait for each other (docs/benchmarks.md). The process
    stays as large as it was at its largest.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_MMAP_MAX, 0)


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
