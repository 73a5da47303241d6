"""Labels to tokens, shard by shard: the stage `tokens/*`. Torch is imported where a tokenizer is loaded.

Tokens wait in `_tokens/{modality}` until `align` brings all modalities to the same keys.
"""

import io
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fourmill.core.crops import centre_crop
from fourmill.core.digest import digest_json
from fourmill.core.labels import decode_boxes
from fourmill.core.modality import TEXTS
from fourmill.core.names import SampleKey, Split
from fourmill.core.sequences import CLASS_NAMES, TextTokenizer, detection_text
from fourmill.core.shards import Item, Receipt, Recipe, ShardPlace, need, read_members, read_rows, write_shard
from fourmill.core.store import Store, open_store
from fourmill.core.work import ShardJob
from fourmill.tokenize.align import token_folder
from fourmill.tokenize.config import TOKENS_VERSION
from fourmill.tokenize.samples import FOLDERS, Features, LabelError, crop_label
from fourmill.tokenize.train_set import image_sizes

if TYPE_CHECKING:
    from fourmill.tokenize.image_tokenizer import ImageTokenizer

ROW_EXTRA = pa.schema([("num_tokens", pa.int32())])  # of the sample, [EOS] included
_WINDOW = 64  # crops held at a time


def label_of(modality: str) -> str:
    """`depth` from `tok_depth@64`; `caption` and `det` are their own.

    Raises:
        ValueError: not a modality that is tokenized.
    """
    label = modality.removeprefix("tok_").partition("@")[0]
    if label not in (*FOLDERS, "clip", *TEXTS):
        raise ValueError(
            f"{modality!r} is not tokenized; known are tok_{{rgb,depth,normal,semseg,clip}}@PX, caption, det"
        )
    return label


def source_folder(label: str) -> str:
    """The folder whose shards a label's tokens are made from."""
    return "boxes" if label == "det" else FOLDERS.get(label, "images")


