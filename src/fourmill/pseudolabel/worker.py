"""The label stage: a shard of images in, a shard of one label out.

Images are decoded and labels encoded by some threads while the network works in another; images wait a little, in
bounded numbers, until enough of one size are there for a batch.
"""

import time
from collections.abc import Hashable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fourmill.core.labels import Picture, decode_image
from fourmill.core.names import SampleKey, Split
from fourmill.core.shards import (
    Item,
    MissingShardError,
    Receipt,
    Recipe,
    ShardPlace,
    need,
    read_members,
    write_shard,
)
from fourmill.core.store import Store, open_store
from fourmill.core.work import ShardJob
from fourmill.pseudolabel.attempts import Attempts
from fourmill.pseudolabel.config import (
    AnyLabellerConfig,
    config_digest,
    label_version,
    require_weights,
    weights_digest,
)
from fourmill.pseudolabel.flow import Group, Threads, ahead, gather, in_order
from fourmill.pseudolabel.labeller import Answer, Labelled, Labeller, NetworkError, Rejected
from fourmill.pseudolabel.make import make_labeller
from fourmill.pseudolabel.members import ROW_EXTRA, LabelFormat, label_format

_IMAGES = "images"
_WINDOW_BATCHES = 16  # images that wait for others of their size, in batches
_WINDOW_PIXELS = 64_000_000  # 192 MB of decoded images; the larger wait in smaller numbers
_BATCHES_AHEAD = 3  # handed to the network's thread: one is worked on, the next begins without anybody's help
_ENOUGH = 8  # images of a shard that tell a network that rejects everything from odd images

Member = tuple[SampleKey, Picture | Rejected]


class LabelShapeError(ValueError):
    """A label of another pixel size than its image."""


@dataclass
class Effort:
    """How long a network was at work, for whoever watches."""

    network_s: float = 0.0


def label_recipe(store: Store, dataset: str, split: Split, shard: int, label: str, config: AnyLabellerConfig) -> Recipe:
    """All that a shard of labels depends on.

    Raises:
        MissingShardError: its images are not there.
        WeightsMissingError: the labeller's weights are not there.
    """
    require_weights(label, config)
    images = need(store, ShardPlace(dataset, split, _IMAGES, shard), f"{dataset}/images")
    return Recipe(
        stage=f"labels/{label}",
        code_version=label_version(config),
        config=config_digest(config),
        weights=weights_digest(config),
        inputs={_IMAGES: images.content},
    )


class LabelWorker:
    """Labels shard after shard with one labeller. A `core.work.ShardWorker`; construction loads the weights."""

    def __init__(self, store_root: str, dataset: str, label: str, config: AnyLabellerConfig, threads: int = 2) -> None:
        """Load the labeller.

        Args:
            threads: for decoding and encoding; the network has one of its own.
        """
        self._store = open_store(store_root)
        self._dataset = dataset
        self._format = label_format(label)
        self._labeller = make_labeller(label, config)
        self._threads = Threads(threads)
        self.shares: dict[str, float] = {}  # of the last shard's time: `network` is the network's own

    def run(self, job: ShardJob) -> Receipt:
        """Label one shard of one split.

        Raises:
            ValueError: images or weights are not those of the recipe, or an image is not a scene (scene labellers).
            MissingShardError: the tar of images is gone.
            TarError: the tar of images is damaged.
            NetworkError: the network is wrong.
        """
        images = ShardPlace(self._dataset, job.split, _IMAGES, job.shard)
        found = {_IMAGES: need(self._store, images, f"{self._dataset}/images").content}
        if found != job.recipe.inputs or self._labeller.weights_digest != job.recipe.weights:
            raise ValueError(
                f"{self._labeller.label} of {images.tar}: its images or the labeller's weights have changed since the work "
                "was planned; start the run again"
            )
        place = ShardPlace(self._dataset, job.split, self._format.folder, job.shard)
        start, effort = time.monotonic(), Effort()
        items = label_items(self._threads, self._members(images), self._labeller, self._format, effort)
        receipt = write_shard(self._store, place, job.recipe, items, job.run_id, ROW_EXTRA)
        self.shares = {"network": effort.network_s / max(time.monotonic() - start, 1e-9)}
        return receipt

    def close(self) -> None:
        """End the threads."""
        self._threads.close()

    def _members(self, images: ShardPlace) -> Iterator[tuple[SampleKey, bytes]]:
        try:
            yield from read_members(self._store, images)
        except FileNotFoundError as error:
            raise MissingShardError(
                f"{images.tar} is gone, though its receipt is there: delete {images.receipt} and materialize "
                f"{self._dataset}/images for its block again"
            ) from error


def label_items(
    threads: Threads,
    members: Iterator[tuple[SampleKey, bytes]],
    labeller: Labeller,
    form: LabelFormat,
    effort: Effort | None = None,
) -> Iterator[Item]:
    """One item an image, in order, labelled or rejected.

    Raises:
        NetworkError: the network is wrong; what was yielded before is of no use.
    """
    size = labeller.batch_size
    counts = {"tried": 0, "rejected": 0}
    decoded = ahead(threads.coders, _decode, members, num=size + threads.num)
    groups = gather(decoded, _bucket_of(labeller), size, _WINDOW_BATCHES * size, _pixels, _WINDOW_PIXELS)
    network = _Network(labeller, effort or Effort())
    answered = ahead(threads.network, network.answer, groups, num=_BATCHES_AHEAD)

    def encoding() -> Iterator[tuple[int, Future[Item]]]:
        for group, answers in answered:
            for place, (key, picture), answer in zip(group.places, group.items, answers, strict=True):
                counts["tried"] += isinstance(picture, Picture)
                counts["rejected"] += isinstance(picture, Picture) and isinstance(answer, Rejected)
                yield place, threads.coders.submit(_item, key, picture, answer, form)

    yield from in_order(encoding(), most_unread=2 * size + threads.num)
    if counts["tried"] == counts["rejected"] >= _ENOUGH:
        raise NetworkError(
            f"{labeller.label}: every one of {counts['tried']} images of a shard was rejected; the network is wrong, or was "
            "trained for other images"
        )


class _Network:
    """The labeller, as its thread calls it."""

    def __init__(self, labeller: Labeller, effort: Effort) -> None:
        self._attempts, self._effort = Attempts(labeller), effort

    def answer(self, group: Group[Member]) -> tuple[Group[Member], list[Answer]]:
        start = time.monotonic()
        pictures = [picture for _, picture in group.items if isinstance(picture, Picture)]
        answers = iter(self._attempts.label(pictures, group.bucket) if pictures else ())
        merged = [next(answers) if isinstance(picture, Picture) else picture for _, picture in group.items]
        self._effort.network_s += time.monotonic() - start
        return group, merged


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
    picture = member[1]
    return picture.rgb_HWC.shape[0] * picture.rgb_HWC.shape[1] if isinstance(picture, Picture) else 0


def _decode(member: tuple[SampleKey, bytes]) -> Member:
    key, data = member
    try:
        return key, decode_image(data)
    except ValueError as error:
        return key, Rejected(str(error), status="undecodable")


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
