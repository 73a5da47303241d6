"""The frozen subset that image tokenizers are trained on: crops of images and labels, packed into one file.

Only the configured blocks are read, so blocks that come later do not change it. safetensors, so nothing in it runs.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fourmill.core.crops import CropRow, crop_rgb, random_crop
from fourmill.core.digest import digest_bytes
from fourmill.core.names import Layout, SampleKey, Split
from fourmill.core.shards import ShardPlace, need, read_members, read_rows
from fourmill.core.store import Store
from fourmill.tokenize.config import ImageLabel, TrainSetConfig
from fourmill.tokenize.samples import FOLDERS, Features, LabelError, crop_label

_log = logging.getLogger(__name__)

_FEATURES_BATCH = 64


_Sample = tuple[SampleKey, dict[str, NDArray[Any]]]


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
    train_features: Features | None = None,
) -> TrainSet:
    """Pack the first samples of the blocks that have every label; publish under the digest of the content.

    Args:
        input_px: side of the held-out samples, and of the others where the config has none.
        features: makes the CLIP features; without it the set has none and no clip tokenizer can be trained on it.
        train_features: makes those of the training split, where CLIP sees its crops at another side; `features` by default.

    Raises:
        MissingShardError: a shard of the blocks is not labelled yet.
        TrainSetError: not one sample in a split has every label.
    """
    arrays: dict[str, NDArray[Any]] = {}
    counts: dict[str, int] = {}
    wanted_of: dict[Split, int] = {"train": config.num_samples, "val": config.num_eval}
    for split, wanted in wanted_of.items():
        part = "train" if split == "train" else "eval"
        side_px = config.side_px or input_px if split == "train" else input_px
        found = _take(_samples(store, dataset, layout, config.blocks, split, side_px), wanted)
        if not found:
            raise TrainSetError(
                f"no {split} sample of {dataset} in {', '.join(config.blocks)} has an image and all of "
                f"{', '.join(FOLDERS)}: look at the ledgers of these blocks, or add blocks to the train_set config"
            )
        packed = _pack(found)
        if features is not None and split == "train":
            packed["clip"] = _crop_features(train_features or features, packed, config, input_px)
        elif features is not None:
            packed["clip"] = _features(features, packed["rgb"])
        arrays |= {f"{part}/{name}": array for name, array in packed.items()}
        counts[part] = len(found)
        _log.info("train set: %d of %d %s samples", len(found), wanted, split)
    data = save(dict(sorted(arrays.items())))
    digest = digest_bytes(data)
    path = f"{dataset}/train_sets/{digest}.safetensors"
    if not store.exists(path):
        store.write(path, data)
    return TrainSet(digest, path, counts["train"], counts["eval"])


@dataclass(frozen=True)
class LabelArrays:
    """One label of a training set, as tokenizers take it, and the eval samples' classes."""

    train: NDArray[Any]
    eval: NDArray[Any]
    eval_semseg: NDArray[np.uint8]


def read_label(store: Store, path: str, digest: str, label: ImageLabel) -> LabelArrays:
    """Read one label from a packed set; everything stays packed until a batch is unpacked with `unpack`.

    Raises:
        TrainSetError: no such file, another digest, or a label that it does not hold.
    """
    try:
        data = store.read(path)
    except FileNotFoundError:
        raise TrainSetError(f"no training set at {path}: materialize tokenizers/train_set first") from None
    if (found := digest_bytes(data)) != digest:
        raise TrainSetError(
            f"{path} has digest {found[:12]}, expected {digest[:12]}: materialize tokenizers/train_set again"
        )
    try:
        arrays = load(data)
    except SafetensorError as error:
        raise TrainSetError(f"{path} is not a packed training set: {error}") from error
    if f"train/{label}" not in arrays:
        raise TrainSetError(f"{path} holds {', '.join(sorted(arrays))}, no {label}: build it with a features callable")
    return LabelArrays(arrays[f"train/{label}"], arrays[f"eval/{label}"], arrays["eval/semseg"])


