"""Shards made together, batches over their borders, and labels that are wrong or gone."""

import io
import threading
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.layers.attention import Attention
from torch.nn.modules.module import register_module_forward_hook

from fourmill.core.crops import CropConfig
from fourmill.core.labels import encode_semseg
from fourmill.core.names import SPLITS, SampleKey
from fourmill.core.shards import (
    Item,
    MissingShardError,
    Recipe,
    ShardPlace,
    read_receipt,
    read_rows,
    write_shard,
)
from fourmill.core.store import Store
from fourmill.core.work import GroupWorker
from fourmill.tokenize import worker as token_worker
from fourmill.tokenize.align import token_folder
from fourmill.tokenize.config import TokenizingConfig
from fourmill.tokenize.image_tokenizer import ImageTokenizer
from fourmill.tokenize.worker import InParts, TokenWorker, token_recipe

CROPS = TokenizingConfig(crops=CropConfig(num=3, seed=4))
PLAIN = TokenizingConfig()
DEADLINE_S = 180


def test_the_defaults_leave_recipes_as_they_were(store: Store, tiny: Any) -> None:
    plain = token_recipe(store, tiny.dataset, "train", 0, "tok_rgb@64", "0", 64)
    assert plain == token_recipe(store, tiny.dataset, "train", 0, "tok_rgb@64", "0", 64, "", PLAIN)
    together = TokenizingConfig(shards_together=1)
    assert plain == token_recipe(store, tiny.dataset, "train", 0, "tok_rgb@64", "0", 64, "", together)
    others = [CROPS, TokenizingConfig(precision="bf16"), TokenizingConfig(crops=CropConfig(num=3, seed=5))]
    found = [token_recipe(store, tiny.dataset, "train", 0, "tok_rgb@64", "0", 64, "", other) for other in others]
    assert len({recipe.digest for recipe in [plain, *found]}) == 4
    text = token_recipe(store, tiny.dataset, "train", 0, "caption", "0", 64)
    assert all(text == token_recipe(store, tiny.dataset, "train", 0, "caption", "0", 64, "", c) for c in others)


@pytest.mark.parametrize("config", [PLAIN, CROPS])
def test_shards_made_together_have_the_bytes_of_those_made_alone(
    store: Store, tiny: Any, chain: Any, config: TokenizingConfig
) -> None:
    path, digest = chain.tokenizer("depth")
    jobs = [chain.job("tok_depth@64", digest, config, shard, split) for shard in range(4) for split in SPLITS]
    worker = TokenWorker(store.root, tiny.dataset, "tok_depth@64", path, 64, config=config)
    assert isinstance(worker, GroupWorker)
    alone = [worker.run(one) for one in jobs]
    for one in jobs:
        store.delete(ShardPlace(tiny.dataset, one.split, token_folder("tok_depth@64"), one.shard).receipt)
    worker.run(jobs[3])  # is there already and is left
    together = worker.run_together(jobs)
    worker.close()
    assert [r.content for r in together] == [r.content for r in alone]
    assert sum(r.num_ok for r in together) == 48


