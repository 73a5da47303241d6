"""CUDA streams of threads: while one thread's batch waits for the host, another's keeps the GPU at work (torch is imported here)."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_ON_A_GPU = 2  # batches on their way at a time: one computes, the other is fed or fetched


class _Mine(threading.local):
    stream: torch.cuda.Stream | None = None


_mine = _Mine()


def streams_of(device: torch.device) -> int:
    """Threads that may ask a network for something at a time."""
    return _ON_A_GPU if device.type == "cuda" else 1


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Have what is done in the block on a GPU's stream of this thread's own; on a CPU nothing changes.

    What the block gives away must have left the device, or been waited for.
    """
    if device.type != "cuda":
        yield
        return
    if _mine.stream is None or _mine.stream.device != device:
        torch.cuda.synchronize(device)  # weights are there: they came by another stream
        _mine.stream = torch.cuda.Stream(device)
    with torch.cuda.stream(_mine.stream):
        yield
