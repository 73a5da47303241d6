"""The GPU part of bench.tokenizers: each tokenizer's training step, compiled and in bfloat16, beside the public code's.

Compiling takes a minute a tokenizer and many cores, so several sides compile at the same time; steps are timed one by one.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.tokenizer_sides import Side, Work
from fourmill.tokenize.presets import MULTI_RESOLUTION

PX = 224
FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, from their data sheets
_IMAGENET, _CC12M, _EPOCHS = 1.28e6, 12e6, (100, 15)  # Table 3
_FINE_TUNE = {"rgb": 5}  # epochs of CC12M at several resolutions (B.3); one for the others
_WARM_UP = 4  # steps: the first compiles, others let cuDNN choose and record graphs
WAVES = (("rgb", "semseg"), ("depth", "normal", "clip"))
_BESIDE = ("rgb", "semseg", "clip")  # labels whose public side is run too: depth and normals are rgb's network again


def on_gpu(
    batch: int,
    rounds: int,
    peer: Path | None,
    waves: Sequence[Sequence[str]],
    is_compiled: bool = True,
    has_graphs: bool = False,
) -> tuple[list[tuple[Any, ...]], dict[str, float]]:
    """Images a second, MFU and hours of the paper's schedule; with a peer, the speedup and the share of its memory.

    Args:
        batch: images of a step.
        peer: checkout of the public 4M.
        waves: labels whose sides are in memory at a time.
        has_graphs: our compiled steps are launched as CUDA graphs.
    """
    rows: list[tuple[Any, ...]] = []
    figures: dict[str, float] = {}
    ratios: list[tuple[float, float]] = []
    how = f"{', compiled' if is_compiled else ''}{', CUDA graphs' if has_graphs else ''}"
    for labels in waves:
        for label, sides in _timed(labels, batch, rounds, peer, is_compiled, has_graphs).items():
            ours, beside = sides["ours"], "public code not run"
            rate = batch / ours["seconds"]
            figures |= {f"{label}_images_per_second": rate, f"{label}_paper_hours": hours(label, rate)}
            peak = _peak_flops()
            if peak:
                figures[f"{label}_mfu"] = ours["flops"] * rate / peak
            if "theirs" in sides:
                theirs = sides["theirs"]
                ratios.append((theirs["seconds"] / ours["seconds"], ours["peak_mb"] / theirs["peak_mb"]))
                figures |= {f"train_step_speedup_{label}": ratios[-1][0], f"peak_memory_ratio_{label}": ratios[-1][1]}
                beside = f"{batch / theirs['seconds']:.0f} images/s, {theirs['peak_mb']:.0f} MB by the public code"
            mfu = f"MFU {figures[f'{label}_mfu']:.0%}, " if peak else ""
            said = f"{rate:.0f} images/s, {mfu}{ours['peak_mb']:.0f} MB, {hours(label, rate):.0f} GPU hours in the paper's schedule"
            rows.append((f"{label} step, {batch} x {PX} px, bf16{how}", said, beside))
            print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    if ratios:
        figures["train_step_speedup"] = statistics.geometric_mean(speed for speed, _ in ratios)
        figures["peak_memory_ratio"] = statistics.geometric_mean(memory for _, memory in ratios)
    return rows, figures


def hours(label: str, rate: float) -> float:
    """Hours on one GPU for all images of Table 3 and B.3; one of another side counts by its pixels.

    Args:
        rate: images of 224 pixels a second.
    """
    larger = statistics.mean((side / PX) ** 2 for side in MULTI_RESOLUTION)
    return (_IMAGENET * _EPOCHS[0] + _CC12M * (_EPOCHS[1] + _FINE_TUNE.get(label, 1) * larger)) / rate / 3600


def _timed(
    labels: Sequence[str], batch: int, rounds: int, peer: Path | None, is_compiled: bool, has_graphs: bool
) -> Mapping[str, Mapping[str, dict[str, float]]]:
    """Median seconds, memory and FLOPs an image of each side, by label and side."""
    sides: dict[tuple[str, str], Side] = {}
    for label in labels:
        work = Work(label, batch, PX, 2, str(peer or ""), is_compiled, has_graphs, "cuda", "bf16")
        sides[label, "ours"] = Side("ours", work)
        if peer is not None and label in _BESIDE:
            sides[label, "theirs"] = Side("theirs", work)
    for side in sides.values():
        side.begin()
    for side in sides.values():
        side.finish()
    for side in sides.values():
        for _ in range(_WARM_UP - 1):
            side.step()
    answers: dict[tuple[str, str], list[dict[str, float]]] = {key: [] for key in sides}
    for _ in range(rounds):
        for key, side in sides.items():
            answers[key].append(side.step())
    for side in sides.values():
        side.close()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (label, name), steps in answers.items():
        seconds = statistics.median(step["seconds"] for step in steps)
        found.setdefault(label, {})[name] = {**steps[-1], "seconds": seconds}
    return found


def _peak_flops() -> float | None:
    import torch

    name = torch.cuda.get_device_name()
    return next((flops for known, flops in FLOPS.items() if known in name), None)
