"""The frozen subset that image tokenizers are trained on: squares of images and labels, packed into one file.

Where crops are drawn from them they are whole images, squeezed, beside each image's own height and width; else centre squares. Only
the configured blocks are read, so blocks that come later do not change it.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from fourmill.core.crops import CropRow, centre_crop, random_crop
from fourmill.core.digest import digest_file
from fourmill.core.labels import pack_depth, pack_normal, unpack_depth, unpack_normal
from fourmill.core.modality import IMAGES
from fourmill.core.names import Layout, SampleKey, Split
from fourmill.core.once import checked_once
from fourmill.core.shards import ShardPlace, need, needed_members
from fourmill.core.store import Store
from fourmill.core.work import Progress, no_progress
from fourmill.tokenize.config import ImageLabel, TrainSetConfig
from fourmill.tokenize.freshness import check_fresh, image_sizes
from fourmill.tokenize.packed import PackWriter, local_file, map_arrays
from fourmill.tokenize.samples import FOLDERS, Features, LabelError, crop_label_at
from fourmill.tokenize.squeezed import crop_squeezed, whole_image

_log = logging.getLogger(__name__)

_FEATURES_BATCH = 64
_PACKED_AT_ONCE = 64
_CROPPED_AT_ONCE = 256

T = TypeVar("T")
_Place = Callable[[int, int], CropRow]  # of the packed square, by the image's width and height


class TrainSetError(ValueError):
    """A training set that cannot be made or read, said with the next step."""


@dataclass(frozen=True)
class TrainSet:
    """A packed training set in the store."""

    digest: str  # of its bytes
    path: str
    num_train: int
    num_eval: int


def build_train_set(
    store: Store,
    dataset: str,
    layout: Layout,
    config: TrainSetConfig,
    input_px: int,
    features: Features | None = None,
    features_at: Callable[[int], Features] | None = None,
    scratch: Path | None = None,
    labels: str = "labels",
    progress: Progress = no_progress,
) -> TrainSet:
    """Pack the first samples of the blocks that have every label; publish under the digest of the content.

    Args:
        input_px: side of the held-out samples' centre squares, and of the others' where the config has no `side_px`.
        features: makes the CLIP features; without it the set has none and no clip tokenizer can be trained on it.
        features_at: makes them of crops of a side in pixels, where the config names CLIP's sides; `features` by default.
        scratch: local folder that arrays grow in; the system's temporary one by default.
        labels: the assets that make the labels lie under it, which errors name: `labels`, or `imagenet/labels`.
        progress: is told of samples packed and of crops that CLIP has seen.

    Raises:
        MissingShardError: a shard of the blocks is not labelled yet.
        StaleLabelsError: the labels of a shard are of other images than there are now.
        TrainSetError: not one sample in a split has every label.
    """
    counts: dict[str, int] = {}
    wanted_of: dict[Split, int] = {"train": config.num_samples, "val": config.num_eval}
    told = _Told(progress, config, input_px, with_features=features is not None)
    with PackWriter(scratch) as writer:
        for split, wanted in wanted_of.items():
            part = "train" if split == "train" else "eval"
            squeezed_px = config.side_px if split == "train" else None
            place, side_px = (whole_image, squeezed_px) if squeezed_px else (centre_crop, input_px)
            samples = _samples(store, dataset, layout, config.blocks, split, place, side_px, labels)
            counts[part] = _append(writer, part, islice(samples, wanted), told, with_sizes=squeezed_px is not None)
            if not counts[part]:
                raise TrainSetError(
                    f"no {split} sample of {dataset} in {', '.join(config.blocks)} has an image and all of "
                    f"{', '.join(FOLDERS)}: look at the ledgers of these blocks, or add blocks to the train_set config; "
                    "all rows of a short list may be in one split (source.val_fraction)"
                )
            if features is not None and split == "train":
                _append_crop_features(writer, features_at or (lambda _: features), config, input_px, told)
            elif features is not None:
                _append_features(writer, part, features, iter(writer.rows(f"{part}/rgb")), told)
            _log.info("train set: %d of %d %s samples", counts[part], wanted, split)
        digest, path = writer.publish(store, f"{dataset}/train_sets")
    told.end()
    return TrainSet(digest, path, counts["train"], counts["eval"])


class _Told:
    """Progress over all that is packed, in samples and crops; what is not found counts as done at the end."""

    def __init__(self, progress: Progress, config: TrainSetConfig, input_px: int, with_features: bool) -> None:
        samples = config.num_samples + config.num_eval
        crops = config.num_samples * config.clip_crops * len(config.clip_sides(input_px)) + config.num_eval
        self._progress, self._done = progress, 0
        self._total = samples + (crops if with_features else 0) + 1  # and one: published

    def add(self, num: int, note: str) -> None:
        """So many more are done."""
        self._done += num
        self._progress(self._done, self._total, note)

    def end(self) -> None:
        """All is published."""
        self._progress(self._total, self._total, "published")


@dataclass(frozen=True)
class LabelArrays:
    """One label of a training set as it is packed, which `unpack` turns into what tokenizers take, and the eval samples' classes.

    N maps of H x W pixels: RGB uint8 (N, H, W, 3), depth uint16 (N, H, W), normals uint8 (N, H, W, 3), classes uint8 (N, H, W), CLIP
    features float16 (N, H, W, C).
    """

    train: NDArray[Any]
    eval: NDArray[Any]
    eval_semseg: NDArray[np.uint8]
    num_samples: int  # of the training split; CLIP features have several crops of each
    at_side: Mapping[int, NDArray[Any]] = field(default_factory=dict)  # CLIP features of images of each side in pixels
    squeezed_from: NDArray[np.int64] | None = None  # (N, 2) height, width of images packed whole; None: centre squares

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Height and width in pixels, (N, 2), of what the training split's squares were squeezed from: their own where they are
        centre squares.
        """
        return _own_sizes(self.train) if self.squeezed_from is None else self.squeezed_from


