"""Training sets in one file: written in parts, read where they lie."""

import fcntl
import hashlib
import os
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load

from fourmill.core.digest import digest_file
from fourmill.core.store import LocalStore
from fourmill.tokenize.packed import PackWriter, local_file, map_arrays
from fourmill.tokenize.train_set import spread

ARRAYS = {
    "train/rgb": np.arange(7 * 12, dtype=np.uint8).reshape(7, 2, 2, 3),
    "train/depth": np.arange(7 * 4, dtype=np.uint16).reshape(7, 2, 2) * 900,
    "train/keys": np.arange(7, dtype=np.int64) * 10**12,
    "eval/clip": np.linspace(-1, 1, 10, dtype=np.float16).reshape(2, 5),
}


def written(store: LocalStore, cuts: dict[str, list[int]], arrays=ARRAYS) -> tuple[str, str]:
    with PackWriter() as writer:
        for name, array in arrays.items():
            for part in np.split(array, cuts.get(name, [])):
                writer.append(name, part)
        return writer.publish(store, "sets")


@given(st.lists(st.integers(0, 7), max_size=3), st.lists(st.integers(0, 7), max_size=3))
def test_what_is_written_in_any_parts_is_read_again(tmp_path_factory, first, second):
    store = LocalStore(tmp_path_factory.mktemp("store"))
    digest, path = written(store, {"train/rgb": sorted(first), "train/keys": sorted(second)})
    assert (digest, path) == written(store, {})
    assert hashlib.sha256(store.read(path)).hexdigest() == digest == digest_file(store.path(path))
    found = map_arrays(local_file(store, path))
    by_others = load(store.read(path))
    assert set(found) == set(by_others) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array) and np.array_equal(by_others[name], array)


def test_a_set_of_any_size_takes_little_memory(tmp_path):
    store, row = LocalStore(tmp_path), np.zeros((1, 1 << 20), np.uint8)
    tracemalloc.start()
    try:
        with PackWriter(tmp_path / "scratch") as writer:
            for value in range(64):
                writer.append("train/rgb", row + np.uint8(value))
            _, path = writer.publish(store, "sets")
        found = map_arrays(local_file(store, path))["train/rgb"]
        assert found[[3, 50]].max(1).tolist() == [3, 50]
        assert tracemalloc.get_traced_memory()[1] < 16e6  # of 64 MB
    finally:
        tracemalloc.stop()
    assert not list((tmp_path / "scratch").iterdir())


def test_what_a_killed_writer_left_is_removed_and_what_another_writes_is_not(tmp_path):
    for name, age_s in (("pack-old", 7 * 3600), ("pack-new", 60)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.rgb").write_bytes(b"rows")
        for one in (tmp_path / name / "train.rgb", tmp_path / name):
            seen = one.stat().st_mtime - age_s
            os.utime(one, (seen, seen))
    with PackWriter(tmp_path):
        assert not (tmp_path / "pack-old").exists() and (tmp_path / "pack-new").is_dir()


def test_rows_that_do_not_fit_are_refused_by_name():
    with PackWriter() as writer:
        writer.append("train/rgb", np.zeros((2, 4), np.uint8))
        with pytest.raises(ValueError, match=r"train/rgb has rows uint8 \(4,\), got uint8 \(5,\)"):
            writer.append("train/rgb", np.zeros((2, 5), np.uint8))
        with pytest.raises(ValueError, match="train/depth is float64; training sets hold"):
            writer.append("train/depth", np.zeros((2, 4)))


def test_a_cut_file_is_refused(tmp_path):
    store = LocalStore(tmp_path)
    _, path = written(store, {})
    whole = store.read(path)
    for length in (4, 40, len(whole) - 1):
        store.write("cut", whole[:length])
        with pytest.raises(SafetensorError):
            map_arrays(store.path("cut"))


class Remote:
    """A store that is no folder of this machine."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.opened = files, 0

    def open(self, path: str):
        import io

        self.opened += 1
        return io.BytesIO(self.files[path])


def test_a_remote_set_is_copied_to_this_machine_once(tmp_path):
    store = Remote({"sets/abc.safetensors": b"bytes"})
    for _ in range(2):
        assert local_file(store, "sets/abc.safetensors", tmp_path).read_bytes() == b"bytes"  # type: ignore[arg-type]
    assert store.opened == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".abc.safetensors.lock", "abc.safetensors"]


def test_processes_that_want_the_same_set_copy_it_once(tmp_path, monkeypatch):
    """The second one comes while the first one is copying; locks are of files, so threads stand for processes."""
    begun, another, lock = threading.Event(), threading.Event(), fcntl.flock

    class Slow(Remote):
        def open(self, path: str):
            come()
            begun.set()
            another.wait(60)
            return super().open(path)

    def come(*held: int) -> None:
        if begun.is_set():
            another.set()
        if held:
            lock(*held)

    store: Any = Slow({"sets/abc.safetensors": b"bytes"})
    monkeypatch.setattr(fcntl, "flock", come)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(local_file, store, "sets/abc.safetensors", tmp_path)
        begun.wait(60)
        second = pool.submit(local_file, store, "sets/abc.safetensors", tmp_path)
        assert first.result() == second.result()
    assert store.opened == 1


def test_what_a_killed_process_left_of_any_set_is_removed(tmp_path):
    for name in ("abc", "other"):
        (tmp_path / f".{name}.safetensors.{os.getpid()}.0123abcd.tmp").write_bytes(b"by")
    local_file(Remote({"sets/abc.safetensors": b"bytes"}), "sets/abc.safetensors", tmp_path)  # type: ignore[arg-type]
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_set_that_is_not_in_the_store_leaves_no_draft(tmp_path):
    class Empty(Remote):
        def open(self, path: str):
            raise FileNotFoundError(path)

    with pytest.raises(FileNotFoundError, match=r"sets/abc\.safetensors"):
        local_file(Empty({}), "sets/abc.safetensors", tmp_path)  # type: ignore[arg-type]
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


@given(st.integers(1, 300), st.integers(1, 50))
def test_spread_rows_reach_over_all_of_them(number, most):
    rows = spread(np.arange(number), most)
    assert 1 <= len(rows) <= most
    assert rows[0] == 0 and number - rows[-1] <= -(-number // most)
    assert len(rows) == number or len(rows) > most // 2
