"""A tiny aligned training set in a store: 32 pixel images, 4 x 4 tokens, two train shards and one of validation."""

import io
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from fourmill.core.labels import Box, encode_boxes
from fourmill.core.manifest import Manifest, ModalityEntry, ShardEntry, write_manifest
from fourmill.core.modality import Modality, modality_table
from fourmill.core.names import Split, sample_key
from fourmill.core.sequences import special_tokens
from fourmill.core.shards import Item, Recipe, ShardPlace, write_shard
from fourmill.core.store import LocalStore
from fourmill.train.config import PretrainConfig, TrainSpec, fourm_demo

WORDS = ["a", "red", "blue", "ball", "jar", "on", "grey", "ground"]
VOCAB = 4284 + len(WORDS)
PX, PATCH, CODES = 32, 8, 12


@pytest.fixture(autouse=True)
def one_thread() -> Iterable[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def table() -> dict[str, Modality]:
    return modality_table(PX, PATCH, {"depth": CODES, "semseg": CODES}, VOCAB)


@pytest.fixture(scope="session")
def text_file() -> bytes:
    vocab = {word: i for i, word in enumerate([*special_tokens(), *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special_tokens())
    return tokenizer.to_str().encode()


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory, table: dict[str, Modality], text_file: bytes) -> tuple[Path, str]:
    """Root of a filled store, and the manifest's path in it."""
    root = tmp_path_factory.mktemp("filled")
    store = LocalStore(root)
    store.write("models/text/tokenizer.json", text_file)
    entries: dict[Split, list[ShardEntry]] = {
        "train": [_shard(store, table, "train", shard, range(shard * 10, shard * 10 + 9)) for shard in (0, 1)],
        "val": [_shard(store, table, "val", 0, range(9, 10))],
    }
    manifest = Manifest(
        dataset="cc12m",
        input_px=PX,
        patch_px=PATCH,
        source_digest="0" * 64,
        modalities={
            m.name: ModalityEntry(
                kind=m.kind, folder=m.folder, ext=m.ext, grid=m.grid, vocab_size=m.vocab_size, tokenizer=None
            )
            for m in table.values()
        },
        text_tokenizer="models/text/tokenizer.json",
        splits=entries,
        rows=20,
        missing={},
    )
    return root, write_manifest(store, manifest)


@pytest.fixture
def store(filled: tuple[Path, str], tmp_path: Path) -> tuple[LocalStore, str]:
    """A copy of the filled store that a test may change, and the manifest's path."""
    source, copy = LocalStore(filled[0]), LocalStore(tmp_path / "store")
    for path in source.list(""):
        copy.write(path, source.read(path))
    return copy, filled[1]


@pytest.fixture
def config() -> PretrainConfig:
    """The demo's recipe, as small as it gets."""
    demo = fourm_demo(6)
    model = demo.model.model_copy(update={"dim": 16, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2})
    masking = demo.masking.model_copy(update={"num_input_tokens": (12, 16), "num_target_tokens": (20, 24)})
    return demo.model_copy(update={"model": model, "masking": masking, "batch_size": 4, "checkpoint_every": 2})


@pytest.fixture
def make_spec(store: tuple[LocalStore, str], config: PretrainConfig, tmp_path: Path) -> Callable[..., TrainSpec]:
    def make(run: str = "run", **changes: object) -> TrainSpec:
        return TrainSpec.model_validate(
            {
                "store": store[0].root,
                "manifest": store[1],
                "name": "fourm",
                "config": config,
                "run_folder": str(tmp_path / run),
                "threads": 1,
                **changes,
            }
        )

    return make


def _shard(store: LocalStore, table: dict[str, Modality], split: Split, shard: int, rows: range) -> ShardEntry:
    tars = {}
    for folder, ext in {("crop_settings", "npy"), *((m.folder, m.ext) for m in table.values())}:
        place = ShardPlace("cc12m", split, folder, shard)
        items = [Item(sample_key(row), ext=ext, data=_member(folder, row)) for row in rows]
        receipt = write_shard(store, place, Recipe(stage=folder, code_version="1"), items, "test")
        assert receipt.tar_sha256 is not None
        tars[folder] = receipt.tar_sha256
    return ShardEntry(shard=shard, count=len(rows), tars=dict(sorted(tars.items())))


def _member(folder: str, row: int) -> bytes:
    rng = np.random.default_rng(row)
    if folder == "rgb":
        image = Image.fromarray(np.full((PX, PX + 8, 3), row * 12, np.uint8))
        sink = io.BytesIO()
        image.save(sink, "JPEG", quality=95)
        return sink.getvalue()
    if folder == "caption":
        return " ".join(rng.choice(WORDS, 3 + row % 4)).encode()
    if folder == "det":
        return encode_boxes([Box(0.2, 0.1, 0.6, 0.9, 0.9, "bottle")] * (row % 3))
    if folder == "crop_settings":
        return _npy(np.array([[0, 4, PX, PX, 0]], np.int64))
    return _npy(rng.integers(0, CODES, (1, 16)).astype(np.int16))


def _npy(array: np.ndarray) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()