def read_label(store: Store, path: str, digest: str, label: ImageLabel) -> LabelArrays:
    """One label of a packed set, read from the file as batches are taken; packed until `unpack`.

    From a remote store the file is copied to this machine once, and one process of it compares the file with its digest, once.

    Raises:
        TrainSetError: no such file, another digest, or a label that it does not hold.
    """
    try:
        file = local_file(store, path)
    except FileNotFoundError:
        raise TrainSetError(f"no training set at {path}: materialize tokenizers/train_set first") from None
    with checked_once(file, digest) as is_checked:
        if not is_checked and (found := _digest_of(file, *_stamp(file))) != digest:
            raise TrainSetError(
                f"{file} has digest {found[:12]}, expected {digest[:12]}: delete it and materialize tokenizers/train_set again"
            )
    try:
        arrays = map_arrays(file)
    except SafetensorError as error:
        raise TrainSetError(f"{path} is not a packed training set: {error}") from error
    prefix = f"train/{label}_"
    at_side = {int(name.removeprefix(prefix)): array for name, array in arrays.items() if name.startswith(prefix)}
    train = at_side[min(at_side)] if at_side else arrays.get(f"train/{label}")
    if train is None:
        raise TrainSetError(f"{path} holds {', '.join(sorted(arrays))}, no {label}: build it with a features callable")
    squeezed_from = None if label == "clip" else arrays.get("train/size")
    num_samples = len(arrays["train/rgb"])
    return LabelArrays(train, arrays[f"eval/{label}"], arrays["eval/semseg"], num_samples, at_side, squeezed_from)


def _stamp(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=16)  # where no mark can be kept, a process that reads several labels of a set hashes it once
def _digest_of(file: Path, size: int, modified_ns: int) -> str:
    return digest_file(file)


