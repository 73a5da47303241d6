"""How exactly a GPU multiplies matrices of float32 (torch is imported here).

Its tensor cores take them with ten bits (TF32), five to ten times faster than with all 24. That is plenty for layers beside
others in bfloat16, and too little to tell which codeword is nearest.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch


@contextmanager
def fast_products(is_wanted: bool = True) -> Iterator[None]:
    """Ten bits are enough in the block, where wanted; nothing changes on a CPU."""
    with _products("high" if is_wanted else None):
        yield


@contextmanager
def exact_products() -> Iterator[None]:
    """All 24 bits count in the block."""
    with _products("highest"):
        yield


@contextmanager
def _products(wanted: Literal["high", "highest"] | None) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    if wanted in (None, before) or not torch.cuda.is_available():
        yield
        return
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
