"""A local store when things go wrong: no room, no rights; and how other kinds of stores are opened."""

import errno
import io
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fourmill.core.draft import Draft
from fourmill.core.store import LocalStore, StoreError, StoreFullError, check_writable, open_store, register_opener

KB = 1024


@pytest.fixture(name="small")
def small_folder(small_disk: Callable[[int, int], Any]) -> Path:
    """A folder that holds 256 kB."""
    return small_disk(256 * KB, 256 * KB).folder


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_file_that_finds_no_room_is_named_with_the_space_it_needs(small: Path) -> None:
    store = LocalStore(small)
    store.write("kept", b"before")
    for path in ("a/new.tar", "kept"):
        with pytest.raises(StoreFullError, match=rf"no room for {small}/{path} .*at least 400,000 bytes") as caught:
            store.write(path, bytes(400_000))
        assert "next run goes on from there" in str(caught.value)
    assert files(small) == ["kept"] and store.read("kept") == b"before"
    store.write("a/new.tar", bytes(100_000))
    assert store.read("a/new.tar") == bytes(100_000)


def test_a_stream_that_finds_no_room_says_how_far_it_came(small: Path) -> None:
    store = LocalStore(small)
    with pytest.raises(StoreFullError, match=r"shard\.tar .*at least 1,00\d,000 bytes"):
        with store.create("shard.tar") as stream:
            for _ in range(2000):  # written by the million
                stream.write(bytes(1000))
    assert files(small) == []
    with pytest.raises(StoreFullError, match=r"at least 262,145 bytes"), store.create("shard.tar") as stream:
        stream.write(bytes(256 * KB))
        stream.write(b"x")  # stays in the buffer until the end
    assert files(small) == []


def test_what_another_error_stopped_is_no_full_disk(small: Path) -> None:
    store = LocalStore(small)
    with pytest.raises(OSError, match="elsewhere") as caught, store.create("shard.tar") as stream:
        stream.write(b"x")
        raise OSError(errno.ENOSPC, "full elsewhere")
    assert not isinstance(caught.value, StoreError) and files(small) == []


def test_a_copy_that_finds_no_room_is_named(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(small)
    store.write("one", bytes(200_000))
    used = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, used[1]))

    def no_links(source: object, target: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(StoreFullError, match=rf"no room for {small}/two .*at least 200,000 bytes"):
        store.copy("one", "two")
    resource.setrlimit(resource.RLIMIT_FSIZE, used)
    assert files(small) == ["one"]


def test_the_longest_file_that_is_allowed_is_told_from_a_full_disk(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StoreFullError, match=r"File too large.*at least 200,000 bytes.*ulimit -f"):
            LocalStore(tmp_path).write("x", bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path) == []


def test_no_inode_is_told_from_no_space(small: Path) -> None:
    store = LocalStore(small)
    if os.statvfs(small).f_files > 1000:  # nothing was mounted: any disk says ENOSPC through this device
        with pytest.raises(StoreFullError, match=r"No space left on device.*are free in"):
            with Draft(io.FileIO("/dev/full", "wb"), small / "x") as draft:
                draft.write(bytes(100_000))
        return
    with pytest.raises(StoreFullError, match=r"no room for .*n\d+ .*has no inode left"):
        for number in range(100):
            store.write(f"n{number}", b"")
    assert len(files(small)) == len(store.list("")) > 10


def test_a_device_without_room_is_noticed_at_the_end(tmp_path: Path) -> None:
    with pytest.raises(StoreFullError, match=r"x \(No space left on device\).*at least 3 bytes"):
        with Draft(io.FileIO("/dev/full", "wb"), tmp_path / "x") as draft:
            draft.write(b"abc")


def test_a_store_without_rights_is_said_before_any_work(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(StoreError, match=r"cannot be written .*choose another root or mend its rights"):
        check_writable(str(file / "store"))
    check_writable(str(tmp_path / "store"))
    assert files(tmp_path) == ["file"]


def test_a_store_error_is_not_taken_for_a_bad_file() -> None:
    assert not issubclass(StoreError, ValueError)  # receipts that do not parse are forgiven, a store that fails is not


def test_a_scheme_is_served_by_whoever_registers_it(tmp_path: Path) -> None:
    register_opener("test-scheme", lambda root: LocalStore(tmp_path / root.removeprefix("test-scheme://")))
    open_store("test-scheme://a/b").write("x", b"1")
    assert (tmp_path / "a/b/x").read_bytes() == b"1"
    assert open_store(f"file://{tmp_path}").read("a/b/x") == b"1"


def test_opening_a_folder_brings_in_no_boto3() -> None:
    program = "import sys, fourmill.core.store as s; s.open_store('/tmp'); sys.exit('boto3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_files_are_readable_by_others(tmp_path: Path) -> None:
    LocalStore(tmp_path).write("x", b"1")
    umask = os.umask(0o022)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666 & ~umask


def test_what_killed_writers_left_is_swept_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write("shards/shard-00000.tar", b"whole")
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    left = tmp_path / "shards" / f".shard-00001.tar.{ended.stdout.strip()}.0a1b2c3d.tmp"
    left.write_bytes(b"half of it")
    with store.create("shards/shard-00001.tar") as stream:
        stream.write(b"being written")
        os.utime(left, (0, 0))
        store.sweep("shards")
    assert files(tmp_path) == ["shard-00000.tar", "shard-00001.tar"]
    store.sweep("nowhere")
    left.write_bytes(b"half of it")
    store.sweep("shards", "shard-00002.")
    assert left.exists()
    of_another = tmp_path / "shards" / f".shard-00001.tar.{os.getppid()}.0a1b2c3d.tmp"
    of_another.write_bytes(b"of a run beside this one")
    of_nobody = [left.with_name(f".shard-00001.{rest}") for rest in ("tar.tmp", f"tar.{10**30}.0a.tmp")]
    for draft in of_nobody:
        draft.touch()
    store.sweep("shards", "shard-00001.")
    assert not left.exists() and of_another.exists() and not any(draft.exists() for draft in of_nobody)
