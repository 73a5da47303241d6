import glob
import io
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from fourmill.core.labels import (
    Box,
    decode_depth,
    decode_image,
    decode_normal,
    decode_semseg,
    encode_boxes,
    encode_depth,
    encode_normal,
    encode_semseg,
)
from fourmill.core.names import SPLITS, Layout, SampleKey, Split, sample_key
from fourmill.core.shards import Item, Recipe, ShardPlace, read_members, write_shard
from fourmill.core.store import LocalStore, Store
from fourmill.core.work import Progress, ShardJob
from fourmill.tokenize.align import AlignWorker, align_recipe, token_folder
from fourmill.tokenize.config import ImageTokenizerConfig, TokenizingConfig, TrainSetConfig
from fourmill.tokenize.image_tokenizer import ImageTokenizer
from fourmill.tokenize.load import save_image_tokenizer
from fourmill.tokenize.presets import smallest_tokenizers
from fourmill.tokenize.spec import TokenizerSpec
from fourmill.tokenize.train_set import TrainSet, build_train_set
from fourmill.tokenize.worker import TokenWorker, token_recipe

DATASET = "tiny"
LAYOUT = Layout(rows_per_shard=12, shards_per_block=2, num_blocks=2)
SIDES = (80, 72)  # width, height of the images
FEATURE_DIM = 12
LABEL_ROWS = pa.schema([("width", pa.int32()), ("height", pa.int32())])
IMAGE_ROWS = pa.schema([("caption", pa.string()), *LABEL_ROWS])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are no faster on two threads, and far slower when another program wants the second core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def features(crops_BSSC: np.ndarray) -> np.ndarray:
    """A stand-in for CLIP: means and corners of 8-pixel patches, mixed into 12 channels."""
    patches = crops_BSSC.reshape(len(crops_BSSC), 8, 8, 8, 8, 3).astype(np.float32) / 255
    found = np.concatenate(
        [patches.mean((2, 4)), patches[:, :, 0, :, 0], patches.std((2, 4)), patches[:, :, 7, :, 7]], -1
    )
    return found.astype(np.float32)


