"""A manifest's samples in memory: read once from the aligned tars, every tar checked against the digest it was listed with.

A step's batch is a function of (seed, step): which samples by the epoch's shuffle, which tokens by a generator a row.
"""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fourmill.core.crops import CropRow, crop_rgb
from fourmill.core.digest import digest_bytes
from fourmill.core.labels import decode_boxes, decode_image
from fourmill.core.manifest import Manifest, ShardEntry, read_manifest
from fourmill.core.modality import CROPS, Modality
from fourmill.core.names import SampleKey, Split
from fourmill.core.order import batch_indices
from fourmill.core.sequences import TextTokenizer, detection_text
from fourmill.core.shards import ShardPlace
from fourmill.core.store import Store
from fourmill.core.tar import read_tar
from fourmill.train.assemble import Sample, assemble
from fourmill.train.batch import Batch, cut_patches
from fourmill.train.masking import Mixture


class DataError(ValueError):
    """Samples that are not what the manifest says: which tar or sample, found, expected, next move."""


@dataclass(frozen=True)
class SampleSet:
    """S samples of one split, packed. Cropped by the first row of their crop settings."""

    keys: list[SampleKey]
    pixels: dict[str, NDArray[np.uint8]]  # (S, L, K) patches
    tokens: dict[str, NDArray[np.int16]]  # (S, L)
    texts: dict[str, list[NDArray[np.int32]]]  # ids, [EOS] last

    def __len__(self) -> int:
        return len(self.keys)

    def sample(self, i: int) -> Sample:
        """One sample."""
        return Sample(
            {name: values[i] for name, values in self.tokens.items()},
            {name: values[i] for name, values in self.texts.items()},
            {name: values[i] for name, values in self.pixels.items()},
        )


def checked_manifest(store: Store, path: str) -> Manifest:
    """The manifest at a path that carries its digest.

    Raises:
        DataError: it is missing, no manifest, or not the one its name says.
    """
    try:
        manifest = read_manifest(store, path)
    except FileNotFoundError:
        raise DataError(f"no manifest at {path}: materialize tokens/manifest first") from None
    except ValueError as error:
        raise DataError(f"{path} is not a manifest ({error}); materialize tokens/manifest again") from error
    expected = path.rsplit("/", 1)[-1].removesuffix(".json")
    if manifest.digest != expected:
        raise DataError(
            f"{path} has digest {manifest.digest}, not the one in its name; materialize tokens/manifest again"
        )
    return manifest


def read_samples(
    store: Store,
    manifest: Manifest,
    split: Split,
    limit: int | None = None,
    modalities: Sequence[Modality] | None = None,
) -> SampleSet:
    """Read a split into memory.

    Args:
        limit: only the first samples by key.
        modalities: those that take part, the others' tars are not read; all of the manifest by default.

    Raises:
        DataError: a tar or a sample is not what the manifest says.
    """
    rows: list[dict] = []
    chosen = sorted(manifest.at("both") if modalities is None else modalities, key=lambda m: m.name)
    for entry in manifest.splits.get(split, []):
        if limit is not None and len(rows) >= limit:
            break
        rows += _shard(store, manifest, split, entry, chosen)
    rows = rows[:limit]
    kinds = {m.name: m.kind for m in chosen}
    texts = TextTokenizer(store.read(manifest.text_tokenizer)) if "text" in kinds.values() else None

    def column(name: str) -> list:
        return [row[name] for row in rows]

    return SampleSet(
        keys=column("key"),
        pixels={
            name: cut_patches(np.stack(column(name)), manifest.patch_px)
            for name, kind in kinds.items()
            if kind == "pixels" and rows
        },
        tokens={name: np.stack(column(name)) for name, kind in kinds.items() if kind == "tokens" and rows},
        texts={
            name: [np.array(ids, np.int32) for ids in texts.encode_batch(column(name))]
            for name, kind in kinds.items()
            if kind == "text" and texts is not None
        },
    )


