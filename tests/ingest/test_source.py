from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourmill.core.names import Layout, split_of
from fourmill.core.store import LocalStore
from fourmill.ingest.config import SourceConfig
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
@given(lines=st.lists(st.binary(max_size=40).filter(lambda line: b"\n" not in line), min_size=1, max_size=16))
def test_every_line_is_a_row_whatever_it_holds(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("list")
    store = LocalStore(folder / "store")
    index = number(store, folder, lines)
    rows = all_rows(store)
    assert index.num_rows == len(rows) == len(lines) == count_rows(str(folder / "list.tsv"))
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
    empty = tmp_path / "empty.tsv"
    empty.touch()
    for path, message in ((tmp_path / "gone.tsv", "no list at"), (tmp_path, "is a folder"), (empty, "is empty")):
        with pytest.raises(ValueError, match=message):
            build_source_index(store, "pics", SourceConfig(list=str(path)), LAYOUT)
        with pytest.raises(ValueError, match=message):
            count_rows(str(path))
    with pytest.raises(ValueError, match=r"17 rows, the layout holds 16 .*raise num_blocks"):
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
