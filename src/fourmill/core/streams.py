"""CUDA streams of threads: while one thread's batch waits for the host, another's keeps the GPU at work (torch is imported here)."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ON_A_GPU = 2  # batches on their way at a time: one computes, the other is fed or fetched


class _Mine(threading.local):
    stream: torch.cuda.Stream | None = None
    is_inside = False


_mine = _Mine()


def streams_of(device: torch.device) -> int:
    """Threads that may ask a network for something at a time."""
    return _ON_A_GPU if device.type == "cuda" else 1


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Have what is done in the block on a GPU's stream of this thread's own; on a CPU nothing changes.

    It begins after all that this thread has asked of the GPU so far, such as the last step of a training. When it ends, all of it is
    done, so that any other stream may read what it made. A block in a block changes nothing.
    """
    if device.type != "cuda" or _mine.is_inside:
        yield
        return
    # A stream's device has its number: compared without, each batch would be given a stream of its own.
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if _mine.stream is None or _mine.stream.device != device:
        torch.cuda.synchronize(device)  # weights are there: they came by another stream
        _mine.stream = torch.cuda.Stream(device)
    _mine.stream.wait_stream(torch.cuda.current_stream(device))
    _mine.is_inside = True
    try:
        with torch.cuda.stream(_mine.stream):
            yield
    finally:
        _mine.is_inside = False
        _mine.stream.synchronize()  # after an error too: what networks keep for the next batch may have been begun


def to_host(tensors: Sequence[Tensor]) -> list[NDArray[Any]]:
    """Tensors of one device as arrays. On a GPU they travel together, into memory that it reaches by itself."""
    if not tensors or not tensors[0].is_cuda:
        return [np.ascontiguousarray(one.cpu().numpy()) for one in tensors]
    there = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in tensors]
    for target, one in zip(there, tensors, strict=True):
        target.copy_(one, non_blocking=True)
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return [target.numpy() for target in there]


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array on a device; on a GPU without waiting until it is there."""
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
