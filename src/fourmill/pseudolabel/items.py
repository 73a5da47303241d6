"""Images to items of shards: decoding and encoding in some threads, the networks in another, nothing unbounded.

Images wait a little, in bounded numbers, until enough of one size are there for a batch.
"""

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Protocol

import numpy as np

from fourmill.core.flow import Group, Threads, ahead, gather, in_order
from fourmill.core.labels import Picture, decode_image
from fourmill.core.names import SampleKey
from fourmill.core.shards import Item
from fourmill.pseudolabel.attempts import Attempts
from fourmill.pseudolabel.format import LabelFormat
from fourmill.pseudolabel.labeller import CONSTANT, Answer, Fed, Labelled, Labeller, NetworkError, Rejected, has_content

_WINDOW_BATCHES = 16  # images that wait for others of their size, in batches
_WINDOW_PIXELS = 64_000_000  # 192 MB of decoded images; the larger wait in smaller numbers
_BATCHES_AHEAD = 2  # handed to the network's threads besides those they work on: the next begins without anybody's help
_SEVERAL = 2  # images of a shard for which a network gave the same number everywhere: one may be odd
_ENOUGH = 8  # images of a shard that tell a network that rejects everything from odd images

Member = tuple[SampleKey, Picture | Rejected]


class LabelShapeError(ValueError):
    """A label of another pixel size than its image."""


@dataclass
class Effort:
    """How long the networks' threads were at work, waiting for a device included; their mean, where there are several."""

    network_s: float = 0.0


def covered_s(spans: Sequence[tuple[float, float]]) -> float:
    """How long at least one of some spans, begin and end in seconds, was under way."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def label_items(
    threads: Threads,
    members: Iterator[tuple[SampleKey, bytes]],
    labeller: Labeller,
    form: LabelFormat,
) -> Iterator[Item]:
    """One item an image, in order, labelled or rejected.

    Raises:
        NetworkError: the network is wrong; what was yielded before is of no use.
    """
    return first_of(all_items(threads, members, [(Attempts(labeller), form)], Effort()), [])


def all_items(
    threads: Threads,
    members: Iterator[tuple[SampleKey, bytes]],
    labellers: Sequence[tuple[Attempts, LabelFormat]],
    effort: Effort,
) -> Iterator[tuple[Item, ...]]:
    """One item an image for each of the labellers, in order; the first one's batches and buckets are those of all.

    Args:
        labellers: they keep what they have learnt of the memory from shard to shard.

    Raises:
        NetworkError: a network is wrong; what was yielded before is of no use.
    """
    attempts, forms = [one for one, _ in labellers], [form for _, form in labellers]
    first = attempts[0].labeller
    size = first.batch_size
    fed_sizes = [one.labeller.fed_size for one in attempts if isinstance(one.labeller, Fed)]
    decoded = ahead(threads.coders, partial(_decode, fed_sizes), members, num=size + threads.num)
    groups = gather(decoded, _bucket_of(first), size, _WINDOW_BATCHES * size, _pixels, _WINDOW_PIXELS)
    networks = _Networks(attempts, effort, threads.networks)
    answered = ahead(threads.network, networks.answer, groups, num=threads.networks + _BATCHES_AHEAD)

    def encoding(encoders: ThreadPoolExecutor) -> Iterator[tuple[int, Future[tuple[Item, ...]]]]:
        for group, answers in answered:
            for place, (key, picture), said in zip(group.places, group.items, answers, strict=True):
                yield place, encoders.submit(_items, key, picture, said, forms)

    # A queue of its own: decoding for the next batch does not stand behind a batch of labels that all come at once.
    with ThreadPoolExecutor(threads.num, thread_name_prefix="encoder") as encoders:
        yield from in_order(encoding(encoders), most_unread=2 * size + threads.num)
    networks.finish()


def first_of(made: Iterator[tuple[Item, ...]], others: Sequence[list[Item]]) -> Iterator[Item]:
    """The first labeller's items; those of the others are put into their lists meanwhile."""
    for first, *rest in made:
        for items, item in zip(others, rest, strict=True):
            items.append(item)
        yield first


