"""Rate of each labeller, with decoding and encoding beside it, as a share of its network's alone at the same sizes."""

import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.labels_work import ThreadTime, photo
from fourmill.core.flow import Threads, ahead
from fourmill.core.labels import decode_image
from fourmill.core.names import sample_key
from fourmill.core.process import free_worker
from fourmill.core.streams import streams_of
from fourmill.pipelines.profiles import profile
from fourmill.pseudolabel.config import ClipConfig, DetectorConfig, DptConfig, Mask2FormerConfig, VitDetConfig
from fourmill.pseudolabel.items import label_items
from fourmill.pseudolabel.make import make_features, make_labeller
from fourmill.pseudolabel.members import label_format

WEIGHTS = "seeded:0"
# Tiny networks, fed so large that they take what real ones take on a GPU, or longer.
TINY: dict[str, Any] = {
    "depth": DptConfig(weights=WEIGHTS, longer_px=736, batch_size=4),
    "semseg": Mask2FormerConfig(weights=WEIGHTS, shorter_px=512, longer_px=853, batch_size=4),
    "det": DetectorConfig(weights=WEIGHTS, input_px=640, batch_size=4),
    "clip": ClipConfig(weights=WEIGHTS, patch_px=16, channels=64, batch_size=16),
}
# Of real size, from a folder, fed as the paper's labellers are.
REAL: dict[str, Any] = {
    "depth": DptConfig(weights=WEIGHTS, batch_size=1),
    "semseg": Mask2FormerConfig(weights=WEIGHTS, batch_size=1),
    "det": DetectorConfig(weights=WEIGHTS, batch_size=1),
    "clip": ClipConfig(weights=WEIGHTS, batch_size=1),
    "vitdet": VitDetConfig(weights=WEIGHTS, batch_size=1),
}
# The same on a GPU: batches that fill one.
ON_A_GPU: dict[str, Any] = {
    "depth": DptConfig(weights=WEIGHTS, batch_size=16, precision="bf16"),
    "normal": DptConfig(weights=WEIGHTS, batch_size=16, precision="bf16"),
    "semseg": Mask2FormerConfig(weights=WEIGHTS, batch_size=8, precision="bf16"),
    "det": DetectorConfig(weights=WEIGHTS, batch_size=32, precision="bf16"),
    "clip": ClipConfig(weights=WEIGHTS, batch_size=64, precision="bf16"),
    "vitdet": VitDetConfig(weights=WEIGHTS, batch_size=8, precision="bf16", compile_backend="inductor"),
}
SMALL, LARGE = (
    (256, 320),
    (512, 768),
)  # (height, width) of a stored image; what a network is fed follows from its config
NAMES = {
    "depth": "dpt",
    "normal": "dpt_normal",
    "semseg": "mask2former",
    "det": "detector",
    "clip": "clip",
    "vitdet": "vitdet",
}
_OF_A_GPU = {
    "semseg": 0.25,
    "clip": 8.0,
    "vitdet": 0.25,
}  # images of these, beside the others', that take it about as long
_CROPS = 64  # at a time, as the tokens' stage asks for features
_CC12M = 12.4e6
_READY_S = 600  # for the slowest actor to load its network


@dataclass(frozen=True)
class Amount:
    """How much is measured."""

    images: int
    rounds: int
    sides: tuple[int, int] = SMALL
    coders: int = 2  # threads that decode and encode, of all actors
    actors: int | None = 1  # processes that label at once; None: as many as the profile for CC12M puts on one GPU


def shares(
    configs: Mapping[str, Any], networks: Path | None, amount: Amount
) -> tuple[list[tuple[Any, ...]], dict[str, float]]:
    """One row and its figures for each labeller.

    Args:
        networks: folder with the networks' folders; without it they are the configs' own.
    """
    rows: list[tuple[Any, ...]] = []
    figures: dict[str, float] = {}
    import torch

    for label, config in configs.items():
        scale = _OF_A_GPU.get(label, 1.0) if torch.cuda.is_available() else 1.0
        its_amount = replace(amount, images=max(1, round(amount.images * scale)))
        if networks is not None:
            config = config.model_copy(update={"weights": str(networks / label)})
        row, found = share_of_forward(label, config, its_amount)
        print(*row, sep=" | ", file=sys.stderr, flush=True)
        rows.append(row)
        figures |= {f"{what}_{NAMES[label]}": value for what, value in found.items()}
    return rows, figures


