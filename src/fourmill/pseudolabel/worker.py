"""The label stage: a shard of images in, a shard of one label out.

Images are decoded and labels encoded by threads while the network works on the window of images in between.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np

from fourmill.core.labels import Picture, decode_image
from fourmill.core.names import SampleKey, Split
from fourmill.core.shards import Item, Receipt, Recipe, ShardPlace, need, read_members, write_shard
from fourmill.core.store import Store, open_store
from fourmill.core.work import ShardJob
from fourmill.pseudolabel.config import VERSION, AnyLabellerConfig, config_digest, require_weights, weights_digest
from fourmill.pseudolabel.labeller import Label, Labeller, Rejected
from fourmill.pseudolabel.make import make_labeller
from fourmill.pseudolabel.members import ROW_EXTRA, LabelFormat, label_format

_IMAGES = "images"
_THREADS = 2  # decoding and encoding; Pillow lets go of the interpreter's lock
_BATCHES_AT_ONCE = 4  # handed to the labeller together, so that images of equal size meet

Member = tuple[SampleKey, Picture | Rejected]


class LabelShapeError(ValueError):
    """A label of another pixel size than its image."""


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
        code_version=VERSION,
        config=config_digest(config),
        weights=weights_digest(config),
        inputs={_IMAGES: images.content},
    )


class LabelWorker:
    """Labels shard after shard with one labeller. A `core.work.ShardWorker`; construction loads the weights."""

    def __init__(self, store_root: str, dataset: str, label: str, config: AnyLabellerConfig) -> None:
        self._store = open_store(store_root)
        self._dataset = dataset
        self._format = label_format(label)
        self._labeller = make_labeller(label, config)

    def run(self, job: ShardJob) -> Receipt:
        """Label one shard of one split.

        Raises:
            ValueError: images or weights are not those of the recipe, or an image is not a scene (scene labellers).
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
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="labels") as pool:
            items = label_items(pool, read_members(self._store, images), self._labeller, self._format)
            return write_shard(self._store, place, job.recipe, items, job.run_id, ROW_EXTRA)


def label_items(
    pool: ThreadPoolExecutor, members: Iterator[tuple[SampleKey, bytes]], labeller: Labeller, form: LabelFormat
) -> Iterator[Item]:
    """One item an image, in order, labelled or rejected. Three windows are under way: decoded, labelled, encoded."""
    size = labeller.batch_size * _BATCHES_AT_ONCE
    decoding = _start_decoding(pool, members, size)
    encoding: deque[Future[Item]] = deque()
    while decoding:
        window = [future.result() for future in decoding]
        decoding = _start_decoding(pool, members, size)
        labels = _label_window(labeller, window)
        while encoding:
            yield encoding.popleft().result()
        for (key, picture), label in zip(window, labels, strict=True):
            encoding.append(pool.submit(_item, key, picture, label, form))
    while encoding:
        yield encoding.popleft().result()


def _start_decoding(
    pool: ThreadPoolExecutor, members: Iterator[tuple[SampleKey, bytes]], size: int
) -> list[Future[Member]]:
    return [pool.submit(_decode, key, data) for key, data in islice(members, size)]


def _decode(key: SampleKey, data: bytes) -> Member:
    try:
        return key, decode_image(data)
    except ValueError as error:
        return key, Rejected(str(error), status="undecodable")


def _label_window(labeller: Labeller, window: Sequence[Member]) -> list[Label | Rejected]:
    labels = iter(labeller.label_pictures([picture for _, picture in window if isinstance(picture, Picture)]))
    return [next(labels) if isinstance(picture, Picture) else picture for _, picture in window]


def _item(key: SampleKey, picture: Picture | Rejected, label: Label | Rejected, form: LabelFormat) -> Item:
    height, width = (None, None) if isinstance(picture, Rejected) else picture.rgb_HWC.shape[:2]
    sides = {"width": width, "height": height}
    if isinstance(label, Rejected):
        return Item(key, label.status, label.reason, extra={**sides, "figures": None})
    if isinstance(label, np.ndarray) and label.shape[:2] != (height, width):
        raise LabelShapeError(
            f"{form.folder} of sample {key} has {label.shape[:2]} pixels (height, width), its image {(height, width)}; "
            "the labeller must bring labels to their image's size"
        )
    figures = sorted(form.figures(label).items())
    return Item(key, ext=form.ext, data=form.encode(label), extra={**sides, "figures": figures})
