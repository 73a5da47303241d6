"""Tokenizers: encoding beside a bare ViT-B, the quantizer's memory, a training step beside the public implementation's.

`--peer PATH` is a checkout of the public 4M (apple/ml-4m); what it needs beside our environment is installed from PyPI. On a GPU,
where there is one, also images a second, MFU of each tokenizer's training step, and hours of the paper's schedule.
"""

import argparse
import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import report
from bench.tokenizer_sides import CODES, Side, make_environment

Clock = Callable[[], float]
PX = 224
H100_FLOPS = 989e12  # dense bfloat16, from its data sheet; an H200's are the same
_IMAGENET, _CC12M, _EPOCHS = 1.28e6, 12e6, (100, 15)  # Table 3


def encoding(
    batch: int, rounds: int, device: str = "cpu", clock: Clock = time.perf_counter
) -> tuple[list[tuple[Any, ...]], dict[str, float]]:
    """Images a second from network input to tokens, beside timm's ViT-B/16 alone on the same images, in turns."""
    import torch
    from timm.models.vision_transformer import VisionTransformer

    from fourmill.tokenize.image_tokenizer import ImageTokenizer
    from fourmill.tokenize.presets import paper_tokenizers

    precision = "fp32" if device == "cpu" else "bf16"
    model = ImageTokenizer(paper_tokenizers()["rgb"], with_decoder=False).to_device(torch.device(device)).eval()
    vit = VisionTransformer(PX, 16, num_classes=0, class_token=False, global_pool="").to(device).eval()
    x = torch.rand(batch, 3, PX, PX, device=device)

    @torch.no_grad()
    def encode() -> None:
        model.tokens(x, precision)

    @torch.no_grad()
    def forward() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            vit(x)

    times = _in_turns(encode, forward, rounds, device, clock)
    ours, bare = (statistics.median(side) for side in times)
    rows = [
        (
            f"encode to tokens, {precision} on {device}",
            f"{batch / ours:.3g} images/s",
            f"{batch / bare:.3g} images/s by ViT-B alone",
        )
    ]
    return rows, {"encode_share_of_vit": bare / ours}