class _Networks:
    """The labellers, as their threads call them."""

    def __init__(self, attempts: Sequence[Attempts], effort: Effort, num_threads: int) -> None:
        self._attempts, self._effort = attempts, effort
        self._num_threads, self._lock = num_threads, Lock()
        self._num_tried = 0
        self._tallies = [_Tally() for _ in attempts]

    def answer(self, group: Group[Member]) -> tuple[Group[Member], list[tuple[Answer, ...]]]:
        """What each labeller says of each image."""
        start = time.monotonic()
        pictures = [picture for _, picture in group.items if isinstance(picture, Picture)]
        answers = [attempts.label(pictures, group.bucket) if pictures else [] for attempts in self._attempts]
        of_each = zip(*answers, strict=True)
        merged: list[tuple[Answer, ...]] = [
            next(of_each) if isinstance(picture, Picture) else (picture,) * len(self._attempts)
            for _, picture in group.items
        ]
        with self._lock:
            self._num_tried += len(pictures)
            for tally, its_answers in zip(self._tallies, answers, strict=True):
                tally.add(pictures, its_answers)
            self._effort.network_s += (time.monotonic() - start) / self._num_threads
        return group, merged

    def finish(self) -> None:
        """Raise NetworkError for a labeller that rejected whatever it saw, or whose network saw nothing in any image."""
        for attempts, tally in zip(self._attempts, self._tallies, strict=True):
            if tally.num_constant >= _SEVERAL and not tally.sees:
                raise NetworkError(
                    f"{attempts.labeller.label}: the network's output is constant for every image of a shard in which there is "
                    f"something to see ({tally.num_constant}); the weights are broken, or are of another network"
                )
            if tally.num_rejected == self._num_tried >= _ENOUGH:
                raise NetworkError(
                    f"{attempts.labeller.label}: every one of {tally.num_rejected} images of a shard was rejected; the network is "
                    "wrong, or was trained for other images; or memory is short, if they say so: give each actor a larger share "
                    "of the GPU, or feed smaller images"
                )


@dataclass
class _Tally:
    """What one labeller has said of a shard so far."""

    num_rejected: int = 0
    num_constant: int = 0  # of those: for the same output everywhere
    sees: bool = False  # an image with content got a label

    def add(self, pictures: Sequence[Picture], answers: Sequence[Answer]) -> None:
        self.num_rejected += sum(isinstance(one, Rejected) for one in answers)
        self.num_constant += sum(one is CONSTANT for one in answers)
        self.sees = self.sees or any(
            has_content(picture)
            for picture, one in zip(pictures, answers, strict=True)
            if not isinstance(one, Rejected)
        )


class _BucketOf(Protocol):
    def __call__(self, member: Member, /) -> Hashable: ...


def _bucket_of(labeller: Labeller) -> _BucketOf:
    def bucket(member: Member) -> Hashable:
        picture = member[1]
        if not isinstance(picture, Picture):
            return None
        return labeller.bucket(picture)

    return bucket


def _pixels(member: Member) -> int:
    return member[1].num_pixels if isinstance(member[1], Picture) else 0


FedSize = Callable[[Picture], tuple[int, int]]


def _decode(fed_sizes: Sequence[FedSize], member: tuple[SampleKey, bytes]) -> Member:
    """A picture, at the sizes that networks will ask for too: here, where there are several threads, and none waits for a GPU."""
    key, data = member
    try:
        picture = decode_image(data)
    except ValueError as error:
        return key, Rejected(str(error), status="undecodable")
    for fed_size in fed_sizes:
        picture.at(*fed_size(picture))
    return key, picture


def _items(
    key: SampleKey, picture: Picture | Rejected, answers: Sequence[Answer], forms: Sequence[LabelFormat]
) -> tuple[Item, ...]:
    return tuple(_item(key, picture, answer, form) for answer, form in zip(answers, forms, strict=True))


def _item(key: SampleKey, picture: Picture | Rejected, answer: Answer, form: LabelFormat) -> Item:
    height, width = (None, None) if isinstance(picture, Rejected) else picture.rgb_HWC.shape[:2]
    sides = {"width": width, "height": height}
    if isinstance(answer, Rejected):
        return Item(key, answer.status, answer.reason, extra={**sides, "figures": None})
    label, known = (answer.label, answer.figures) if isinstance(answer, Labelled) else (answer, {})
    if isinstance(label, np.ndarray) and label.shape[:2] != (height, width):
        raise LabelShapeError(
            f"{form.folder} of sample {key} has {label.shape[:2]} pixels (height, width), its image {(height, width)}; "
            "the labeller must bring labels to their image's size"
        )
    try:
        data = form.encode(label)
    except ValueError as error:
        raise NetworkError(f"{form.folder} of sample {key}: {error}; the network or its precision is wrong") from error
    figures = {**form.figures(label), **known}
    return Item(key, ext=form.ext, data=data, extra={**sides, "figures": sorted(figures.items())})
