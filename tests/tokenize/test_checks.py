"""Damaged tars in a block are problems that its checks tell, with what to do about them."""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fourmill.core.modality import Modality, modality_table
from fourmill.core.names import SPLITS, Layout, sample_key
from fourmill.core.shards import Item, MissingShardError, Recipe, ShardPlace, need, read_members, write_shard
from fourmill.core.store import LocalStore
from fourmill.core.tar import TarError
from fourmill.core.work import ShardJob
from fourmill.tokenize.align import AlignWorker, align_recipe, token_folder
from fourmill.tokenize.checks import aligned_problems, token_problems
from fourmill.tokenize.config import TokenizingConfig

PLAIN = TokenizingConfig()
PUBLIC = ["rgb", "tok_rgb@64", "tok_semseg@64", "crop_settings"]
RGB = modality_table(64, 8, {"rgb": 512}, 4400)["tok_rgb@64"]
LAYOUT = Layout(rows_per_shard=4, shards_per_block=1, num_blocks=1)


def damage(store: LocalStore, path: str, linked: bool = False) -> None:
    """Turn a bit of a file; of all its names, or of this one alone."""
    file = store.path(path)
    data = bytearray(file.read_bytes())
    data[600] ^= 1
    if not linked:
        file.unlink()
    file.write_bytes(data)


@pytest.fixture
def labels(chain: Any) -> dict[str, tuple[str, str]]:
    """Both shards of the first block, aligned; the tokenizers that they are made by."""
    labels = {label: chain.tokenizer(label) for label in ("rgb", "semseg")}
    for shard in (0, 1):
        chain.aligned(PLAIN, labels, shard)
    return labels


@pytest.mark.parametrize("folder", PUBLIC)
def test_an_aligned_tar_that_is_damaged_or_gone_is_a_problem(
    store: LocalStore, tiny: Any, labels: object, folder: str
) -> None:
    block = (store, tiny.dataset, tiny.layout, "block_00", PUBLIC, 64)
    assert aligned_problems(*block) == []
    damaged, gone = (ShardPlace(tiny.dataset, split, folder, 1) for split in SPLITS)
    damage(store, damaged.tar)
    store.delete(gone.tar)
    assert aligned_problems(*block) == [
        f"{damaged.tar} does not have the digest its receipt names; delete its receipt and rebuild the block",
        f"{gone.tar} is gone, though its receipt is there: materialize the block again",
    ]


@pytest.mark.parametrize(("folder", "source", "asset"), [
    ("rgb", "images", "tiny/images"),
    ("tok_rgb@64", "_tokens/tok_rgb@64", "tokens/rgb"),
])  # fmt: skip
def test_a_damaged_tar_that_is_linked_names_what_comes_first(
    store: LocalStore, tiny: Any, labels: object, folder: str, source: str, asset: str
) -> None:
    public, made_of = (ShardPlace(tiny.dataset, "train", name, 1) for name in (folder, source))
    damage(store, public.tar, linked=True)
    (problem,) = aligned_problems(store, tiny.dataset, tiny.layout, "block_00", PUBLIC, 64)
    assert problem.startswith(public.tar) and f"It is made of {asset}, which comes first: {made_of.tar} does" in problem


def reject_first(store: LocalStore, place: ShardPlace) -> None:
    """A shard in which the first sample was rejected."""
    receipt, ((first, _), *others) = need(store, place, "tokens"), read_members(store, place)
    items = [Item(first, "bad_label", "unfit"), *(Item(key, ext="npy", data=data) for key, data in others)]
    write_shard(store, place, receipt.recipe, items, receipt.run_id)