def quantizing(images: int) -> tuple[list[tuple[Any, ...]], dict[str, float]]:
    """Memory that a training step of the quantizer takes beside what a one-hot matrix of tokens and codewords would."""
    import psutil
    import torch

    from fourmill.tokenize.config import QuantizerConfig
    from fourmill.tokenize.quantizer import Quantizer

    _give_back_what_is_freed()
    tokens, size = images * (PX // 16) ** 2, CODES["rgb"]
    quantizer = Quantizer(QuantizerConfig(codebook_size=size), stale_threshold=1.0).train()
    latent = torch.randn(images, 32, PX // 16, PX // 16)
    quantizer(latent[:1], torch.Generator().manual_seed(0))
    before = psutil.Process().memory_info().rss
    with _Peak() as peak:
        quantizer(latent, torch.Generator().manual_seed(0))
    used, one_hot = (peak.rss - before) / 1e6, tokens * size * 4 / 1e6
    return [
        (f"quantizer, {tokens} tokens, {size} codewords", f"{used:.0f} MB", f"{one_hot:.0f} MB a one-hot matrix")
    ], {"quantizer_memory_share_of_one_hot": used / one_hot}


def _give_back_what_is_freed() -> None:
    """Have glibc return large blocks at once, so that the process is as large as what it holds (M_MMAP_THRESHOLD of malloc.h)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-3, 2**20)


class _Peak:
    """The highest memory of this process while a block runs, looked at a thousand times a second."""

    def __enter__(self) -> "_Peak":
        import threading

        import psutil

        self.rss, self._ends, here = 0, threading.Event(), psutil.Process()

        def look() -> None:
            while not self._ends.wait(0.001):
                self.rss = max(self.rss, here.memory_info().rss)

        self._thread = threading.Thread(target=look)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ends.set()
        self._thread.join()


def steps_of(
    label: str,
    batch: int,
    px: int,
    rounds: int,
    threads: int,
    peer: Path,
    clock: str = "seconds",
    is_compiled: bool = False,
) -> tuple[tuple[Any, ...], float, float]:
    """A training step of ours and of the public implementation on the same batch, in turns, each in a process of its own."""
    sides = [Side(name, label, batch, px, threads, str(peer), is_compiled) for name in ("ours", "theirs")]
    for side in sides:
        side.step()  # memory is allocated, kernels are chosen
    answers = [[side.step() for side in sides] for _ in range(rounds)]
    for side in sides:
        side.close()
    ours, theirs = (statistics.median(one[i][clock] for one in answers) for i in range(2))
    peaks = [answers[-1][i]["peak_mb"] for i in range(2)]
    row = (
        f"training step of {label}, {batch} x {px} px, fp32{', ours compiled' if is_compiled else ''}",
        f"{ours:.2f} s, {peaks[0]:.0f} MB",
        f"{theirs:.2f} s, {peaks[1]:.0f} MB by the public code",
    )
    return row, theirs / ours, peaks[0] / peaks[1]


def on_gpu(batch: int, rounds: int) -> tuple[list[tuple[Any, ...]], dict[str, float]]:
    """Each tokenizer's training step on a GPU in bfloat16: images a second, MFU, hours of the paper's schedule."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from bench.tokenizer_sides import inputs
    from fourmill.tokenize.presets import paper_tokenizers
    from fourmill.tokenize.state import start
    from fourmill.tokenize.train import train_step
    from fourmill.tokenize.train_set import LabelArrays

    rows: list[tuple[Any, ...]] = []
    figures: dict[str, float] = {}
    one = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 8, 8)
    for label, config in paper_tokenizers().items():
        state = start(config, LabelArrays((one * 65535).astype(np.uint16), one, one.astype(np.uint8)), "cuda")
        x = inputs(label, batch, PX).cuda()
        with FlopCounterMode(display=False) as counter:
            train_step(state, x, config)
        seconds, _ = _in_turns(
            lambda s=state, x=x, c=config: train_step(s, x, c), lambda: None, rounds, "cuda", time.perf_counter
        )
        rate = batch / statistics.median(seconds)
        mfu = counter.get_total_flops() / batch * rate / H100_FLOPS
        images = _IMAGENET * _EPOCHS[0] + _CC12M * _EPOCHS[1]
        hours = images / rate / 3600
        rows.append(
            (f"{label} step, {batch} images, bf16", f"{rate:.0f} images/s, MFU {mfu:.0%}", f"{hours:.0f} GPU hours")
        )
        figures |= {f"{label}_images_per_second": rate, f"{label}_mfu": mfu, f"{label}_paper_hours": hours}
        del state, x
        torch.cuda.empty_cache()
    return rows, figures


def _in_turns(
    one: Callable[[], Any], other: Callable[[], Any], rounds: int, device: str, clock: Clock
) -> tuple[list[float], list[float]]:
    one()
    other()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for work, seen in zip((one, other), times, strict=True):
            start = clock()
            work()
            if device == "cuda":
                import torch

                torch.cuda.synchronize()
            seen.append(clock() - start)
    return times


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one tokenizer, smaller batches; ends within a minute")
    parser.add_argument("--peer", type=Path, help="checkout of apple/ml-4m")
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread and its CPU seconds, for a machine that is not idle"
    )
    parser.add_argument("--compile", action="store_true", help="ours compiled: minutes of compiling each on a CPU")
    parser.add_argument("--labels", nargs="*", default=[], help=f"tokenizers to train a step of: {', '.join(CODES)}")
    given = parser.parse_args()
    import torch

    threads = 1 if given.cpu_time else os.cpu_count() or 1
    clock = time.process_time if given.cpu_time else time.perf_counter
    torch.set_num_threads(threads)
    rows, figures = encoding(*((4, 3) if given.quick else (16, 7)), clock=clock)
    for found in (quantizing(16 if given.quick else 32),):
        rows += found[0]
        figures |= found[1]
    if given.peer is None:
        rows.append(("training step", "absent", "give a checkout of the public 4M with --peer"))
    else:
        make_environment()
        ratios: list[tuple[float, float]] = []
        for label in given.labels or (["rgb"] if given.quick else list(CODES)):
            row, speedup, memory = steps_of(
                label,
                *((1, 64, 2) if given.quick else (2, PX, 3)),
                threads,
                given.peer.resolve(),
                "cpu_s" if given.cpu_time else "seconds",
                given.compile,
            )
            print(*row, sep=" | ", file=sys.stderr, flush=True)  # the next one takes minutes
            rows.append(row)
            ratios.append((speedup, memory))
            figures |= {f"train_step_speedup_{label}": speedup, f"peak_memory_ratio_{label}": memory}
        figures["train_step_speedup"] = statistics.geometric_mean(speed for speed, _ in ratios)
        figures["peak_memory_ratio"] = statistics.geometric_mean(memory for _, memory in ratios)
    if torch.cuda.is_available():
        for more in (encoding(64, 20, "cuda"), on_gpu(16, 10)):
            rows += more[0]
            figures |= {f"gpu_{name}": value for name, value in more[1].items()}
    report("tokenizers", ["what", "how much", "beside"], rows, figures)


if __name__ == "__main__":
    main()
