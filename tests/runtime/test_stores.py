"""What every store promises: on a folder, and on two S3 servers over real connections."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from fourmill.core.store import Store, StoreError, open_store
from fourmill.core.tar import TarWriter, read_tar

MB = 1024**2


def noise(seed: int, size: int) -> bytes:
    return bytes([seed]) + bytes(range(256)) * (size // 256) + bytes([seed]) * (size % 256)


def test_what_is_written_is_read_and_replaced_and_deleted(store: Store) -> None:
    assert not store.exists("a/b.json")
    store.write("a/b.json", b"one")
    assert store.exists("a/b.json") and store.read("a/b.json") == b"one" and not store.exists("a")
    store.write("a/b.json", b"")
    assert store.read("a/b.json") == b"" and store.open("a/b.json").read() == b""
    store.delete("a/b.json")
    store.delete("a/b.json")
    assert not store.exists("a/b.json") and store.list("a") == []
    store.check()
    assert store.list("") == []


def test_a_stamp_tells_whether_a_file_is_another_one(store: Store) -> None:
    store.write("list.tsv", b"one row")
    stamp = store.stamp("list.tsv")
    assert store.stamp("list.tsv") == stamp
    store.write("list.tsv", b"two row")
    assert store.stamp("list.tsv") != stamp


def test_what_is_missing_is_said_so(store: Store) -> None:
    for attempt in (store.read, store.open, store.stamp, lambda path: store.copy(path, "copy")):
        with pytest.raises(FileNotFoundError, match=r"none\.tar"):
            attempt("deep/none.tar")
    assert store.list("") == []


def test_a_path_cannot_leave_the_root(store: Store) -> None:
    store.write("in", b"x")
    for path in ("../out", "/etc/passwd", "a/../../out"):
        for attempt in (store.read, store.exists, store.list, store.delete, lambda p: store.copy("in", p)):
            with pytest.raises(StoreError, match="leaves the store"):
                attempt(path)


@pytest.mark.parametrize("size", [100, 19 * MB])
def test_a_write_that_fails_leaves_what_was_there(store: Store, size: int) -> None:
    store.write("kept", b"before")
    for path in ("kept", "new"):
        with pytest.raises(KeyError), store.create(path) as stream:
            stream.write(noise(1, size))
            raise KeyError
    assert store.list("") == ["kept"] and store.read("kept") == b"before"


def test_nothing_is_seen_before_the_end(store: Store) -> None:
    with store.create("shard.tar") as stream:
        stream.write(noise(1, 9 * MB))
        assert store.list("") == [] and not store.exists("shard.tar")
        stream.write(b"end")
    assert store.list("") == ["shard.tar"] and store.read("shard.tar") == noise(1, 9 * MB) + b"end"


def test_a_killed_writer_leaves_nothing_to_see(store: Store) -> None:
    program = (
        "import os, signal, sys\nfrom fourmill.core.store import open_store\n"
        "with open_store(sys.argv[1]).create('shard.tar') as stream:\n"
        "    stream.write(bytes(9 * 1024**2))\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, store.root]).returncode == -9
    assert store.list("") == [] and not store.exists("shard.tar")
    store.write("shard.tar", b"again")
    assert store.read("shard.tar") == b"again"


def test_large_files_stream_both_ways(store: Store) -> None:
    with store.create("large.tar") as stream:
        writer = TarWriter(stream)
        for key in range(7):
            writer.add(f"{key:09d}", "jpg", noise(key, 3 * MB + key))  # pyright: ignore[reportArgumentType]
        writer.close()
    with store.open("large.tar") as stream:
        found = {key: data for key, _, data in read_tar(stream)}
    assert found == {f"{key:09d}": noise(key, 3 * MB + key) for key in range(7)}
    whole = store.read("large.tar")
    assert len(whole) == writer.num_bytes
    with store.open("large.tar") as stream:
        for at, size in ((20 * MB, 100), (3, 5), (len(whole) - 7, 50), (9 * MB - 1, 2 * MB)):
            assert stream.seek(at) == at and stream.read(size) == whole[at : at + size]
        assert stream.seek(-10, os.SEEK_END) == len(whole) - 10 and stream.read() == whole[-10:]
        assert stream.read(1) == b"" and stream.tell() == len(whole)


def test_a_copy_stands_on_its_own(store: Store) -> None:
    store.write("images/one.tar", noise(1, 9 * MB))
    store.write("rgb/one.tar", b"old")
    store.copy("images/one.tar", "rgb/one.tar")
    store.write("images/one.tar", b"changed")
    assert store.read("rgb/one.tar") == noise(1, 9 * MB)
    store.delete("images/one.tar")
    assert store.list("") == ["rgb/one.tar"]


def test_a_list_is_sorted_and_whole_over_pages(store: Store) -> None:
    paths = [f"cc12m/{split}/images/shard-{n:05d}.json" for n in range(1050) for split in ("val", "train")]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: store.write(path, b"x"), paths))
    assert store.list("cc12m") == sorted(paths)
    assert store.list("cc12m/train/") == store.list("cc12m/train") == sorted(p for p in paths if "/train/" in p)
    assert store.list("cc12m/tra") == store.list("nothing") == store.list(paths[0]) == []


def test_a_list_knows_folders_hidden_names_and_order(store: Store) -> None:
    paths = ["a/b.txt", "a/b/c", "a/b-1", "a/B", "ab/x", "a/é", "a/z"]
    for path in [*paths, "a/.draft"]:
        store.write(path, b"x")
    assert store.list("a") == sorted(path for path in paths if path.startswith("a/"))
    assert store.list("") == sorted(paths)


@pytest.mark.parametrize(
    "path",
    ["cc12m/train/tok_rgb@224/shard-00000.tar", "a b+c%20&=/ü#?.bin", "models/tok_depth@224/x/card.md", "a:b/c~d/(e)!"],
)
def test_any_name_will_do(store: Store, path: str) -> None:
    store.write(path, b"data")
    store.copy(path, f"copy/{path}")
    assert store.list("") == sorted([path, f"copy/{path}"])
    assert store.read(path) == store.read(f"copy/{path}") == b"data" and store.exists(path)
    store.delete(path)
    assert not store.exists(path)


@pytest.mark.parametrize("size", [1000, 9 * MB])
def test_of_writers_of_one_path_one_wins_whole(store: Store, size: int) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: store.write("same", noise(seed, size)), range(8)))
    assert store.read("same") in [noise(seed, size) for seed in range(8)]
    assert store.list("") == ["same"]


def test_a_root_opens_the_same_store_again(store: Store) -> None:
    store.write("x", b"1")
    assert open_store(store.root).root == store.root and open_store(store.root).read("x") == b"1"
