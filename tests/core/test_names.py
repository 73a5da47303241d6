"""Keys, shards, blocks and splits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fourmill.core.modality import modality_table
from fourmill.core.names import Layout, row_of, sample_key, split_of


@given(st.integers(0, 10**9 - 1))
def test_keys_round_trip_and_sort_like_rows(row: int) -> None:
    assert row_of(sample_key(row)) == row
    assert len(sample_key(row)) == 9


@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 99))
def test_every_row_is_in_one_shard_of_one_block(rows: int, shards: int, blocks: int) -> None:
    layout = Layout(rows_per_shard=rows, shards_per_block=shards, num_blocks=blocks)
    seen = [row for block in layout.block_keys() for shard in layout.shards_of(block) for row in layout.rows_of(shard)]
    assert seen == list(range(layout.num_rows))
    assert layout.block_of_row(seen[-1]) == layout.block_keys()[-1]


def test_a_hundred_blocks_are_refused() -> None:
    with pytest.raises(ValidationError, match="less than or equal to 99"):
        Layout(num_blocks=100)


def test_an_unknown_block_is_named() -> None:
    with pytest.raises(ValueError, match=r"block_07.*block_00\.\.block_01"):
        Layout(num_blocks=2).shards_of("block_07")


@given(st.text(max_size=60), st.floats(0, 1))
def test_a_url_keeps_its_split(url: str, fraction: float) -> None:
    assert split_of(url, fraction) == split_of(url, fraction)
    assert split_of(url, 0.0) == "train"
    assert split_of(url, 1.0) == "val"


def test_modality_ids_are_those_of_the_public_code() -> None:
    table = modality_table(224, 16, {"rgb": 16384, "depth": 8192, "clip": 8192}, 30_000)
    ids = {name: modality.id for name, modality in table.items()}
    assert ids == {
        "rgb@224": 20716,
        "tok_rgb@224": 11606,
        "tok_depth@224": 20063,
        "tok_clip@224": 11422,
        "caption": 32652,
        "det": 30982,
    }
    assert table["tok_depth@224"].max_tokens == 196


def test_a_second_resolution_stands_beside_the_first_under_public_names() -> None:
    vocab = {"rgb": 16384, "depth": 8192, "normal": 8192, "semseg": 4096, "clip": 8192}
    table = modality_table(224, 16, vocab, 30_000, 448, tuple(vocab))
    ids = {
        "rgb": 27924,
        "tok_rgb": 1057,
        "tok_depth": 11499,
        "tok_normal": 32321,
        "tok_semseg": 10291,
        "tok_clip": 3585,
    }
    second = [m for m in table.values() if m.px == 448]
    assert {m.label: m.id for m in second} == ids
    assert {m.max_tokens for m in second} == {784} and table["rgb@448"].folder == "rgb"
    assert list(table)[-2:] == ["caption", "det"] and table["caption"].px is None
    some = modality_table(64, 8, vocab, 30_000, 32, ("depth",))
    assert set(some) - set(modality_table(64, 8, vocab, 30_000)) == {"tok_depth@32"}
    with pytest.raises(ValueError, match="crops of 36 pixels"):
        modality_table(64, 8, vocab, 30_000, 36, ("rgb",))
    with pytest.raises(ValueError, match="the side of the first, 64"):
        modality_table(64, 8, vocab, 30_000, 64, ("rgb",))
