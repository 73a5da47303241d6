"""Labels to tokens, shard by shard: the stage `tokens/*`. Torch is imported where a tokenizer is loaded.

Reading the next shard, decoding and cropping are in some threads, the network in another, handing out in one, hashing and writing in
the caller's: the network waits for no disk. Batches go on across the borders of shards that are made together.

Crop settings are written before the first token of a shard (`crop_settings`), and all modalities crop by them. Tokens wait in
`_tokens/{modality}` until `align` brings all modalities to the same keys.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fourmill.core.crops import CropRow, centre_crop
from fourmill.core.digest import digest_json
from fourmill.core.flow import Threads, ahead, drawn
from fourmill.core.labels import decode_boxes
from fourmill.core.modality import CROPS, IMAGE_TOKENS, IMAGES, LABEL_FOLDERS, TEXTS
from fourmill.core.names import SampleKey, Split
from fourmill.core.sequences import CLASS_NAMES, TextTokenizer, detection_text
from fourmill.core.shards import (
    Item,
    Receipt,
    Recipe,
    ShardPlace,
    finished,
    need,
    needed_members,
    read_rows,
    write_shard,
)
from fourmill.core.store import Store, open_store
from fourmill.core.work import ShardJob
from fourmill.tokenize.align import token_folder
from fourmill.tokenize.config import TOKENS_VERSION, TokenizingConfig
from fourmill.tokenize.crop_settings import Settings, crop_settings
from fourmill.tokenize.freshness import check_fresh, fresh_sizes
from fourmill.tokenize.released import TEXT_FILE
from fourmill.tokenize.samples import Features, LabelError, crop_label_at

if TYPE_CHECKING:
    from fourmill.tokenize.image_tokenizer import ImageTokenizer

ROW_EXTRA = pa.schema([("num_tokens", pa.int32())])  # of the sample, [EOS] included
_WINDOW = {"cpu": 64, "cuda": 128}  # crops that go to the network at a time
_ITEMS_AHEAD = 1024  # samples' tokens that may wait while a shard is written: half a megabyte a crop
_GROUPS_AHEAD = 3  # of them handed to the network's thread: one is worked on, the next begins without anybody's help

_OLD = "of an image that is not there any more, or is of another size now: the labels are older than the images"

T = TypeVar("T")


def label_of(modality: str) -> str:
    """`depth` from `tok_depth@64`; `caption` and `det` are their own.

    Raises:
        ValueError: not a modality that is tokenized.
    """
    label = modality.removeprefix("tok_").partition("@")[0]
    if label not in (*IMAGE_TOKENS, *TEXTS):
        raise ValueError(
            f"{modality!r} is not tokenized; known are tok_{{rgb,depth,normal,semseg,clip}}@PX, caption, det"
        )
    return label


def source_folder(label: str) -> str:
    """The folder whose shards a label's tokens are made from."""
    return LABEL_FOLDERS.get(label, IMAGES)


def asset_of(dataset: str, label: str) -> str:
    """The asset that makes what a label's tokens are made from."""
    return f"{dataset}/images" if source_folder(label) == IMAGES else f"labels/{label}"


def token_recipe(
    store: Store,
    dataset: str,
    split: Split,
    shard: int,
    modality: str,
    tokenizer_digest: str,
    input_px: int,
    features_digest: str = "",
    config: TokenizingConfig | None = None,
) -> Recipe:
    """All that a shard of tokens depends on.

    Args:
        tokenizer_digest: of the image tokenizer, or of the text tokenizer for caption and det.
        features_digest: of the CLIP weights, for clip.
        config: crops and precision; None: the centre crop, in float32. Texts depend on neither.

    Raises:
        MissingShardError: the labels are not there.
    """
    label = label_of(modality)
    config = config or TokenizingConfig()
    folder = source_folder(label)
    settings = {"input_px": input_px, "features": features_digest, **({} if label in TEXTS else config.recipe)}
    asset = asset_of(dataset, label)
    return Recipe(
        stage=f"tokens/{label}",
        code_version=TOKENS_VERSION,
        config=digest_json(settings),
        weights=tokenizer_digest,
        inputs={
            folder: need(store, ShardPlace(dataset, split, folder, shard), asset).content,
            **_crops_input(config, label),
        },
    )


