"""Settings of a whole process: how torch computes in it, and how it keeps and frees memory. Importing this imports no torch."""

import ctypes
import gc
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_COLLECT_AFTER = 20_000  # new containers, instead of 700


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


def keep_to_share_of_gpu(share: float) -> None:
    """Let torch take no more of a GPU's memory than this process's share of the GPU, when others have the rest.

    What torch keeps for later is nobody else's: without a bound, the first of several processes takes the room in which the last
    one's weights or batches were to be. At the bound it frees what it keeps, and only then is out of memory. CUDA's own memory, half
    a gigabyte for each process, is not counted.

    Args:
        share: 1 and more: the GPU is this process's alone; 0: it was given none, but may see one.
    """
    torch = sys.modules.get("torch")
    if 0 < share < 1 and torch is not None and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share)


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
