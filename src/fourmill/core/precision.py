"""How exactly a GPU multiplies matrices of float32, and convolves with them (torch is imported here).

Its tensor cores take them with ten bits (TF32), five to ten times faster than with all 24. That is plenty for layers beside
others in bfloat16, and too little to tell which codeword is nearest, or where somebody asked for float32. torch's switch is of the
whole process, so one thread at a time launches kernels here; they go on when it has left.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Literal

import torch

_switch = RLock()


@contextmanager
def fast_products(is_wanted: bool = True) -> Iterator[None]:
    """Ten bits are enough in the block, where wanted, and all 24 count where not; nothing changes on a CPU."""
    with _products("high" if is_wanted else "highest"):
        yield


@contextmanager
def exact_products() -> Iterator[None]:
    """All 24 bits count in the block."""
    with _products("highest"):
        yield


@contextmanager
def _products(wanted: Literal["high", "highest"]) -> Iterator[None]:
    if not torch.cuda.is_available():
        yield
        return
    with _switch:
        before, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision(wanted)
        torch.backends.cudnn.allow_tf32 = wanted != "highest"
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
            torch.backends.cudnn.allow_tf32 = convolutions