def unpack(packed: NDArray[Any], label: str) -> NDArray[Any]:
    """A packed batch as tokenizers take it: 16-bit depth, 8-bit normals and half features become float32."""
    if label == "depth":
        return packed.astype(np.float32) / np.float32(65535)
    if label == "normal":
        return packed.astype(np.float32) / np.float32(127.5) - np.float32(1)
    return packed.astype(np.float32) if label == "clip" else packed


def _samples(
    store: Store, dataset: str, layout: Layout, blocks: tuple[str, ...], split: Split, input_px: int
) -> Iterator[_Sample]:
    """Crops of every sample that has all labels, in key order, decoded only as far as somebody asks."""
    for shard in sorted(shard for block in blocks for shard in layout.shards_of(block)):
        members: dict[str, dict[SampleKey, bytes]] = {}
        for label, folder in FOLDERS.items():
            place = ShardPlace(dataset, split, folder, shard)
            need(store, place, f"{dataset}/images" if label == "rgb" else f"labels/{label}")
            members[label] = dict(read_members(store, place))
        sizes = image_sizes(store, ShardPlace(dataset, split, FOLDERS["rgb"], shard))
        for key in sorted(set.intersection(*(set(found) for found in members.values()))):
            try:
                yield (
                    key,
                    {label: crop_label(label, found[key], input_px, sizes[key]) for label, found in members.items()},
                )
            except LabelError as error:  # one bad label: tokenizing rejects it too, by its own reason
                _log.warning("train set: %s left out: %s", key, error)


def image_sizes(store: Store, place: ShardPlace) -> dict[SampleKey, tuple[int, int]]:
    """(width, height) of the images of a shard that are ok, from its rows, which say so for labels too."""
    rows = read_rows(store, place).select(["key", "status", "width", "height"]).to_pylist()
    return {SampleKey(row["key"]): (row["width"], row["height"]) for row in rows if row["status"] == "ok"}


def _take(samples: Iterator[_Sample], wanted: int) -> list[_Sample]:
    return [sample for _, sample in zip(range(wanted), samples, strict=False)]


def _pack(found: list[_Sample]) -> dict[str, NDArray[Any]]:
    depth = np.stack([crops["depth"] for _, crops in found])
    normal = np.stack([crops["normal"] for _, crops in found])
    return {
        "rgb": np.stack([crops["rgb"] for _, crops in found]),
        "depth": np.rint(depth * 65535).astype(np.uint16),
        "normal": np.rint((normal + 1) * 127.5).astype(np.uint8),
        "semseg": np.stack([crops["semseg"] for _, crops in found]),
        "keys": np.array([int(key) for key, _ in found], np.int64),
    }


def _crop_features(
    features: Features, packed: dict[str, NDArray[Any]], config: TrainSetConfig, input_px: int
) -> NDArray[np.float16]:
    """Features of every sample's whole square, then of every sample's second crop, and so on."""
    px, parts = config.clip_px or input_px, []
    for number in range(config.clip_crops):
        rows = [_clip_crop(int(key), number, packed["rgb"].shape[1], config) for key in packed["keys"]]
        crops = [crop_rgb(rgb, row, px) for rgb, row in zip(packed["rgb"], rows, strict=True)]
        parts.append(_features(features, np.stack(crops)))
    return np.concatenate(parts)


def _clip_crop(key: int, number: int, side_px: int, config: TrainSetConfig) -> CropRow:
    if number == 0:
        return 0, 0, side_px, side_px, 0
    return random_crop(np.random.default_rng([key, number]), side_px, side_px, config.clip_crop_scale)


def _features(features: Features, rgb_BHWC: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Features of all crops, the last batch filled up so that a sample's do not depend on how many there are."""
    parts: list[NDArray[np.float16]] = []
    for start in range(0, len(rgb_BHWC), _FEATURES_BATCH):
        part = rgb_BHWC[start : start + _FEATURES_BATCH]
        filler = np.repeat(part[:1], _FEATURES_BATCH - len(part), axis=0)
        parts.append(features(np.concatenate([part, filler]))[: len(part)].astype(np.float16))
    return np.concatenate(parts)