class TokenWorker:
    """Tokenizes shard after shard of one modality. A `core.work.ShardWorker`; construction loads the tokenizer."""

    def __init__(
        self,
        store_root: str,
        dataset: str,
        modality: str,
        tokenizer_path: str,
        input_px: int,
        features: Features | None = None,
        config: TokenizingConfig | None = None,
        threads: int = 2,
    ) -> None:
        """A worker.

        Args:
            tokenizer_path: store folder of the tokenizer, `models/{name}/{digest}`.
            features: crops to CLIP features; for clip only.
            config: crops and precision; None: the centre crop, in float32.
            threads: for decoding and cropping; the network has its own, writing is the caller's.

        Raises:
            ValueError: no tokenizer there, or one of another label, or whose patches do not divide the crops.
        """
        self._store = open_store(store_root)
        self._dataset, self._modality, self._label = dataset, modality, label_of(modality)
        self._tokenizer_path, self._input_px, self._features = tokenizer_path, input_px, features
        self._config = config or TokenizingConfig()
        self._text: TextTokenizer | None = None
        self._image: ImageTokenizer | None = None
        if (self._label == "clip") != (features is not None):
            raise ValueError(
                f"{modality} with{'out' if features is None else ''} features: clip needs them, others do not"
            )
        if self._label in TEXTS:
            self._text = TextTokenizer(self._store.read(f"{tokenizer_path}/{TEXT_FILE}"))
        else:
            self._image = _load(self._store, tokenizer_path, self._label, input_px)
            self._window = _WINDOW[self._image.device.type]
        self._threads = Threads(threads, self._image.streams if self._image is not None else 1)

    def run(self, job: ShardJob) -> Receipt:
        """Tokenize one shard of one split; samples whose label is unfit are rejected with the reason.

        Raises:
            ValueError: the labels or the tokenizer are not those of the recipe.
            StaleLabelsError: the labels are of other images than there are now.
            MissingShardError: the labels' tar is gone, or the images are.
            TarError: the labels' tar is damaged.
        """
        return self.run_together([job])[0]

    def run_together(self, jobs: Sequence[ShardJob]) -> list[Receipt]:
        """`run` of several shards: batches of the network go on from one to the next. Shards that are there are left."""
        receipts: dict[int, Receipt] = {}
        for i, job in enumerate(jobs):
            done = finished(self._store, self._place(job), job.recipe) if len(jobs) > 1 else None
            if done is not None:
                receipts[i] = done
        todo = [i for i in range(len(jobs)) if i not in receipts]
        sources = [self._source(jobs[i]) for i in todo]
        with drawn(self._items(sources), _ITEMS_AHEAD) as found:
            parts = InParts(found)
            for part, i in enumerate(todo):
                items = parts.take(part)
                job = jobs[i]
                receipts[i] = write_shard(self._store, self._place(job), job.recipe, items, job.run_id, ROW_EXTRA)
        return [receipts[i] for i in range(len(jobs))]

    def close(self) -> None:
        """End the threads."""
        self._threads.close()

    def _place(self, job: ShardJob) -> ShardPlace:
        return ShardPlace(self._dataset, job.split, token_folder(self._modality), job.shard)

    def _source(self, job: ShardJob) -> ShardPlace:
        source = ShardPlace(self._dataset, job.split, source_folder(self._label), job.shard)
        asset, images = asset_of(self._dataset, self._label), replace(source, folder=IMAGES)
        labels = need(self._store, source, asset)
        check_fresh(source, asset, labels, need(self._store, images, f"{self._dataset}/images"))
        found = {
            source.folder: labels.content,
            **_crops_input(self._config, self._label),
        }
        if found != job.recipe.inputs or not self._tokenizer_path.endswith(job.recipe.weights):
            raise ValueError(
                f"{self._modality} of {source.tar}: its labels or the tokenizer have changed since the work was planned; "
                "start the run again"
            )
        return source

    def _items(self, sources: Sequence[ShardPlace]) -> Iterator[tuple[int, Item]]:
        """Items of all shards, each with the number of its shard, in order."""
        if self._image is None:
            texts = _caption_items if self._label == "caption" else _box_items
            assert self._text is not None
            return ((i, item) for i, source in enumerate(sources) for item in texts(self._store, source, self._text))
        settings = [crop_settings(self._store, source, self._config.crops) for source in sources]  # before any token
        asset = asset_of(self._dataset, self._label)
        tars = ahead(self._threads.coders, lambda one: list(needed_members(self._store, one, asset)), sources, 2)
        members = self._members(sources, settings, tars)
        ahead_of_network = ahead(self._threads.coders, self._crop, members, 2 * self._window + self._threads.num)
        groups = _groups(ahead_of_network, max(1, self._window // self._config.crops.num))
        return (
            found for group in ahead(self._threads.network, self._tokenized, groups, _GROUPS_AHEAD) for found in group
        )

    def _members(
        self,
        sources: Sequence[ShardPlace],
        settings: Sequence[Settings],
        tars: Iterable[list[tuple[SampleKey, bytes]]],
    ) -> Iterator["_Member"]:
        for i, (source, rows_of, members) in enumerate(zip(sources, settings, tars, strict=True)):
            sizes = fresh_sizes(self._store, source)
            for key, data in members:
                yield _Member(i, key, data, (sizes[key], rows_of[key]) if key in sizes else None)

    def _crop(self, member: "_Member") -> "_Cropped":
        try:
            if member.crops is None:
                raise LabelError(f"{self._label} {_OLD}")
            crops = crop_label_at(source_label(self._label), member.data, self._input_px, *member.crops)
            if self._image is not None and self._features is None:
                self._image.check(crops)
        except LabelError as error:
            return _Cropped(member.part, Item(member.key, "bad_label", str(error)), None)
        return _Cropped(member.part, Item(member.key), crops)

    def _tokenized(self, group: "list[_Cropped]") -> list[tuple[int, Item]]:
        crops = [one.crops for one in group if one.crops is not None]
        tokens = self._tokens(np.concatenate(crops)) if crops else np.zeros((0, 0), np.int16)
        of_each = iter(np.split(tokens, len(crops)) if crops else [])
        return [
            (one.part, one.item if one.crops is None else _token_item(one.item.key, next(of_each))) for one in group
        ]

    def _tokens(self, crops: NDArray[Any]) -> NDArray[np.int16]:
        assert self._image is not None
        if self._features is None:
            return self._image.tokenize(crops, self._config.precision)
        image, features, size, precision = self._image, self._features, self._window, self._config.precision
        parts = [
            image.tokenize_features(features, _filled(part, size), precision)[: len(part)]
            for part in _parts(crops, size)
        ]
        return np.concatenate(parts)


@dataclass(frozen=True)
class _Member:
    """One sample's label on its way to be cropped."""

    part: int  # which of the shards
    key: SampleKey
    data: bytes
    # Image's width and height, rows; None: it is not there now in that size.
    crops: tuple[tuple[int, int], list[CropRow]] | None


@dataclass(frozen=True)
class _Cropped:
    """One sample on its way to the network, or rejected."""

    part: int
    item: Item
    crops: NDArray[Any] | None


class InParts(Generic[T]):
    """A stream of (number of the part, thing), the parts one after the other, taken part by part."""

    def __init__(self, stream: Iterator[tuple[int, T]]) -> None:
        self._stream = stream
        self._next: tuple[int, T] | None = None
        self._is_begun = False

    def take(self, part: int) -> Iterator[T]:
        """What belongs to a part, which may be nothing; parts are taken in their order, each to its end."""
        if not self._is_begun:
            self._is_begun, self._next = True, next(self._stream, None)
        while self._next is not None and self._next[0] == part:
            found = self._next[1]
            self._next = next(self._stream, None)
            yield found


def source_label(label: str) -> str:
    """What is decoded for a label: clip is made from the image."""
    return "rgb" if label == "clip" else label


def _crops_input(config: TokenizingConfig, label: str) -> dict[str, str]:
    """Crop settings as an input of a shard's recipe, where they are more than the centre crop; texts have none."""
    digest = config.crops.digest
    return {CROPS: digest} if digest and label not in TEXTS else {}


def _groups(samples: Iterable[_Cropped], size: int) -> Iterator[list[_Cropped]]:
    """As many samples as make a batch, with the rejected ones between them in their places."""
    group: list[_Cropped] = []
    num = 0
    for sample in samples:
        group.append(sample)
        num += sample.crops is not None
        if num == size:
            yield group
            group, num = [], 0
    if group:
        yield group


def _parts(array: NDArray[Any], size: int) -> Iterator[NDArray[Any]]:
    for start in range(0, len(array), size):
        yield array[start : start + size]


def _filled(crops: NDArray[np.uint8], num: int) -> NDArray[np.uint8]:
    """Crops filled up to a number: a sample's features must not depend on how many others there are."""
    return np.concatenate([crops, np.repeat(crops[:1], num - len(crops), axis=0)])


def _load(store: Store, path: str, label: str, input_px: int) -> "ImageTokenizer":
    import torch

    from fourmill.tokenize.conversions import grid_of
    from fourmill.tokenize.load import load_image_tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_image_tokenizer(store, path, device, with_decoder=False)
    if tokenizer.config.label != label:
        raise ValueError(f"{path} is a tokenizer of {tokenizer.config.label}, needed is one of {label}")
    grid_of(input_px, tokenizer.config)
    return tokenizer


def _token_item(key: SampleKey, tokens_CL: NDArray[np.int16]) -> Item:
    sink = io.BytesIO()
    np.save(sink, tokens_CL, allow_pickle=False)
    return Item(key, ext="npy", data=sink.getvalue(), extra={"num_tokens": tokens_CL.shape[1]})


def _caption_items(store: Store, source: ShardPlace, text: TextTokenizer) -> Iterator[Item]:
    rows = read_rows(store, source).select(["key", "status", "caption"]).to_pylist()
    for row in (row for row in rows if row["status"] == "ok"):
        key, caption = SampleKey(row["key"]), row["caption"]
        if caption is None:
            yield Item(key, "no_caption", "the list has no caption for this image")
        else:
            yield Item(key, ext="txt", data=caption.encode(), extra={"num_tokens": len(text.encode(caption))})


def _box_items(store: Store, source: ShardPlace, text: TextTokenizer) -> Iterator[Item]:
    sizes = fresh_sizes(store, source)
    for key, data in needed_members(store, source, asset_of(source.dataset, "det")):
        try:
            if key not in sizes:
                raise LabelError(f"boxes {_OLD}")
            boxes = decode_boxes(data)
            unknown = sorted({box.class_name for box in boxes} - set(CLASS_NAMES))
            if unknown:
                raise LabelError(f"boxes of {', '.join(unknown)}: not among the 80 COCO things")
        except ValueError as error:
            yield Item(key, "bad_label", str(error))
            continue
        width, height = sizes[key]
        ids = text.encode(detection_text(boxes, width, height, centre_crop(width, height)))
        yield Item(key, ext="json", data=data, extra={"num_tokens": len(ids)})
