import os
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourmill.core.names import Layout, split_of
from fourmill.core.store import LocalStore
from fourmill.ingest.config import SourceConfig
from fourmill.ingest.listing import url_rows
from fourmill.ingest.numbering import Numberer, repeated_hashes, url_hashes
from fourmill.ingest.rows import open_rows
from fourmill.ingest.source import (
    build_source_index,
    count_rows,
    domains,
    is_current,
    read_source,
    read_source_rows,
    shard_source_digest,
)

LAYOUT = Layout(rows_per_shard=4, shards_per_block=2, num_blocks=2)


def number(store: LocalStore, folder: Path, lines: list[bytes], val_fraction: float = 0.3, layout: Layout = LAYOUT):
    path = folder / "list.tsv"
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return build_source_index(store, "pics", SourceConfig(list=str(path), val_fraction=val_fraction), layout)


def urls(num: int) -> list[bytes]:
    return [b"http://host%d.test/%d.jpg\tcaption %d" % (i % 3, i, i) for i in range(num)]


def all_rows(store: LocalStore) -> list[dict]:
    return [
        row
        for shard in range(LAYOUT.shards_per_block * 2)
        for row in read_source_rows(store, "pics", shard).to_pylist()
    ]


def test_rows_are_numbered_in_parts(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    index = number(store, tmp_path, [*urls(5), b"no tab", b"http://host0.test/0.jpg\tagain"])
    assert (index.num_rows, index.num_bad_rows, index.num_repeated_urls) == (7, 1, 1)
    assert read_source(store, "pics") == index
    assert [path for path in store.list("source") if path.endswith("parquet")] == [
        f"source/{index.digest}/part-{part:05d}.parquet" for part in range(2)
    ]
    rows = all_rows(store)
    assert [row["row"] for row in rows] == list(range(7))
    assert [row["status"] for row in rows] == ["ok"] * 5 + ["bad_row", "ok"]
    assert [row["url_duplicate_of"] for row in rows] == [None] * 6 + ["000000000"]
    assert rows[3]["url"] == "http://host0.test/3.jpg" and rows[3]["caption"] == "caption 3"
    assert all(row["split"] == split_of(row["url"], 0.3) for row in rows)
    assert domains(store, "pics") == [("host0.test", 3), ("host1.test", 2), ("host2.test", 1)]
    assert read_source_rows(store, "pics", 3).num_rows == 0


@settings(max_examples=25, deadline=None)
@given(lines=st.lists(st.binary(max_size=40).filter(lambda line: b"\n" not in line), min_size=1, max_size=15))
def test_every_line_is_a_row_whatever_it_holds(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("list")
    store = LocalStore(folder / "store")
    lines = [b"", *lines]  # a list that begins like a gzip file would be one
    index = number(store, folder, lines)
    rows = all_rows(store)
    assert index.num_rows == len(rows) == len(lines) == count_rows(SourceConfig(list=str(folder / "list.tsv")))
    assert index.num_bad_rows == sum(row["status"] == "bad_row" for row in rows)
    assert all((row["reason"] is None) == (row["status"] == "ok") for row in rows)


def test_the_split_survives_a_rebuilt_list(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    number(store, tmp_path, urls(16))
    before = {row["url"]: row["split"] for row in all_rows(store)}
    assert set(before.values()) == {"train", "val"}
    number(store, tmp_path, urls(16)[::-1][:11])
    assert all(row["split"] == before[row["url"]] for row in all_rows(store))


def test_a_second_call_writes_no_part_and_a_changed_row_only_its_shard(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    first = number(store, tmp_path, urls(10))
    part = tmp_path / "store" / f"source/{first.digest}/part-00000.parquet"
    stamp = part.stat().st_mtime_ns
    digests = [shard_source_digest(store, "pics", shard) for shard in range(4)]
    assert number(store, tmp_path, urls(10)) == first and part.stat().st_mtime_ns == stamp
    changed = urls(11)
    changed[5] = b"http://new.test/5.jpg\tnew"
    second = number(store, tmp_path, changed)
    after = [shard_source_digest(store, "pics", shard) for shard in range(4)]
    assert second.digest != first.digest
    assert [one == other for one, other in zip(digests, after, strict=True)] == [True, False, False, True]
    assert number(store, tmp_path, urls(10)) == first  # the pointer goes back, the parts are still there
    assert [shard_source_digest(store, "pics", shard) for shard in range(4)] == digests


def test_split_and_layout_are_part_of_the_digest(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    other = Layout(rows_per_shard=8, shards_per_block=2, num_blocks=2)
    found = {
        number(store, tmp_path, urls(8)).digest,
        number(store, tmp_path, urls(8), 0.5).digest,
        number(store, tmp_path, urls(8), layout=other).digest,
    }
    assert len(found) == 3


def test_an_interrupted_build_starts_again(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    index = number(store, tmp_path, urls(10))
    store.delete(f"source/{index.digest}/index.json")
    store.delete(f"source/{index.digest}/part-00001.parquet")
    assert number(store, tmp_path, urls(10)) == index
    assert len(all_rows(store)) == 10


def test_lists_that_cannot_be_used(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    (tmp_path / "folder.tsv").mkdir()
    empty, bare = tmp_path / "empty.tsv", tmp_path / "bare.tsv"
    empty.touch()
    bare.write_text("url\tcaption\n")
    unusable = {tmp_path / "gone.tsv": "no list at", tmp_path / "folder.tsv": "is a folder", empty: "is empty"}
    for path, message in {**unusable, bare: "is empty"}.items():
        with pytest.raises(ValueError, match=message):
            build_source_index(store, "pics", SourceConfig(list=str(path)), LAYOUT)
        with pytest.raises(ValueError, match=message):
            count_rows(SourceConfig(list=str(path)))
    with pytest.raises(ValueError, match=r"17 rows, the layout holds 16 .*fourmill run.*num_blocks"):
        number(store, tmp_path, urls(17))
    with pytest.raises(ValueError, match="materialize pics/source_index first"):
        read_source(store, "pics")


def test_an_edited_list_is_seen(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    config = SourceConfig(list=str(tmp_path / "list.tsv"), val_fraction=0.3)
    assert not is_current(store, "pics", config)
    number(store, tmp_path, urls(5))
    assert is_current(store, "pics", config)
    with Path(config.list).open("ab") as file:
        file.write(b"http://a.example/new.jpg\ta new row\n")
    assert not is_current(store, "pics", config)


def test_an_unchanged_list_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path / "store")
    config = SourceConfig(list=str(tmp_path / "list.tsv"), val_fraction=0.3)
    number(store, tmp_path, urls(5))
    with monkeypatch.context() as patch:
        patch.setattr("fourmill.ingest.source.open_rows", None)  # reading would fail
        assert is_current(store, "pics", config)
    os.utime(config.list, ns=(1, 1))
    assert is_current(store, "pics", config)  # touched: read again, and the same


def test_a_list_in_another_format_is_the_same_source(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    plain = number(store, tmp_path, urls(10))
    with open_rows(SourceConfig(list=str(tmp_path / "list.tsv"))) as rows:
        table = pa.Table.from_batches(rows()).select(["url", "caption"])
    pq.write_table(table, tmp_path / "list.parquet", row_group_size=3)
    other = SourceConfig(list=str(tmp_path / "list.parquet"), val_fraction=0.3)
    assert is_current(store, "pics", other)
    assert build_source_index(store, "pics", other, LAYOUT) == plain


def test_a_list_that_grows_while_it_is_read_is_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    path = tmp_path / "list.tsv"
    path.write_bytes(b"\n".join(urls(6)) + b"\n")

    def write_on(done: int, total: int, note: str) -> None:
        if note == "rows written" and done == 4:
            with path.open("ab") as file:
                file.write(b"http://new.test/1\tx\n")

    with pytest.raises(ValueError, match="changed while it was read"):
        build_source_index(store, "pics", SourceConfig(list=str(path)), LAYOUT, write_on)
    with pytest.raises(ValueError, match="materialize pics/source_index first"):
        read_source(store, "pics")


def test_progress_says_how_far_it_is(tmp_path: Path) -> None:
    heard: list[tuple[int, int, str]] = []
    path = tmp_path / "list.tsv"
    path.write_bytes(b"\n".join(urls(9)) + b"\n")
    build_source_index(
        LocalStore(tmp_path / "store"), "pics", SourceConfig(list=str(path)), LAYOUT, lambda *said: heard.append(said)
    )
    assert heard == [(9, 16, "rows read"), (4, 9, "rows written"), (8, 9, "rows written"), (9, 9, "rows written")]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=16), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_a_repeated_url_names_the_first_row_that_has_it(
    tmp_path_factory: pytest.TempPathFactory, picks: list[int], batch_rows: int
) -> None:
    urls = pa.array([f"http://a.test/{pick}" for pick in picks])
    hashes = url_hashes(urls)
    numberer = Numberer(0.4, repeated_hashes([hashes[:3, 0], hashes[3:, 0]]))
    rows = url_rows(urls, urls)
    found = [
        row
        for start in range(0, len(picks), batch_rows)
        for row in numberer.number(rows.slice(start, batch_rows)).to_pylist()
    ]
    assert [row["row"] for row in found] == list(range(len(picks)))
    for row, pick in zip(found, picks, strict=True):
        first = picks.index(pick)
        assert row["url_duplicate_of"] == (None if first == row["row"] else f"{first:09d}")
        assert row["split"] == split_of(row["url"], 0.4)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.floats(0, 1))
def test_the_split_is_the_one_that_names_define(url: str, val_fraction: float) -> None:
    rows = url_rows(pa.array([url]), pa.array([""]))
    found = Numberer(val_fraction, np.empty(0, np.uint64)).number(rows)
    assert found["split"].to_pylist() == [split_of(found["url"][0].as_py(), val_fraction)]


def test_half_a_hash_in_common_is_no_repeat() -> None:
    numberer = Numberer(0.0, np.array([7], np.uint64))
    hashes = np.array([[7, 1], [7, 2], [7, 1], [3, 1]], np.uint64)
    marks = numberer._duplicates(np.arange(4), hashes, np.array([True, True, True, True]))
    assert marks.to_pylist() == [None, None, "000000000", None]


def peak_bytes(folder: Path, num_rows: int) -> int:
    """The most that Python, numpy and Arrow held while a list of so many rows was numbered."""
    path = folder / f"{num_rows}.tsv"
    path.write_bytes(
        b"".join(b"http://h%d.test/%d.jpg\t%s\n" % (i % 50, i, b"a caption " * 8) for i in range(num_rows))
    )
    arrow = [pa.total_allocated_bytes()]
    layout = Layout(rows_per_shard=500, shards_per_block=10, num_blocks=8)
    tracemalloc.start()
    try:
        build_source_index(
            LocalStore(folder / "store"),
            "pics",
            SourceConfig(list=str(path)),
            layout,
            lambda *_: arrow.append(pa.total_allocated_bytes()),
        )
        return tracemalloc.get_traced_memory()[1] + max(arrow) - arrow[0]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_list_but_for_its_hashes(tmp_path: Path) -> None:
    peak_bytes(tmp_path, 5_000)  # what is imported and cached once
    small, large = peak_bytes(tmp_path, 10_000), peak_bytes(tmp_path, 40_000)
    assert large - small < 30_000 * 40, (small, large)  # the rows' text is over 110 bytes a row
