"""A file being written, which says in full when there is no room for it."""

import errno
import io
import os
import shutil
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fourmill.core.store_errors import StoreFullError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_BUFFER_BYTES = 1_000_000  # small writes take the system twice the time a byte
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Draft(io.BufferedWriter):
    """A file that will be renamed to its target. Its errors name the target and count what was asked of it so far."""

    def __init__(self, raw: io.FileIO, target: Path) -> None:
        super().__init__(raw, _BUFFER_BYTES)
        self._target = target
        self._wanted = 0

    @classmethod
    def begin(cls, draft: Path, target: Path) -> "Draft":
        """Make the file `draft`, on its way to `target`."""
        with tell_when_full(target, 0):
            return cls(io.FileIO(draft, "wb"), target)

    def write(self, buffer: "ReadableBuffer", /) -> int:
        self._wanted += memoryview(buffer).nbytes
        try:
            return super().write(buffer)
        except OSError as error:
            with self._telling():
                raise error

    def flush(self) -> None:
        with self._telling():
            super().flush()

    def sync(self) -> None:
        """Bring everything to the disk: some file systems find out only now that there is no room."""
        self.flush()
        with self._telling():
            os.fsync(self.fileno())

    def close(self) -> None:
        with self._telling():
            super().close()

    def _telling(self) -> AbstractContextManager[None]:
        held = os.fstat(self.fileno()).st_blocks * 512 if not self.closed else 0
        return tell_when_full(self._target, self._wanted, held)


@contextmanager
def tell_when_full(target: Path, num_bytes: int, held_bytes: int = 0) -> Generator[None]:
    """Turn "no room" errors of the block into one that names the file and the space.

    Args:
        num_bytes: what the file needs, as far as is known.
        held_bytes: what its draft holds already, and gives back.

    Raises:
        StoreFullError: the disk, the quota or the longest allowed file is too small.
    """
    try:
        yield
    except StoreFullError:
        raise
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise StoreFullError(
            f"no room for {target} ({error.strerror}): it needs at least {num_bytes:,} bytes, "
            f"{_room(error.errno, target, held_bytes)}. Nothing of it is left; what was finished before stays, and the "
            "next run goes on from there"
        ) from error


def _room(code: int | None, target: Path, held_bytes: int) -> str:
    if code == errno.EFBIG:
        return "more than one file may have here; raise `ulimit -f`, or choose another file system"
    if code == errno.EDQUOT:
        return "more than is left of this user's quota; free some, or choose another store"
    folder = next(parent for parent in target.parents if parent.exists())
    if os.statvfs(folder).f_favail == 0 and os.statvfs(folder).f_files:
        return f"and the file system of {folder} has no inode left; delete files there, or choose another store"
    free = shutil.disk_usage(folder).free + held_bytes
    return f"and {free:,} are free in {folder}; free some, or choose another store"