def spread(packed: NDArray[Any], most: int = 4096) -> NDArray[Any]:
    """At most so many rows of a packed array, evenly spread: for what needs no more of them, such as mean maps."""
    return packed[:: -(-len(packed) // most)]


def centre_squares(labels: LabelArrays, label: ImageLabel, side_px: int, most: int = 4096) -> Iterator[NDArray[Any]]:
    """Centre squares of at most so many images of the training split, evenly spread, unpacked, some at a time. Not of CLIP features,
    which cannot be cropped.
    """
    images = zip(spread(labels.train, most), spread(labels.sizes, most).tolist(), strict=True)
    for some in _parts(images, _CROPPED_AT_ONCE):
        yield np.stack(
            [
                crop_squeezed(label, unpack(square, label), centre_crop(width, height), width, height, side_px)
                for square, (height, width) in some
            ]
        )


def _own_sizes(squares: NDArray[Any]) -> NDArray[np.int64]:
    return np.broadcast_to(np.array(squares.shape[1:3], np.int64), (len(squares), 2))


def unpack(packed: NDArray[Any], label: str) -> NDArray[Any]:
    """A packed batch as tokenizers take it: 16-bit depth, 8-bit normals and half features become float32."""
    if label == "depth":
        return unpack_depth(packed)
    if label == "normal":
        return unpack_normal(packed)
    return packed.astype(np.float32) if label == "clip" else packed


@dataclass(frozen=True)
class _Sample:
    key: SampleKey
    size: tuple[int, int]  # width, height of its image
    squares: dict[str, NDArray[Any]]  # by label


def _samples(
    store: Store,
    dataset: str,
    layout: Layout,
    blocks: tuple[str, ...],
    split: Split,
    place: _Place,
    side_px: int,
    labels: str,
) -> Iterator[_Sample]:
    """Squares of every sample that has all labels, in key order, decoded only as far as somebody asks."""
    for shard in sorted(shard for block in blocks for shard in layout.shards_of(block)):
        images = ShardPlace(dataset, split, IMAGES, shard)
        members = _members(store, images, labels)
        sizes = image_sizes(store, images)
        for key in sorted(set.intersection(*(set(found) for found in members.values()))):
            size = sizes[key]
            try:
                squares = {
                    label: crop_label_at(label, found[key], side_px, size, [place(*size)])[0]
                    for label, found in members.items()
                }
            except LabelError as error:  # one bad label: tokenizing rejects it too, by its own reason
                _log.warning("train set: %s left out: %s", key, error)
            else:
                yield _Sample(key, size, squares)


def _members(store: Store, images: ShardPlace, labels: str) -> dict[str, dict[SampleKey, bytes]]:
    """Members of a shard's images and of its labels, which must be of these images, by label."""
    asset = f"{images.dataset}/images"
    made = need(store, images, asset)
    members: dict[str, dict[SampleKey, bytes]] = {}
    for label, folder in FOLDERS.items():
        place, maker = replace(images, folder=folder), asset if folder == IMAGES else f"{labels}/{label}"
        check_fresh(place, maker, need(store, place, maker), made)
        members[label] = dict(needed_members(store, place, maker))
    return members


def _append(writer: PackWriter, part: str, samples: Iterator[_Sample], told: _Told, with_sizes: bool) -> int:
    """Pack samples; how many there were."""
    count = 0
    for some in _parts(samples, _PACKED_AT_ONCE):
        for name, array in _pack(some).items():
            writer.append(f"{part}/{name}", array)
        if with_sizes:
            writer.append(f"{part}/size", np.array([sample.size[::-1] for sample in some], np.int64))
        count += len(some)
        told.add(len(some), f"{part} samples packed")
    return count


def _pack(found: list[_Sample]) -> dict[str, NDArray[Any]]:
    depth = np.stack([sample.squares["depth"] for sample in found])
    normal = np.stack([sample.squares["normal"] for sample in found])
    return {
        "rgb": np.stack([sample.squares["rgb"] for sample in found]),
        "depth": pack_depth(depth),
        "normal": pack_normal(normal),
        "semseg": np.stack([sample.squares["semseg"] for sample in found]),
        "keys": np.array([int(sample.key) for sample in found], np.int64),
    }


def _append_crop_features(
    writer: PackWriter, features_at: Callable[[int], Features], config: TrainSetConfig, input_px: int, told: _Told
) -> None:
    """Features of every sample's centre square, then of every sample's second crop, and so on; of further crops at further sides."""
    rgb, keys, sides = writer.rows("train/rgb"), writer.rows("train/keys"), config.clip_sides(input_px)
    sizes = writer.rows("train/size") if config.side_px else _own_sizes(rgb)
    for i, px in enumerate(sides):
        features = features_at(px)
        for number in range(i * config.clip_crops, (i + 1) * config.clip_crops):
            crops = (
                crop_squeezed("rgb", square, _clip_crop(int(key), number, width, height, config), width, height, px)
                for square, key, (height, width) in zip(rgb, keys, sizes.tolist(), strict=True)
            )
            _append_features(writer, "train", features, crops, told, f"_{px}" if len(sides) > 1 else "")


def _clip_crop(key: int, number: int, width: int, height: int, config: TrainSetConfig) -> CropRow:
    """The image's centre square, or a drawn crop of which half are mirrored: CLIP's features of a mirrored image are not its
    features of the image, mirrored.
    """
    if number == 0:
        return centre_crop(width, height)
    draw = np.random.default_rng([key, number])
    place = random_crop(draw, width, height, config.clip_crop_scale)[:4]
    return (*place, int(draw.random() < 0.5))


def _append_features(
    writer: PackWriter, part: str, features: Features, crops: Iterator[NDArray[np.uint8]], told: _Told, at: str = ""
) -> None:
    """Features of all crops, the last batch filled up so that a sample's do not depend on how many there are."""
    for some in _parts(crops, _FEATURES_BATCH):
        filled = np.stack(some + some[:1] * (_FEATURES_BATCH - len(some)))
        writer.append(f"{part}/clip{at}", features(filled)[: len(some)].astype(np.float16))
        told.add(len(some), f"crops of {part} samples through CLIP")


def _parts(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while part := list(islice(items, size)):
        yield part
