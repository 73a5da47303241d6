"""The seam of the room: a labeller knows images and labels, nothing else. No store, no shards, no Dagster, no Ray."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fourmill.core.labels import Box, Picture

Label = NDArray[np.float32] | NDArray[np.uint8] | list[Box]
"""Depth (H, W) float32 in [0, 1]; normals (H, W, 3) float32 in [-1, 1]; classes or edges (H, W) uint8; boxes."""


@dataclass(frozen=True)
class Labelled:
    """A label, and figures of its quality that only its labeller can know; they go into the sample's row."""

    label: Label
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Rejected:
    """A sample that cannot be labelled, and why."""

    reason: str
    status: str = "rejected"


Answer = Label | Labelled | Rejected
"""What a labeller says of one image."""


CONSTANT = Rejected("the network's output is constant")
"""Said of an image with content for which a network gave the same number everywhere.

One such image is odd, and rejected. That the network is wrong, and stops the block, takes two: before it has answered any two
images differently (`watch.Watch`), or of one shard, in which no image with content got a label (`items`).
"""

_LEAST_PIXELS = 64  # of an image in which there is something to see


def has_content(picture: Picture) -> bool:
    """Whether there is something to see in an image: more than one value, and more than a few pixels."""
    return picture.rgb_HWC.size >= 3 * _LEAST_PIXELS and picture.rgb_HWC.min() != picture.rgb_HWC.max()


class NetworkError(RuntimeError):
    """A network that is wrong: a value that is not finite, nothing seen in several images, another shape.

    It stops the work, no sample is to blame.
    """


class NotASceneError(ValueError):
    """An image that the demo's labellers do not know; says which labellers to choose instead."""


class Labeller(Protocol):
    """Images to labels of one kind. It may be `Concurrent`, `Fed` and `Clocked` too: whoever asks it looks for them."""

    label: str  # depth, normal, semseg, det, or one of `members.OWN`
    weights_digest: str
    batch_size: int  # images at once

    def bucket(self, picture: Picture) -> tuple[int, int]:
        """Height and width at which the network sees an image: those of one bucket can share a batch."""
        ...

    def label_pictures(self, pictures: Sequence[Picture]) -> Sequence[Answer]:
        """Label images of any sizes, in order; a label image has the pixel size of its image.

        A worker hands over at most a batch of one bucket, from a thread of its own. Running out of memory is raised as the
        library raises it: the worker halves the batch.

        Raises:
            NetworkError: the network is wrong.
        """
        ...


@runtime_checkable
class Concurrent(Protocol):
    """A labeller that may be asked about several batches at a time."""

    streams: int  # of them, each from a thread of its own


@runtime_checkable
class Fed(Protocol):
    """A labeller that asks pictures for themselves at a size (`Picture.at`): others resize them beforehand."""

    def fed_size(self, picture: Picture) -> tuple[int, int]:
        """Height and width at which it will ask for a picture."""
        ...


class Clock(Protocol):
    """Knows when a GPU computed for a network, as `gpu_clock.GpuClock` does."""

    def begin(self) -> None:
        """Forget what was, and note from now on."""
        ...

    def spans(self) -> list[tuple[float, float]]:
        """Begin and end of each forward pass since `begin`, in seconds."""
        ...


@runtime_checkable
class Clocked(Protocol):
    """A labeller whose network computes on a GPU, where there is one."""

    clock: Clock | None  # None: there is none


class FeatureExtractor(Protocol):
    """Square crops to dense features."""

    weights_digest: str
    channels: int

    def __call__(self, crops_BSSC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Crops (B, S, S, 3) uint8 to features (B, h, w, C) float32.

        Raises:
            ValueError: not such crops, or a side that the patches do not divide.
            NetworkError: the network is wrong.
        """
        ...