@pytest.mark.parametrize("is_copied", [False, True], ids=["linked", "copied sample by sample"])
@pytest.mark.parametrize(("source", "asset"), [("images", "tiny/images"), ("_tokens/tok_rgb@64", "tokens/rgb")])
def test_a_source_that_is_damaged_or_gone_stops_the_aligning_and_says_what_to_make(
    store: LocalStore, tiny: Any, labels: object, source: str, asset: str, is_copied: bool
) -> None:
    modalities = ["tok_rgb@64", "tok_semseg@64"]
    worker = AlignWorker(store.root, tiny.dataset, modalities, 64)
    place = ShardPlace(tiny.dataset, "train", source, 1)
    if is_copied:
        reject_first(store, replace(place, folder=token_folder("tok_semseg@64")))
    job = ShardJob("train", 1, align_recipe(store, tiny.dataset, "train", 1, modalities, 64), "run")
    again = f"materialize {asset} for its block again"
    if is_copied:
        damage(store, place.tar)
        with pytest.raises(TarError, match=f"does not have the digest .*: delete {place.receipt} and {again}"):
            worker.run(job)
    store.delete(place.tar)
    with pytest.raises(MissingShardError, match=f"is gone, though its receipt is there: {again}"):
        worker.run(job)


def put(store: LocalStore, modality: Modality, data: bytes) -> ShardPlace:
    """The same tokens for all samples of the block."""
    for split in SPLITS:
        keys = [sample_key(row) for row in LAYOUT.rows_of(0) if (row % 2 == 0) == (split == "val")]
        place = ShardPlace("tiny", split, token_folder(modality.name), 0)
        write_shard(
            store, place, Recipe(stage="x", code_version="1"), [Item(k, ext="npy", data=data) for k in keys], "r"
        )
    return ShardPlace("tiny", "train", token_folder(modality.name), 0)


def npy(array: np.ndarray) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()


@pytest.mark.parametrize("data", [b"", b"not an array"])
def test_tokens_that_are_no_array_are_a_problem(tmp_path: Any, data: bytes) -> None:
    store = LocalStore(tmp_path)
    put(store, RGB, data)
    problems = token_problems(store, "tiny", LAYOUT, "block_00", RGB)
    assert len(problems) == 4 and all("not a readable array" in p and "expected int16 (1, 64)" in p for p in problems)


def test_a_tar_of_tokens_that_is_damaged_or_gone_is_a_problem(tmp_path: Any) -> None:
    store = LocalStore(tmp_path)
    place = put(store, RGB, npy(np.zeros((1, 64), np.int16)))
    assert token_problems(store, "tiny", LAYOUT, "block_00", RGB) == []
    damage(store, place.tar)
    (problem,) = token_problems(store, "tiny", LAYOUT, "block_00", RGB)
    assert problem.endswith("delete its receipt and rebuild the block")
    store.delete(place.tar)
    (problem,) = token_problems(store, "tiny", LAYOUT, "block_00", RGB)
    assert problem == f"{place.tar} is gone, though its receipt is there: materialize the block again"


@pytest.mark.parametrize(("token", "is_one"), [(-1, False), (0, True), (511, True), (512, False)])
def test_ids_of_no_codeword_are_a_problem(tmp_path: Any, token: int, is_one: bool) -> None:
    store, tokens = LocalStore(tmp_path), np.zeros((1, 64), np.int16)
    tokens[0, 7] = token
    put(store, RGB, npy(tokens))
    problems = token_problems(store, "tiny", LAYOUT, "block_00", RGB)
    assert len(problems) == (0 if is_one else 4) and all("expected 0..511" in problem for problem in problems)


def test_an_aligned_tar_of_other_samples_is_a_problem(store: LocalStore, tiny: Any, labels: object) -> None:
    place = ShardPlace(tiny.dataset, "train", "tok_semseg@64", 1)
    assert aligned_problems(store, tiny.dataset, tiny.layout, "block_00", PUBLIC, 64) == []
    (first, data), *others = read_members(store, place)
    items = [Item(key, ext="npy", data=data) for key, data in [(sample_key(int(first) - 1), data), *others]]
    write_shard(store, place, need(store, place, "tokens/shards").recipe, items, "run")
    (problem,) = aligned_problems(store, tiny.dataset, tiny.layout, "block_00", PUBLIC, 64)
    assert "tok_semseg@64 has" in problem and "or in another order" in problem
