"""What one process of a machine does for all: others wait for it and take over when it dies."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fourmill.core.once import checked_once, copy_once

_COPY = """
import sys
from pathlib import Path
from fourmill.core.once import copy_once

def copy(draft):
    draft.mkdir() if sys.argv[2] == "folder" else draft.write_bytes(b"half")
    print("copying", flush=True)
    sys.stdin.read()

copy_once(Path(sys.argv[1]), copy)
"""
_CHECK = """
import sys
from pathlib import Path
from fourmill.core.once import checked_once

print("started", flush=True)
with checked_once(Path(sys.argv[1]), "digest") as is_checked:
    print(is_checked, flush=True)
    sys.stdin.read(1)
"""


@contextmanager
def running(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def drafts(folder: Path) -> list[str]:
    return sorted(draft.name.rsplit(".", 3)[0] for draft in folder.glob(".*.tmp"))


def test_what_killed_processes_have_left_is_removed_and_what_another_copies_is_not(tmp_path: Path) -> None:
    kinds = {"a.safetensors": "file", "b.safetensors": "file", "weights": "folder", "c.safetensors": "file"}
    processes = [running(_COPY, tmp_path / name, kind) for name, kind in kinds.items()]
    with processes[0] as a, processes[1] as b, processes[2] as weights, processes[3] as c:
        for process in (a, b, weights, c):
            assert heard(process) == "copying"
        for process in (a, b, weights):
            process.kill()
            process.wait()
        assert drafts(tmp_path) == [".a.safetensors", ".b.safetensors", ".c.safetensors", ".weights"]
        copy_once(tmp_path / "a.safetensors", lambda draft: draft.touch())
        assert drafts(tmp_path) == [".c.safetensors"]


def test_a_copy_that_fails_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    def fail(draft: Path) -> None:
        draft.write_bytes(b"half")
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="the network is gone"):
        copy_once(tmp_path / "cache" / "set", fail)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".set.lock"]
    assert copy_once(tmp_path / "cache" / "set", lambda draft: draft.touch()).is_file()


def test_a_file_is_compared_again_only_where_it_or_its_digest_is_another(tmp_path: Path) -> None:
    file = tmp_path / "set"
    file.write_bytes(b"1234")

    def is_checked(digest: str = "digest") -> bool:
        with checked_once(file, digest) as found:
            return found

    assert [is_checked() for _ in range(3)] == [False, True, True]
    assert [is_checked("other") for _ in range(2)] == [False, True]
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert [is_checked("other") for _ in range(2)] == [False, True]
    (tmp_path / "copy").write_bytes(b"1234")
    os.utime(tmp_path / "copy", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    (tmp_path / "copy").replace(file)
    assert [is_checked("other") for _ in range(2)] == [False, True]
    (tmp_path / ".set.checked").write_bytes(b"{")
    assert [is_checked("other") for _ in range(2)] == [False, True]


def test_a_file_that_is_refused_or_changes_meanwhile_gets_no_mark(tmp_path: Path) -> None:
    file = tmp_path / "set"
    file.write_bytes(b"1234")
    with pytest.raises(ValueError, match="another digest"), checked_once(file, "digest"):
        raise ValueError("another digest")
    with checked_once(file, "digest") as is_checked:
        assert not is_checked
        file.write_bytes(b"12345")
    with checked_once(file, "digest") as is_checked:
        assert not is_checked


def test_a_file_whose_folder_cannot_be_written_is_compared_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    (tmp_path / "set").write_bytes(b"1234")
    monkeypatch.setattr("fourmill.core.once.LocalStore.write", refuse)
    monkeypatch.setattr("fourmill.core.once.fcntl.flock", refuse)
    for _ in range(2):
        with checked_once(tmp_path / "set", "digest") as is_checked:
            assert not is_checked


def test_a_process_waits_for_the_one_that_compares_and_goes_on_from_its_mark(tmp_path: Path) -> None:
    (tmp_path / "set").write_bytes(b"1234")
    with running(_CHECK, tmp_path / "set") as first:
        assert [heard(first), heard(first)] == ["started", "False"]
        with running(_CHECK, tmp_path / "set") as second:
            assert heard(second) == "started"
            first.communicate("\n")
            assert heard(second) == "True"


def test_a_process_compares_when_the_one_before_it_was_killed(tmp_path: Path) -> None:
    (tmp_path / "set").write_bytes(b"1234")
    with running(_CHECK, tmp_path / "set") as first:
        assert [heard(first), heard(first)] == ["started", "False"]
        with running(_CHECK, tmp_path / "set") as second:
            assert heard(second) == "started"
            first.kill()
            assert heard(second) == "False"
