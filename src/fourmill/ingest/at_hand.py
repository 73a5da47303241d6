"""Pictures at hand: their addresses, and how the bytes behind one are read without ever leaving the root.

An address is relative to `SourceConfig.root`: `file:n01440764/1.JPEG`, or `tar:00012.tar#1536+43210` for the 43,210
bytes from offset 1536 of a tar, so that any picture is read without looking for it. Odd characters are percent-encoded.
"""

import os
import re
import socket
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import quote, unquote_to_bytes

from fourmill.ingest.config import SourceConfig

MAX_BYTES = 64 * 1024**2
IMAGE_ENDINGS = frozenset({"jpg", "jpeg", "jpe", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"})
_TAR_ADDRESS = re.compile(r"tar:([^#]+)#(\d{1,15})\+(\d{1,15})")


class AtHandError(Exception):
    """A picture at hand that cannot be had: a status of the ledger and a reason."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status = status
        self.reason = reason


def is_at_hand(url: str) -> bool:
    """Whether a row's URL is the address of a picture at hand. In a list such a URL is a bad row."""
    return url.startswith(("file:", "tar:"))


def file_address(relative: str) -> str:
    """Address of a file below the root."""
    return f"file:{quote(os.fsencode(relative))}"


def tar_address(relative: str, offset: int, size: int) -> str:
    """Address of `size` bytes from `offset` of a tar below the root."""
    return f"tar:{quote(os.fsencode(relative))}#{offset}+{size}"


def read_at_hand(config: SourceConfig, url: str, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes behind an address.

    Args:
        max_bytes: longest picture that is read; `IngestConfig.max_bytes` where there is one.

    Raises:
        AtHandError: with the status "missing" (no such file), "unreadable" (rights, a broken disk, not a file),
            "refused_address" (it lies outside the root, or is no address), "too_large" or "truncated".
        ValueError: this machine has no such root, so nothing can be said of the file.
    """
    relative, offset, size = _parse(url)
    with open_inside(Path(config.root), relative) as file:
        whole = os.fstat(file.fileno()).st_size
        wanted = whole - offset if size is None else size
        if wanted > max_bytes:
            raise AtHandError("too_large", f"{wanted} bytes, over {max_bytes}")
        if offset + wanted > whole:
            raise AtHandError("truncated", f"{relative!r} ends at byte {whole}, the picture at {offset + wanted}")
        try:
            file.seek(offset)
            data = file.read(wanted)
        except OSError as error:
            raise AtHandError("unreadable", f"{relative!r}: {error.strerror}") from error
    if len(data) != wanted:
        raise AtHandError("truncated", f"{relative!r}: {len(data)} of {wanted} bytes")
    return data


def open_inside(root: Path, relative: str) -> BinaryIO:
    """Open a regular file below a root. Links are followed as long as they stay inside.

    Raises:
        AtHandError, ValueError: see `read_at_hand`.
    """
    parts = PurePosixPath(relative)
    if parts.is_absolute() or ".." in parts.parts or "\0" in relative or not parts.parts:
        raise AtHandError("refused_address", f"{relative!r} leaves the root")
    inside = _resolved(root)
    try:
        path = (inside / parts).resolve(strict=True)
        if not path.is_relative_to(inside):
            raise AtHandError("refused_address", f"{relative!r} is a link out of the root")
        # A resolved path has no links left; a pipe put there would hang an open that may block.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AtHandError("missing", f"no file {relative!r} in the root") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead in a circle
        raise AtHandError("unreadable", f"{relative!r}: {getattr(error, 'strerror', None) or error}") from error
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise AtHandError("unreadable", f"{relative!r} is not a file")
    return file


def walk(root: Path) -> Iterator[os.DirEntry[str]]:
    """Files and links anywhere below a root, in the order of their paths; hidden ones are passed over.

    Holds the names of one folder and of those above it. Folders behind links are not entered: the link comes itself.

    Raises:
        ValueError: the root or a folder cannot be read.
    """
    folders = [_ordered(root)]
    while folders:
        entry = next(folders[-1], None)
        if entry is None:
            folders.pop()
        elif entry.is_dir(follow_symlinks=False):
            folders.append(_ordered(Path(entry.path)))
        else:
            yield entry


def ending(name: str) -> str:
    """What a file's name ends with, lower case, without the dot: "jpg" of "a.b.JPG", "" of "README"."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def _resolved(root: Path) -> Path:
    try:
        return root.resolve(strict=True)
    except OSError as error:  # of a machine where it is not mounted every picture would be missing
        raise ValueError(
            f"no folder at {str(root)!r} on {socket.gethostname()} ({error.strerror}); pictures at hand must lie there "
            "on every machine that works on shards: mount it, then run again"
        ) from error


def _ordered(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise ValueError(
            f"folder {str(folder)!r} cannot be read ({error.strerror}); mend source.root or its rights"
        ) from error
    return iter(sorted(found, key=lambda entry: entry.name))


def _parse(url: str) -> tuple[str, int, int | None]:
    if url.startswith("file:"):
        return _path(url.removeprefix("file:")), 0, None
    if match := _TAR_ADDRESS.fullmatch(url):
        return _path(match[1]), int(match[2]), int(match[3])
    raise AtHandError("refused_address", f"{url[:200]!r} is not the address of a picture at hand")


def _path(quoted: str) -> str:
    return os.fsdecode(unquote_to_bytes(quoted))
