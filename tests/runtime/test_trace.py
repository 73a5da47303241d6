"""Lineage, of single pieces: what a tokenizer, a shard and a row number lead to."""

from pathlib import Path

import pytest

from fourmill.core.manifest import Manifest, ModalityEntry
from fourmill.core.shards import Receipt, Recipe
from fourmill.core.store import LocalStore
from fourmill.pipelines.profiles import smallest
from fourmill.runtime import trace
from fourmill.runtime.models import ModelRef, set_current
from fourmill.runtime.session import Session
from fourmill.runtime.trace import TraceError, trace_anything


def manifest(name: str, folder: str, digest: str) -> Manifest:
    entry = ModalityEntry(kind="tokens", folder=folder, ext="npy", grid=4, vocab_size=16, tokenizer=digest)
    return Manifest(
        dataset="cc12m",
        input_px=32,
        patch_px=8,
        source_digest="",
        modalities={name: entry},
        text_tokenizer="",
        splits={},
        rows=0,
        missing={},
    )


def test_a_tokenizer_is_traced_to_its_train_set(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    ref = ModelRef(name="rgb", digest="a" * 64, path="models/tokenizer_rgb/a", report={"train_set": "b" * 64})
    set_current(store, "cc12m", ref)
    found = trace._tokenizer(store, "cc12m", "rgb", manifest("tok_rgb@32", "tokens", ref.digest))
    assert found == {"digest": ref.digest, "path": ref.path, "train set": "b" * 64}
    older = trace._tokenizer(store, "cc12m", "rgb", manifest("tok_rgb@32", "tokens", "c" * 64))
    assert older == {"digest": "c" * 64, "note": "another tokenizer serves by now"}


def test_the_vocabulary_is_shown_without_a_train_set(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    ref = ModelRef(name="text", digest="a" * 64, path="models/text/a", report={"vocab_size": 9})
    set_current(store, "cc12m", ref)
    found = trace._tokenizer(store, "cc12m", "text", manifest("caption", "caption", ref.digest))
    assert found == {"digest": ref.digest, "path": ref.path}


@pytest.mark.parametrize(("tar", "shown"), [("d" * 64, {"tar": "d" * 64}), (None, {})])
def test_a_shard_in_which_no_sample_was_ok_is_shown_without_a_tar(tar: str | None, shown: dict[str, str]) -> None:
    recipe = Recipe(stage="tokens", code_version="1")
    receipt = Receipt(recipe=recipe, tar_sha256=tar, rows_sha256="", tar_bytes=0, counts={}, seconds=0, run_id="one")
    assert trace._made_by(receipt) == {"code": "1", "run": "one", **shown}


def test_a_row_number_names_a_sample_without_leading_zeros(tmp_path: Path) -> None:
    session = Session(smallest(tmp_path))
    with pytest.raises(TraceError, match=r"no sample 000000012 in shard-\d+: its block block_00 is not downloaded yet"):
        trace_anything(session, "12")


def test_what_is_neither_a_model_nor_a_row_is_refused_with_what_is(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"neither a model .* nor a sample, which is given by its row number"):
        trace_anything(Session(smallest(tmp_path)), "twelve")
    with pytest.raises(TraceError, match="'twelve' is no sample: give its row number"):
        trace._key_of("twelve")