class Loader:
    """Batches of a sample set by step. Cheap to ask again: nothing is consumed."""

    def __init__(
        self,
        samples: SampleSet,
        mixture: Mixture,
        batch_size: int,
        seed: int,
        patch_px: int,
        rows: Sequence[int] | None = None,
    ) -> None:
        """A loader.

        Args:
            rows: those of every batch that are made here, where several processes share it; all by default.
        """
        if not len(samples):
            raise DataError("the manifest's training split is empty; there is nothing to train on")
        self.samples, self.mixture, self.batch_size, self.seed = samples, mixture, batch_size, seed
        self._rows = range(batch_size) if rows is None else rows
        self._patch_bytes = patch_px * patch_px * 3

    def indices(self, step: int) -> list[int]:
        """Samples of a step; a batch may span two epochs."""
        return batch_indices(len(self.samples), self.batch_size, self.seed, step).tolist()

    def batch(self, step: int) -> Batch:
        """The batch of a step: this loader's rows of it, the same however many share it."""
        indices = self.indices(step)
        return self.masked([indices[row] for row in self._rows], step, self._rows)

    def masked(self, indices: Sequence[int], step: int, rows: Sequence[int]) -> Batch:
        """Given samples with the masks that a step's rows draw."""
        rngs = [np.random.default_rng([self.seed, step, row]) for row in rows]
        return assemble([self.samples.sample(i) for i in indices], self.mixture, rngs, self._patch_bytes)


def _shard(
    store: Store, manifest: Manifest, split: Split, entry: ShardEntry, modalities: Sequence[Modality]
) -> list[dict]:
    folders = {CROPS, *(m.folder for m in modalities)}
    if any(m.kind == "text" and m.ext == "json" for m in modalities):
        folders.add("rgb")  # boxes are cropped by their image's size
    members = {folder: _members(store, manifest, split, folder, entry) for folder in folders}
    return [
        _sample(key, {folder: found[key] for folder, found in members.items()}, modalities, manifest)
        for key in sorted(members[CROPS])
    ]


def _members(store: Store, manifest: Manifest, split: Split, folder: str, entry: ShardEntry) -> dict[SampleKey, bytes]:
    place = ShardPlace(manifest.dataset, split, folder, entry.shard)
    try:
        data = store.read(place.tar)
    except FileNotFoundError:
        raise DataError(
            f"{place.tar} is missing: materialize tokens/shards for its block and the manifest again"
        ) from None
    expected, found = entry.tars.get(folder), digest_bytes(data)
    if found != expected:
        raise DataError(
            f"{place.tar} has digest {found[:12]}, the manifest names {str(expected)[:12]}: the tar was changed or replaced; "
            "materialize tokens/shards for its block and the manifest again"
        )
    members = {key: member for key, _, member in read_tar(io.BytesIO(data), place.tar)}
    if len(members) != entry.count:
        raise DataError(
            f"{place.tar} holds {len(members)} samples, the manifest says {entry.count}; build the manifest again"
        )
    return members


def _sample(key: SampleKey, members: dict[str, bytes], modalities: Iterable[Modality], manifest: Manifest) -> dict:
    try:
        image = decode_image(members["rgb"]).rgb_HWC if "rgb" in members else np.zeros((0, 0, 3), np.uint8)
        crop: CropRow = tuple(int(v) for v in _npy(members[CROPS])[0])  # type: ignore[assignment]
        found: dict = {"key": key}
        for m in modalities:
            if m.kind == "pixels":
                found[m.name] = crop_rgb(image, crop, m.grid * manifest.patch_px)
            elif m.kind == "tokens":
                found[m.name] = _tokens(members[m.folder], m)
            elif m.ext == "json":
                height, width = image.shape[:2]
                found[m.name] = detection_text(decode_boxes(members[m.folder]), width, height, crop)
            else:
                found[m.name] = members[m.folder].decode()
        return found
    except (ValueError, KeyError, IndexError) as error:
        raise DataError(f"sample {key}: {error}; materialize tokens/shards for its block again") from error


def _tokens(data: bytes, modality: Modality) -> NDArray[np.int16]:
    tokens = _npy(data)[0]
    vocab = modality.vocab_size or 0
    if tokens.shape != (modality.max_tokens,) or tokens.min() < 0 or tokens.max() >= vocab:
        raise ValueError(
            f"{modality.name} has tokens of shape {tokens.shape} with ids {tokens.min()}..{tokens.max()}, expected "
            f"{modality.max_tokens} ids below {vocab}"
        )
    return tokens.astype(np.int16)


def _npy(data: bytes) -> NDArray:
    return np.load(io.BytesIO(data), allow_pickle=False)
