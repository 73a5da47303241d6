"""What the labellers share about networks: loading, running and feeding them. What tells a wrong one is in `watch`.

On a GPU two threads ask a network, each on a stream of its own (`core.streams`): one batch is fed or fetched while the other
computes. So nothing here may change while batches are under way.

B images, H and W pixels.
"""

import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from threading import Lock
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from fourmill.core.labels import Picture
from fourmill.core.precision import fast_products
from fourmill.core.safe_load import UnsafeFileError, refusal
from fourmill.core.streams import own_stream, to_device, to_host
from fourmill.pseudolabel.config import Colour, NetworkSettings, seed_of
from fourmill.pseudolabel.folder_check import check_folder
from fourmill.pseudolabel.gpu_clock import GpuClock
from fourmill.pseudolabel.labeller import NetworkError
from fourmill.pseudolabel.stored import WeightsMissingError

Given = ParamSpec("Given")
Made = TypeVar("Made")

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# A file of the whole CLIP serves too; its text side is not needed.
_OTHER_PARTS = ("text_model.", "text_projection.", "logit_scale")


def load_network(
    label: str, settings: NetworkSettings, model_class: Callable[[], Any], make_seeded: Callable[[], nn.Module]
) -> tuple[Any, torch.device]:
    """A network in evaluation mode and the device it is on: the first GPU when there is one.

    Args:
        label: what the network makes, for errors.
        settings: its weights, a folder or `seeded:N`, and whether channels come last.
        model_class: gives a transformers class; only called for a folder.
        make_seeded: builds the tiny network; random numbers are drawn from torch's own generator.

    Raises:
        WeightsMissingError: the folder cannot be loaded.
        NetworkError: its file lacks keys of the network, or has them in other shapes.
    """
    seed = seed_of(settings.weights)
    if seed is None:
        network = from_folder(label, Path(settings.weights), model_class())
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = make_seeded()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return placed(network, settings, device), device


def on_own_stream(method: Callable[Concatenate[Any, Given], Made]) -> Callable[Concatenate[Any, Given], Made]:
    """A method of something that is on `_device`, on the GPU's stream of the thread that calls it."""

    @wraps(method)
    def asked(self: Any, /, *given: Given.args, **named: Given.kwargs) -> Made:
        with own_stream(self._device):
            return method(self, *given, **named)

    return asked


def placed(network: Any, settings: NetworkSettings, device: torch.device) -> Any:
    """A network on its device, ready to be asked and never trained."""
    network = network.eval().requires_grad_(False).to(device)
    return network.to(memory_format=torch.channels_last) if settings.channels_last else network


