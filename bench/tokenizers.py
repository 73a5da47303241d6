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
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.report import report
from bench.tokenizer_sides import CODES, Side, Work, make_environment
from fourmill.pipelines.environment import fast_precision

Clock = Callable[[], float]
PX = 224
PRECISIONS = ("fp32", "bf16")


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
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**20)
        libc.malloc_trim(0)  # what was kept until now


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
    work: Work, their_precision: str, rounds: int, clock: str = "seconds"
) -> tuple[tuple[Any, ...], float, float]:
    """A training step of ours and of the public implementation on the same batch, in turns, each in a process of its own."""
    sides = [Side("ours", work), Side("theirs", replace(work, precision=their_precision))]
    for side in sides:
        side.step()  # memory is allocated, kernels are chosen
    answers = [[side.step() for side in sides] for _ in range(rounds)]
    for side in sides:
        side.close()
    ours, theirs = (statistics.median(one[i][clock] for one in answers) for i in range(2))
    peaks = [answers[-1][i]["peak_mb"] for i in range(2)]
    row = (
        f"training step of {work.label}, {work.batch} x {work.px} px, {work.precision}{', ours compiled' if work.is_compiled else ''}",
        f"{ours:.2f} s, {peaks[0]:.0f} MB",
        f"{theirs:.2f} s, {peaks[1]:.0f} MB by the public code in {their_precision}",
    )
    return row, theirs / ours, peaks[0] / peaks[1]


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
    parser.add_argument(
        "--precision",
        choices=("own", *PRECISIONS),
        nargs="*",
        default=["own"],
        help="of training steps on the CPU: of both sides, or each side's own, which is bf16 for ours where the CPU has it, and "
        "fp32 for the public code, whose autocast is of GPUs alone",
    )
    parser.add_argument("--labels", nargs="*", default=[], help=f"tokenizers to train a step of: {', '.join(CODES)}")
    parser.add_argument(
        "--gpu-batch", type=int, default=32, help="images of a training step on a GPU, where there is one"
    )
    parser.add_argument("--only-gpu", action="store_true", help="leave out what runs on the CPU")
    given = parser.parse_args()
    import torch

    if given.peer is not None:
        make_environment()
    rows, figures = ([], {}) if given.only_gpu else on_cpu(given)
    if torch.cuda.is_available():
        from bench.tokenizers_gpu import WAVES, on_gpu

        for batch in (64, 256):
            found, shares = encoding(batch, 20, "cuda")
            rows += found
            figures |= {f"gpu_{name}_{batch}": value for name, value in shares.items()}
        peer = given.peer.resolve() if given.peer else None
        for name, is_compiled, has_graphs in (("", False, False), ("compiled_", True, False), ("graphs_", True, True)):
            waves = [given.labels] if given.labels else WAVES
            found, speeds = on_gpu(given.gpu_batch, 10, peer if is_compiled else None, waves, is_compiled, has_graphs)
            rows += found
            figures |= {f"gpu_{name}{figure}": value for figure, value in speeds.items()}
    report("tokenizers", ["what", "how much", "beside"], rows, figures)


def on_cpu(given: argparse.Namespace) -> tuple[list[tuple[Any, ...]], dict[str, float]]:
    """What is measured on every machine."""
    import torch

    threads = 1 if given.cpu_time else os.cpu_count() or 1
    clock = time.process_time if given.cpu_time else time.perf_counter
    torch.set_num_threads(threads)
    rows, figures = quantizing(16 if given.quick else 32)  # first: its memory is that of the process
    found, shares = encoding(*((2, 3) if given.quick else (16, 7)), clock=clock)
    rows += found
    figures |= shares
    if given.peer is None:
        rows.append(("training step", "absent", "give a checkout of the public 4M with --peer"))
        return rows, figures
    for precision in given.precision:
        found, ratios = _steps(given, precision, threads)
        rows += found
        figures |= ratios
    return rows, figures


def _steps(given: argparse.Namespace, precision: str, threads: int) -> tuple[list[tuple[Any, ...]], dict[str, float]]:
    """Training steps of all labels, in one precision or in each side's own."""
    ours, theirs = (fast_precision(), "fp32") if precision == "own" else (precision, precision)
    end = "" if precision == "own" else f"_{precision}"
    rows: list[tuple[Any, ...]] = []
    ratios: list[tuple[float, float]] = []
    figures: dict[str, float] = {}
    for label in given.labels or (["rgb"] if given.quick else list(CODES)):
        size = (1, 64) if given.quick else (2, PX)
        work = Work(label, *size, threads, str(given.peer.resolve()), given.compile, precision=ours)
        clock = "cpu_s" if given.cpu_time else "seconds"
        row, speedup, memory = steps_of(work, theirs, 2 if given.quick else 3, clock)
        print(*row, sep=" | ", file=sys.stderr, flush=True)  # the next one takes minutes
        rows.append(row)
        ratios.append((speedup, memory))
        figures |= {f"train_step_speedup_{label}{end}": speedup, f"peak_memory_ratio_{label}{end}": memory}
    figures[f"train_step_speedup{end}"] = statistics.geometric_mean(speed for speed, _ in ratios)
    figures[f"peak_memory_ratio{end}"] = statistics.geometric_mean(memory for _, memory in ratios)
    return rows, figures


if __name__ == "__main__":
    main()