def token_recipe(
    store: Store,
    dataset: str,
    split: Split,
    shard: int,
    modality: str,
    tokenizer_digest: str,
    input_px: int,
    features_digest: str = "",
) -> Recipe:
    """All that a shard of tokens depends on.

    Args:
        tokenizer_digest: of the image tokenizer, or of the text tokenizer for caption and det.
        features_digest: of the CLIP weights, for clip.

    Raises:
        MissingShardError: the labels are not there.
    """
    label = label_of(modality)
    folder = source_folder(label)
    asset = f"{dataset}/images" if folder == "images" else f"labels/{label}"
    return Recipe(
        stage=f"tokens/{label}",
        code_version=TOKENS_VERSION,
        config=digest_json({"input_px": input_px, "features": features_digest}),
        weights=tokenizer_digest,
        inputs={folder: need(store, ShardPlace(dataset, split, folder, shard), asset).content},
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
    ) -> None:
        """A worker.

        Args:
            tokenizer_path: store folder of the tokenizer, `models/{name}/{digest}`.
            features: crops to CLIP features; for clip only.

        Raises:
            ValueError: no tokenizer there, or one of another label, or whose patches do not divide the crops.
        """
        self._store = open_store(store_root)
        self._dataset, self._modality, self._label = dataset, modality, label_of(modality)
        self._tokenizer_path, self._input_px, self._features = tokenizer_path, input_px, features
        self._text: TextTokenizer | None = None
        self._image: ImageTokenizer | None = None
        if (self._label == "clip") != (features is not None):
            raise ValueError(
                f"{modality} with{'out' if features is None else ''} features: clip needs them, others do not"
            )
        if self._label in TEXTS:
            self._text = TextTokenizer(self._store.read(f"{tokenizer_path}/tokenizer.json"))
        else:
            self._image = _load(self._store, tokenizer_path, self._label, input_px)

    def run(self, job: ShardJob) -> Receipt:
        """Tokenize one shard of one split; samples whose label is unfit are rejected with the reason.

        Raises:
            ValueError: the labels or the tokenizer are not those of the recipe.
        """
        source = ShardPlace(self._dataset, job.split, source_folder(self._label), job.shard)
        found = need(self._store, source, source.folder).content
        if {source.folder: found} != job.recipe.inputs or not self._tokenizer_path.endswith(job.recipe.weights):
            raise ValueError(
                f"{self._modality} of {source.tar}: its labels or the tokenizer have changed since the work was planned; "
                "start the run again"
            )
        place = ShardPlace(self._dataset, job.split, token_folder(self._modality), job.shard)
        return write_shard(self._store, place, job.recipe, self._items(source), job.run_id, ROW_EXTRA)

    def _items(self, source: ShardPlace) -> Iterator[Item]:
        if self._image is not None:
            return self._image_items(self._image, source)
        assert self._text is not None
        if self._label == "caption":
            return _caption_items(self._store, source, self._text)
        return _box_items(self._store, source, self._text)

    def _image_items(self, tokenizer: "ImageTokenizer", source: ShardPlace) -> Iterator[Item]:
        sizes = image_sizes(self._store, source)
        members = read_members(self._store, source)
        while window := list(islice(members, _WINDOW)):
            crops: dict[SampleKey, NDArray[Any]] = {}
            rejected: dict[SampleKey, Item] = {}
            for key, data in window:
                try:
                    crops[key] = crop_label(source_label(self._label), data, self._input_px, sizes[key])
                except LabelError as error:
                    rejected[key] = Item(key, "bad_label", str(error))
            tokens = dict(zip(crops, self._tokens(tokenizer, list(crops.values())), strict=True))
            for key, _ in window:
                yield rejected[key] if key in rejected else _token_item(key, tokens[key])

    def _tokens(self, tokenizer: "ImageTokenizer", crops: list[NDArray[Any]]) -> NDArray[np.int16]:
        if not crops:
            return np.zeros((0, 0), np.int16)
        batch = np.stack(crops)
        if self._features is not None:
            # Filled up: a sample's features must not depend on how many others are in the window.
            filler = np.repeat(batch[:1], _WINDOW - len(batch), axis=0)
            batch = self._features(np.concatenate([batch, filler]))[: len(crops)].astype(np.float16).astype(np.float32)
        return tokenizer.tokenize(batch)


def source_label(label: str) -> str:
    """What is decoded for a label: clip is made from the image."""
    return "rgb" if label == "clip" else label


def _load(store: Store, path: str, label: str, input_px: int) -> "ImageTokenizer":
    from fourmill.tokenize.conversions import grid_of
    from fourmill.tokenize.load import load_image_tokenizer

    tokenizer = load_image_tokenizer(store, path)
    if tokenizer.config.label != label:
        raise ValueError(f"{path} is a tokenizer of {tokenizer.config.label}, needed is one of {label}")
    grid_of(input_px, tokenizer.config)
    return tokenizer


def _token_item(key: SampleKey, tokens_L: NDArray[np.int16]) -> Item:
    sink = io.BytesIO()
    np.save(sink, tokens_L[None], allow_pickle=False)
    return Item(key, ext="npy", data=sink.getvalue(), extra={"num_tokens": tokens_L.size})


def _caption_items(store: Store, source: ShardPlace, text: TextTokenizer) -> Iterator[Item]:
    rows = read_rows(store, source).select(["key", "status", "caption"]).to_pylist()
    for row in (row for row in rows if row["status"] == "ok"):
        key, caption = SampleKey(row["key"]), row["caption"]
        if caption is None:
            yield Item(key, "no_caption", "the list has no caption for this image")
        else:
            yield Item(key, ext="txt", data=caption.encode(), extra={"num_tokens": len(text.encode(caption))})


def _box_items(store: Store, source: ShardPlace, text: TextTokenizer) -> Iterator[Item]:
    sizes = image_sizes(store, source)
    for key, data in read_members(store, source):
        try:
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