class Forward:
    """A network's forward pass as its settings want it: in their precision, layout, and compiled or not.

    torch's autocast chooses per operation what is safe to compute in less than float32. It would make the weights of layers
    smaller for every batch again, so those that it always makes smaller stay so from the first batch on: the same numbers.
    """

    def __init__(
        self,
        settings: NetworkSettings,
        device: torch.device,
        network: nn.Module,
        function: Callable[[Tensor], tuple[Tensor, ...]],
        blocks: Iterable[nn.Module] = (),
        compiler: Callable[..., Any] = torch.compile,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        """A function that asks a network.

        Args:
            network: all that the function asks, and nothing that others ask in float32.
            blocks: parts of the network that are alike, to be compiled instead of the whole: the first one's code serves all.
            compiler: takes the function and a backend, where the settings name one.
            prepare: what is done to the network before its first batch; it need not be as it was in its file any more.
        """
        self._device, self._dtype = device, PRECISIONS[settings.precision]
        self._channels_last = settings.channels_last
        self._network, self._function = network, function
        self._first, self._known_sizes = Lock(), set[tuple[int, ...]]()
        self._prepare = prepare
        self.clock = GpuClock() if device.type == "cuda" else None
        blocks = list(blocks)
        if settings.compile_backend is not None and blocks:
            for block in blocks:
                block.compile(backend=settings.compile_backend)
        elif settings.compile_backend is not None:
            self._function = compiler(function, backend=settings.compile_backend)

    def __call__(self, pixels_BCHW: Tensor) -> tuple[Tensor, ...]:
        """The function's outputs, float32."""
        size = tuple(pixels_BCHW.shape[2:])
        if size in self._known_sizes:
            return self._run(pixels_BCHW)
        # What a network makes for a size and keeps (RT-DETR's anchors) must be there before another stream reads it.
        with self._first:
            if not self._known_sizes:
                self._make_ready()
            outputs = self._run(pixels_BCHW)
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
            self._known_sizes.add(size)
        return outputs

    def _run(self, pixels_BCHW: Tensor) -> tuple[Tensor, ...]:
        if self._channels_last:
            pixels_BCHW = pixels_BCHW.contiguous(memory_format=torch.channels_last)
        is_half = self._dtype != torch.float32
        noted = self.clock.around() if self.clock is not None else nullcontext()
        with fast_products(is_half), noted, torch.autocast(self._device.type, self._dtype, enabled=is_half):
            outputs = self._function(pixels_BCHW)
        return tuple(output.float() for output in outputs)

    def _make_ready(self) -> None:
        """Prepare the network, and make its layers' weights smaller; not subclasses', which compute of theirs in float32."""
        with torch.inference_mode(False):
            if self._prepare is not None:
                self._prepare()
            for module in self._network.modules() if self._dtype != torch.float32 else ():
                if type(module) in (nn.Linear, nn.Conv2d, nn.ConvTranspose2d):
                    module.to(self._dtype)


def to_tensor(images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8], device: torch.device) -> Tensor:
    """RGB images (H, W, 3) of one size, or (B, H, W, 3) of them, as (B, 3, H, W) float32 in [0, 1]."""
    if device.type == "cuda":  # put together once, in memory that the GPU reaches by itself
        there = torch.empty((len(images), *images[0].shape), dtype=torch.uint8, pin_memory=True)
        np.stack(list(images), out=there.numpy())
        rgb_BHWC = there.to(device, non_blocking=True)
    else:
        rgb_BHWC = to_device(images if isinstance(images, np.ndarray) else np.stack(images), device)
    return rgb_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) / 255


def size_of(picture: Picture) -> tuple[int, int]:
    """Height and width in pixels."""
    return picture.rgb_HWC.shape[0], picture.rgb_HWC.shape[1]


def shortest_edge(size: tuple[int, int], shorter_px: int, longer_px: int) -> tuple[int, int]:
    """Height and width when the shorter side is resized to `shorter_px`, unless the longer gets longer than `longer_px`.

    As detectron2's ResizeShortestEdge, but never 0.
    """
    # Two roundings, in its order: at a half of a pixel one product gives another size for one image in three thousand.
    longer = shorter_px / min(size) * max(size)
    reduction = min(1.0, longer_px / max(longer, shorter_px))
    short, long = (max(1, int(side * reduction + 0.5)) for side in (shorter_px, longer))
    return (short, long) if size[0] < size[1] else (long, short)


def fed(pictures: Sequence[Picture], device: torch.device, height: int, width: int) -> Tensor:
    """Images as (B, 3, height, width) float32 in [0, 1], in 256 levels still, as Pillow resizes them."""
    return to_tensor([picture.at(height, width) for picture in pictures], device)