def share_of_forward(label: str, config: Any, amount: Amount) -> tuple[tuple[Any, ...], dict[str, float]]:
    """The share, and what else is known: on a CPU the network's share of its thread's CPU time, which holds on a busy machine
    too; on a GPU the hours for CC12M; for ViTDet how much faster it is than detectron2's own, one image at a time in float32.
    """
    import torch

    size = min(config.batch_size, amount.images)
    amount = replace(amount, images=amount.images // size * size)  # whole batches, of the network alone too
    is_cuda = torch.cuda.is_available()
    actors = amount.actors or actors_of_a_gpu(label)
    found = _one_actor(label, config, amount, max(1, amount.coders // actors))
    free_worker()  # more actors want the room
    network, whole = (min(side) for side in zip(*found.times, strict=True)) if is_cuda else _medians(found.times)
    rate, memory_gb = amount.images / whole, found.memory_gb
    beside = f"{amount.images / network:.3g} images/s by the network alone"
    if actors > 1:
        beside += f"; {rate:.3g} by one actor instead of {actors}"
        rate, memory_gb = rate_of_actors(label, config, amount, actors)
    figures = {"share_of_forward": rate * network / amount.images}
    if is_cuda:
        figures |= {"images_per_second": rate, "gpu_hours": _CC12M / rate / 3600}
        beside += f"; {figures['gpu_hours']:.0f} GPU hours for 12.4 M images; {memory_gb:.1f} GB held"
        torch.cuda.reset_peak_memory_stats()
    else:
        figures["cpu_share_of_forward"] = found.spent.seconds["network"] / found.spent.seconds["all"]
        beside += f"; {figures['cpu_share_of_forward']:.3f} of its thread's CPU time"
    if label == "vitdet":
        plain = detectron2_rate(Path(config.weights), 8 if is_cuda else 1)
        figures["speedup_over_detectron2"] = rate / plain
        beside += f"; {plain:.3g} by detectron2's own, one image at a time in float32"
    return (f"{NAMES[label]}, {found.fed}", f"{rate:.3g} images/s", beside), figures


@dataclass(frozen=True)
class _Measured:
    fed: str
    times: list[tuple[float, float]]  # of the network alone and of all, in seconds
    spent: ThreadTime
    memory_gb: float


def _one_actor(label: str, config: Any, amount: Amount, coders: int) -> _Measured:
    """Both sides in turns, in this process; its network is gone when it returns."""
    one = _Labeller(label, config, amount)
    threads = Threads(coders, streams_of(one.device))
    try:
        one.alone(one.size)  # first calls choose kernels
        one.staged(threads)
        spent = one.count()
        times = [(_wall(one.alone), _wall(lambda: one.staged(threads))) for _ in range(amount.rounds)]
    finally:
        threads.close()
    return _Measured(one.fed, times, spent, _memory_gb())


class _Labeller:
    """A labeller, its images, and its network fed at the same size."""

    def __init__(self, label: str, config: Any, amount: Amount) -> None:
        import torch

        self._label, self._images = label, amount.images
        made = [photo(*amount.sides, seed) for seed in range(min(amount.images, 12))]
        self._data = [made[i % len(made)] for i in range(amount.images)]
        self.labeller: Any = make_features(config) if label == "clip" else make_labeller(_label_of(label), config)
        self.device: torch.device = self.labeller._device
        self.size = min(config.batch_size, amount.images)
        picture = decode_image(made[0])
        self._crops = None
        if label == "clip":
            crops = [decode_image(one).rgb_HWC[:224, :224] for one in made]
            self._crops = np.stack([crops[i % len(crops)] for i in range(amount.images)])
        height, width = (224, 224) if label == "clip" else self.labeller.bucket(picture)
        padding = (32, 32) if label == "semseg" else (1, 1)
        shape = (self.size, 3, height + -height % padding[0], width + -width % padding[1])
        self._pixels = torch.rand(shape, device=self.device)
        self._of_crops: Any = getattr(self.labeller, "on_device", None)
        self._forward: Callable[[Any], Any] = self.labeller._forward
        if label == "vitdet":
            sizes = [(height, width)] * self.size
            self._forward = lambda pixels: self.labeller.detect(pixels, sizes)
        self.fed = f"{self.size} x {shape[2]} x {shape[3]}, {config.precision}"

    def count(self) -> ThreadTime:
        """From now on, the CPU time of the network and of its whole thread."""
        spent = ThreadTime()
        self.labeller._forward = spent.of("network", self.labeller._forward)
        if self._crops is not None:
            self._of_crops = spent.of("all", self._of_crops)
        else:
            self.labeller.label_pictures = spent.of("all", self.labeller.label_pictures)
        return spent

    def alone(self, num: int = 0) -> None:
        """The network alone."""
        import torch

        with torch.inference_mode():
            for _ in range((num or self._images) // self.size):
                self._forward(self._pixels)

    def staged(self, threads: Threads) -> None:
        """All of it."""
        if self._crops is not None:
            parts = np.split(self._crops, range(_CROPS, len(self._crops), _CROPS))
            for _ in ahead(threads.network, self._of_crops, parts, num=threads.networks + 2):
                pass
            return
        members = ((sample_key(i), one) for i, one in enumerate(self._data))
        made = list(label_items(threads, members, self.labeller, label_format(_label_of(self._label))))
        assert all(item.status == "ok" for item in made), made[0]


def actors_of_a_gpu(label: str) -> int:
    """How many actors the profile `cc12m_4m7` lets share a GPU for a label; detectors but ViTDet share as DPT's do."""
    ray = profile("cc12m_4m7", Path()).ray
    stage = {"clip": "tokens/clip", "det": "labels/depth", "vitdet": "labels/det"}.get(label, f"labels/{label}")
    return max(1, round(1 / (ray.for_stage(stage).gpus_per_worker or 1)))


def _memory_gb() -> float:
    """Most of a GPU's memory that this process has held, torch's cache included, in GB."""
    import torch

    return torch.cuda.max_memory_reserved() / 1e9 if torch.cuda.is_available() else 0.0


def rate_of_actors(label: str, config: Any, amount: Amount, actors: int) -> tuple[float, float]:
    """Images a second of so many actors at once, each a process with all of the images, from when all are ready to the last's end;
    and the GPU memory that all of them held, in GB.
    """
    context = multiprocessing.get_context("spawn")
    ready, spans = context.Barrier(actors), context.SimpleQueue()
    alone = replace(amount, coders=max(1, amount.coders // actors), actors=1)
    processes = [
        context.Process(target=_act, args=(label, config, alone, ready, spans), daemon=True) for _ in range(actors)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"{label}: an actor of {actors} failed; what it said is above")
    begin, end, memory_gb = zip(*(spans.get() for _ in processes), strict=True)
    return actors * amount.images * amount.rounds / (max(end) - min(begin)), sum(memory_gb)


def _act(label: str, config: Any, amount: Amount, ready: Any, spans: Any) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        one = _Labeller(label, config, amount)
        threads = Threads(amount.coders, streams_of(one.device))
        one.staged(threads)
    except BaseException:
        ready.abort()  # or the others would wait for it
        raise
    ready.wait(_READY_S)
    begin = time.monotonic()  # one clock for all processes of a machine
    for _ in range(amount.rounds):
        one.staged(threads)
    spans.put((begin, time.monotonic(), _memory_gb()))
    threads.close()


def detectron2_rate(folder: Path, num: int) -> float:
    """Images a second of detectron2's own network and inference, one image at a time in float32, as its trainer evaluates."""
    import torch

    from fourmill.pseudolabel.vitdet import load
    from fourmill.pseudolabel.vitdet_keys import read_architecture

    architecture = read_architecture(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = load(folder, architecture).eval().to(device)
    pixels = torch.randint(256, (3, architecture.image_px, architecture.image_px)).float()

    def infer() -> None:
        with torch.inference_mode():
            for _ in range(num):
                network.inference([{"image": pixels}])

    infer()
    return num / _wall(infer)


def _label_of(name: str) -> str:
    return "det" if name == "vitdet" else name


def _medians(times: Sequence[tuple[float, float]]) -> tuple[float, float]:
    network, whole = zip(*times, strict=True)
    return float(np.median(network)), float(np.median(whole))


def _wall(work: Callable[[], None]) -> float:
    import torch

    start = time.monotonic()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - start