def test_batches_go_on_from_one_shard_to_the_next(
    store: Store, tiny: Any, chain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, digest = chain.tokenizer("rgb")
    seen: list[tuple[int, str]] = []
    real = ImageTokenizer.tokenize

    def counted(self: ImageTokenizer, batch: np.ndarray, precision: Any = "fp32") -> np.ndarray:
        seen.append((len(batch), threading.current_thread().name))
        return real(self, batch, precision)

    monkeypatch.setattr(ImageTokenizer, "tokenize", counted)
    worker = TokenWorker(store.root, tiny.dataset, "tok_rgb@64", path, 64)
    worker.run_together([chain.job("tok_rgb@64", digest, PLAIN, s, split) for s in range(4) for split in SPLITS])
    worker.close()
    assert [num for num, _ in seen] == [48]  # of eight shards and splits
    assert threading.current_thread().name not in {name for _, name in seen}  # which writes meanwhile


def test_the_network_goes_on_to_the_last_shard_while_the_first_is_written(
    store: Store, tiny: Any, chain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, digest = chain.tokenizer("rgb")
    num_seen, all_seen = [0], threading.Event()
    tokenize, write = ImageTokenizer.tokenize, token_worker.write_shard

    def counted(self: ImageTokenizer, batch: np.ndarray, precision: Any = "fp32") -> np.ndarray:
        num_seen[0] += len(batch)
        if num_seen[0] == 48:
            all_seen.set()
        return tokenize(self, batch, precision)

    def slow(*arguments: Any) -> Any:
        assert all_seen.wait(DEADLINE_S)
        return write(*arguments)

    monkeypatch.setitem(token_worker._WINDOW, "cpu", 4)
    monkeypatch.setattr(ImageTokenizer, "tokenize", counted)
    monkeypatch.setattr(token_worker, "write_shard", slow)
    worker = TokenWorker(store.root, tiny.dataset, "tok_rgb@64", path, 64)
    worker.run_together([chain.job("tok_rgb@64", digest, PLAIN, s, split) for s in range(4) for split in SPLITS])
    worker.close()


def test_a_label_out_of_range_is_rejected_and_its_neighbours_in_the_batch_pass(
    store: Store, tiny: Any, chain: Any
) -> None:
    path, digest = chain.tokenizer("semseg")
    good = encode_semseg(np.full((72, 80), 3, np.uint8))
    wrong = np.full((72, 80), 3, np.uint8)
    wrong[40, 40] = 200
    sink = io.BytesIO()
    Image.fromarray(wrong).save(sink, "PNG")
    members = {12: good, 13: sink.getvalue(), 14: good, 16: encode_semseg(np.full((20, 80), 3, np.uint8))}
    size = {"width": 80, "height": 72}
    items = [Item(SampleKey(f"{k:09d}"), ext="png", data=d, extra=size) for k, d in members.items()]
    place = ShardPlace(tiny.dataset, "train", "semseg", 1)
    write_shard(store, place, Recipe(stage="semseg", code_version="2"), items, "r", tiny.label_schema)
    worker = TokenWorker(store.root, tiny.dataset, "tok_semseg@64", path, 64, config=CROPS)
    receipt = worker.run(chain.job("tok_semseg@64", digest, CROPS, 1, "train"))
    worker.close()
    assert receipt.counts == {"bad_label": 2, "ok": 2}
    made = ShardPlace(tiny.dataset, "train", token_folder("tok_semseg@64"), 1)
    rows = {r["key"]: r["reason"] for r in read_rows(store, made).to_pylist()}
    assert "200" in rows["000000013"] and "80 x 20 pixels, its image has 80 x 72" in rows["000000016"]
    assert set(chain.tokens_of("tok_semseg@64", 1)) == {"000000012", "000000014"}


def test_a_shard_of_labels_that_is_gone_stops_the_work_and_says_what_to_make(
    store: Store, tiny: Any, chain: Any
) -> None:
    path, digest = chain.tokenizer("normal")
    planned = chain.job("tok_normal@64", digest, PLAIN, 1, "train")
    place = ShardPlace(tiny.dataset, "train", "normal", 1)
    store.delete(place.tar)
    worker = TokenWorker(store.root, tiny.dataset, "tok_normal@64", path, 64)
    with pytest.raises(MissingShardError, match=r"is gone, though its receipt is there: materialize"):
        worker.run(planned)
    assert read_receipt(store, ShardPlace(tiny.dataset, "train", token_folder("tok_normal@64"), 1)) is None
    store.delete(place.receipt)
    with pytest.raises(MissingShardError, match="is not there: materialize labels/normal"):
        worker.run(planned)
    worker.close()


def test_a_stream_is_taken_part_by_part_and_parts_may_be_empty() -> None:
    parts = InParts(iter([(0, "a"), (0, "b"), (2, "c"), (3, "d")]))
    assert [list(parts.take(i)) for i in range(5)] == [["a", "b"], [], ["c"], ["d"], []]
    assert list(InParts(iter(())).take(0)) == []


@pytest.mark.parametrize("label", ["rgb", "clip"])
@pytest.mark.parametrize(
    ("precision", "products"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_the_network_multiplies_in_the_precision_that_the_tokens_recipe_names(
    store: Store, tiny: Any, chain: Any, label: str, precision: Any, products: torch.dtype
) -> None:
    path, digest = chain.tokenizer(label)
    config, modality = TokenizingConfig(precision=precision), f"tok_{label}@64"
    seen: set[torch.dtype] = set()

    def note(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if isinstance(module, Attention):
            seen.add(output.dtype)

    features = tiny.features if label == "clip" else None
    worker = TokenWorker(store.root, tiny.dataset, modality, path, 64, features, config)
    with register_module_forward_hook(note):
        worker.run(chain.job(modality, digest, config, 0, "val"))
    worker.close()
    assert seen == {products}