def resize(x_BCHW: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, antialiased where it reduces: for what networks give, which is not in 8 bits."""
    if x_BCHW.shape[-2:] == (height, width):
        return x_BCHW
    return F.interpolate(x_BCHW, (height, width), mode="bilinear", align_corners=False, antialias=True)


class Standardise:
    """Subtracts a colour's mean and divides by its deviation, channel by channel; both stay on the device."""

    def __init__(self, mean: Colour, std: Colour, device: torch.device) -> None:
        self._mean_CHW, self._std_CHW = (torch.tensor(one, device=device)[:, None, None] for one in (mean, std))

    def __call__(self, rgb_BCHW: Tensor) -> Tensor:
        """Standardised pixels of RGB in [0, 1]."""
        return (rgb_BCHW - self._mean_CHW) / self._std_CHW


def batches(sizes: Sequence[tuple[int, int]], batch_size: int) -> Iterator[list[int]]:
    """Positions of equal sizes together, at most `batch_size` at once; sizes in the order of first appearance."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(sizes):
        by_size.setdefault(size, []).append(index)
    for indices in by_size.values():
        for start in range(0, len(indices), batch_size):
            yield indices[start : start + batch_size]


def check_shape(what: str, output: Tensor, shape: tuple[int, ...], weights: str) -> None:
    """A network's output has the right shape.

    Raises:
        NetworkError: it has not.
    """
    if tuple(output.shape) != shape:
        raise NetworkError(
            f"{what} from {weights} has shape {tuple(output.shape)}, expected {shape}: another architecture?"
        )


def as_numpy(x: Tensor) -> NDArray[np.float32]:
    """A tensor as a contiguous float32 array on the host."""
    return to_host([x.float()])[0]


def from_folder(label: str, folder: Path, model_class: Any) -> nn.Module:
    """A transformers network from what `save_pretrained` wrote, every key of which must fit.

    Raises:
        WeightsMissingError: the folder cannot be loaded.
        UnsafeFileError: it would run a program of its own, or fetch one, or other weights.
        NetworkError: the file lacks keys of the network, has others, or has them in other shapes; they are named.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    check_folder(label, folder)
    try:
        network, info = model_class.from_pretrained(
            folder.absolute(),  # else transformers takes what is no folder for the name of a repository
            local_files_only=True,
            trust_remote_code=False,  # else transformers asks whoever sits there, and runs what the folder brings
            output_loading_info=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # they are named below
        )
    except RuntimeError as error:
        raise NetworkError(
            f"{label} labeller: the weights in {folder} do not fit {model_class.__name__}: {error}"
        ) from error
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(f"{label} labeller: {refusal(folder, error)}") from error
    except (OSError, EOFError, SafetensorError, ValueError, KeyError, ImportError) as error:
        raise WeightsMissingError(
            f"{label} labeller: {folder} does not load as {model_class.__name__} ({type(error).__name__}: {error}). Expected "
            "config.json and model.safetensors as save_pretrained writes them"
        ) from error
    known = _known_differences(network)
    wrong = {name: [_shown(key) for key in sorted(keys, key=str)] for name, keys in info.items()}
    wrong = {
        name: [key for key in keys if not key.startswith(_OTHER_PARTS) and not known(name, key)]
        for name, keys in wrong.items()
    }
    if any(wrong.values()):
        named = "; ".join(f"{name.replace('_', ' ')}: {', '.join(keys[:5])}" for name, keys in wrong.items() if keys)
        raise NetworkError(f"{label} labeller: the weights in {folder} do not fit {model_class.__name__}: {named}")
    # Weights mapped from a file lie unaligned in memory, where some kernels round differently than elsewhere.
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.clone()
    return network


def _known_differences(network: nn.Module) -> Callable[[str, str], bool]:
    """Whether a key is one that files may lack or have too much, by what transformers' own classes say of themselves.

    It heeds only what the outermost class says. Mask2Former's public files were made when Swin kept an index that is now
    computed, and had no last norm, which a backbone does not use: the classes inside say so.
    """
    found: list[tuple[str, str, re.Pattern[str]]] = []
    for name, module in network.named_modules():
        for kind in ("missing", "unexpected"):
            for pattern in getattr(module, f"_keys_to_ignore_on_load_{kind}", None) or ():
                found.append((f"{kind}_keys", f"{name}." if name else "", re.compile(pattern)))

    def is_known(kind: str, key: str) -> bool:
        return any(
            kind == its_kind and key.startswith(prefix) and pattern.search(key.removeprefix(prefix))
            for its_kind, prefix, pattern in found
        )

    return is_known


def _shown(key: Any) -> str:
    """A key, or for one of another shape what the file has and what is expected."""
    return key if isinstance(key, str) else f"{key[0]} {tuple(key[1])}, expected {tuple(key[2])}"