def sample(key: int, size: tuple[int, int] = SIDES) -> dict[str, np.ndarray]:
    """An image of two colours and labels that follow from it."""
    rng = np.random.default_rng(key)
    width, height = size
    inside = np.zeros((height, width), bool)
    top, left = rng.integers(10, 40, 2)
    inside[top : top + 25, left : left + 25] = True
    rgb = np.where(inside[..., None], rng.integers(0, 256, 3), rng.integers(0, 256, 3)).astype(np.uint8)
    depth = np.where(inside, 0.3, np.linspace(0.5, 1, height)[:, None]).astype(np.float32)
    normal = np.where(inside[..., None], np.array([1, 0, 0]), np.array([0, 0, 1])).astype(np.float32)
    return {"rgb": rgb, "depth": depth, "normal": normal, "semseg": np.where(inside, 39, 122).astype(np.uint8)}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Images and labels of two blocks, 24 rows each, a fifth of them held out."""
    store = LocalStore(tmp_path / "store")
    for shard in range(4):
        for split in SPLITS:
            keys = [sample_key(r) for r in LAYOUT.rows_of(shard) if (r % 5 == 0) == (split == "val")]
            _write(store, split, shard, keys)
    return store


@pytest.fixture
def put_images(store: Store) -> Callable[[int, list[tuple[int, int]]], None]:
    """Give a shard of the training split images of these sizes (width, height) instead, in turns, with labels of the same."""

    def put(shard: int, sizes: list[tuple[int, int]]) -> None:
        keys = [sample_key(r) for r in LAYOUT.rows_of(shard) if r % 5]
        _write(store, "train", shard, keys, sizes)

    return put


def _write(
    store: Store, split: Split, shard: int, keys: list[SampleKey], sizes: Sequence[tuple[int, int]] = (SIDES,)
) -> None:
    size_of = {key: sizes[i % len(sizes)] for i, key in enumerate(keys)}
    samples = {key: sample(int(key), size_of[key]) for key in keys}

    def png(rgb: np.ndarray) -> bytes:
        sink = io.BytesIO()
        Image.fromarray(rgb).save(sink, "PNG")
        return sink.getvalue()

    boxes = encode_boxes([Box(0.2, 0.2, 0.6, 0.7, 0.9, "bottle")])
    members = {
        "images": {k: ("png", png(s["rgb"])) for k, s in samples.items()},
        "depth": {k: ("png", encode_depth(s["depth"])) for k, s in samples.items()},
        "normal": {k: ("png", encode_normal(s["normal"])) for k, s in samples.items()},
        "semseg": {k: ("png", encode_semseg(s["semseg"])) for k, s in samples.items()},
        "boxes": {k: ("json", boxes) for k in keys},
    }
    for folder, found in members.items():
        schema = IMAGE_ROWS if folder == "images" else LABEL_ROWS
        caption = {"caption": "a bottle on the floor"} if folder == "images" else {}
        items = [
            Item(k, ext=ext, data=data, extra={"width": size_of[k][0], "height": size_of[k][1], **caption})
            for k, (ext, data) in found.items()
        ]
        write_shard(
            store, ShardPlace(DATASET, split, folder, shard), Recipe(stage=folder, code_version="1"), items, "r", schema
        )


@pytest.fixture
def train_set(store: Store) -> TrainSet:
    config = TrainSetConfig(num_samples=30, num_eval=6, blocks=("block_00", "block_01"))
    return build_train_set(store, DATASET, LAYOUT, config, 64, features)


@dataclass(frozen=True)
class Tiny:
    """What tests need to know of the store besides its content."""

    dataset: str
    layout: Layout
    label_schema: pa.Schema
    features: Callable[[np.ndarray], np.ndarray]
    train_set: TrainSet


@pytest.fixture
def tiny(train_set: TrainSet) -> Tiny:
    return Tiny(DATASET, LAYOUT, LABEL_ROWS, features, train_set)


@dataclass(frozen=True)
class Chain:
    """From the labels of the tiny data set to tokens and aligned shards, by untrained tokenizers."""

    store: Store
    tiny: Tiny

    def tokenizer(self, label: str, seed: int = 0) -> tuple[str, str]:
        """Folder and digest of a tiny tokenizer with weights of its own."""
        values = smallest_tokenizers(FEATURE_DIM)[label].model_dump()
        values["encoder"] |= {"kind": "vit", "width": 32, "depth": 1, "heads": 2}
        values["quantizer"] |= {"codebook_size": 64}
        if values["decoder"]["kind"] == "vit":
            values["decoder"] |= {"width": 32, "depth": 1, "heads": 2}
        torch.manual_seed(seed)
        model = ImageTokenizer(ImageTokenizerConfig.model_validate(values)).eval()
        digest, folder = save_image_tokenizer(self.store, f"tokenizer_{label}", model, "card")
        return folder, digest

    def job(self, modality: str, digest: str, config: TokenizingConfig, shard: int, split: Split) -> ShardJob:
        px = int(modality.partition("@")[2])
        made_of = (self.store, self.tiny.dataset, split, shard, modality, digest, px, "", config)
        return ShardJob(split, shard, token_recipe(*made_of), "run")

    def tokens_of(self, modality: str, shard: int, split: Split = "train") -> dict[str, np.ndarray]:
        place = ShardPlace(self.tiny.dataset, split, token_folder(modality), shard)
        return {key: np.load(io.BytesIO(data), allow_pickle=False) for key, data in read_members(self.store, place)}

    def tokenized(self, config: TokenizingConfig, labels: dict[str, tuple[str, str]], shard: int) -> None:
        for label, (path, digest) in labels.items():
            modality = f"tok_{label}@64"
            worker = TokenWorker(self.store.root, self.tiny.dataset, modality, path, 64, config=config)
            worker.run_together([self.job(modality, digest, config, shard, split) for split in SPLITS])
            worker.close()

    def aligned(self, config: TokenizingConfig, labels: dict[str, tuple[str, str]], shard: int) -> None:
        self.tokenized(config, labels, shard)
        modalities = [f"tok_{label}@64" for label in labels]
        for split in SPLITS:
            recipe = align_recipe(self.store, self.tiny.dataset, split, shard, modalities, 64, config.crops)
            worker = AlignWorker(self.store.root, self.tiny.dataset, modalities, 64, config.crops)
            worker.run(ShardJob(split, shard, recipe, "run"))

    def decode(self, label: str, data: bytes) -> np.ndarray:
        """A stored image or label."""
        decoders = {"depth": decode_depth, "normal": decode_normal, "semseg": decode_semseg}
        return decode_image(data).rgb_HWC if label == "rgb" else decoders[label](data)


@pytest.fixture
def chain(store: Store, tiny: Tiny) -> Chain:
    return Chain(store, tiny)


@pytest.fixture
def spec(store: Store, train_set: TrainSet, tmp_path: Path) -> Callable[..., TokenizerSpec]:
    """The smallest training of a label: `spec("depth", steps=4)`."""

    def make(label: str, folder: str = "run", **training: Any) -> TokenizerSpec:
        config = smallest_tokenizers(FEATURE_DIM)[label]
        training = {"learning_rate": 1.6e-3} | training  # the demo's own makes its first steps jump
        return TokenizerSpec(
            store=store.root,
            name=f"tok_{label}",
            config=config.model_copy(update={"training": config.training.model_copy(update=training)}),
            train_set=train_set.path,
            train_set_digest=train_set.digest,
            run_folder=str(tmp_path / folder),
            threads=1,
        )

    return make


@pytest.fixture
def kill_at() -> Callable[[str, int], Progress]:
    """Progress that sends SIGKILL to the programs that this process runs, when a checkpoint of that step or a later one is
    there: `kill_at("runs/*/checkpoint.pt", 4)`.
    """

    def make(pattern: str, step: int) -> Progress:
        def progress(done: int, total: int, note: str) -> None:
            running = multiprocessing.active_children()
            while any(program.is_alive() for program in running) and _step_of(pattern) < step:
                pass
            for program in running:
                program.kill()

        return progress

    return make


def _step_of(pattern: str) -> int:
    steps = [torch.load(path, map_location="cpu", weights_only=True)["step"] for path in glob.glob(pattern)]
    return max(steps, default=0)


@pytest.fixture
def read_report(store: Store) -> Callable[[str], dict[str, Any]]:
    return lambda path: json.loads(store.read(path))
