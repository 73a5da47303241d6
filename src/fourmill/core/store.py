"""Where everything lives: one root, relative POSIX paths, files that appear whole or not at all.

`LocalStore` is a folder. Other stores are opened by their scheme: whoever knows how registers an opener.
"""

import os
import shutil
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from fourmill.core.draft import Draft, tell_when_full
from fourmill.core.store_errors import StoreError, StoreFullError

__all__ = [
    "ABANDONED_AFTER_S",
    "LocalStore",
    "Store",
    "StoreError",
    "StoreFullError",
    "check_writable",
    "is_local",
    "open_store",
    "register_opener",
    "relative_path",
]


ABANDONED_AFTER_S = 6 * 3600.0  # no file is written to so seldom


class Store(Protocol):
    """Relative POSIX paths below one root. A path is written once as a whole, then read; never appended to."""

    @property
    def root(self) -> str: ...

    def exists(self, path: str) -> bool: ...

    def stamp(self, path: str) -> list[str]:
        """What tells that a file is still the one it was, without reading it. Raises FileNotFoundError."""
        ...

    def read(self, path: str) -> bytes:
        """The whole file. Raises FileNotFoundError."""
        ...

    def open(self, path: str) -> BinaryIO:
        """The file as a stream, from its beginning. Raises FileNotFoundError."""
        ...

    def write(self, path: str, data: bytes) -> None:
        """Publish `data` at `path`, whole or not at all, replacing what was there."""
        ...

    def create(self, path: str) -> AbstractContextManager[BinaryIO]:
        """A context manager around a writable stream; the file appears when the block ends without an exception."""
        ...

    def copy(self, source: str, target: str) -> None:
        """Publish the content of `source` at `target` too, without moving bytes where the store can."""
        ...

    def list(self, folder: str) -> list[str]:
        """Paths of the files anywhere below a folder, sorted; empty when there is none."""
        ...

    def delete(self, path: str) -> None:
        """Remove a file; nothing happens when it is not there."""
        ...

    def sweep(self, folder: str, name: str | None = None) -> None:
        """Remove what killed writers have left of files of a folder; never what somebody may still be writing.

        Args:
            name: the beginning of the names of files that nobody writes now; their remains go whatever their age, except those of
                a process of this machine that lives, as of a second run of the same block.
        """
        ...

    def check(self) -> None:
        """Prove that the store can be written, within seconds. Raises StoreError with the reason."""
        ...


def relative_path(path: str) -> PurePosixPath:
    """A path as stores take it.

    Raises:
        StoreError: it would leave the root.
    """
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts:
        raise StoreError(f"{path!r} leaves the store; paths are relative and hold no '..'")
    return parts


class LocalStore:
    """A folder. Writes go to a hidden sibling, are synced, then renamed over the target.

    A write that finds no room raises StoreFullError and leaves nothing behind.
    """

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root).resolve()

    @property
    def root(self) -> str:
        return str(self._root)

    def path(self, path: str) -> Path:
        """The file behind a relative path, for libraries that want one.

        Raises:
            StoreError: the path would leave the root.
        """
        return self._root / relative_path(path)

    def exists(self, path: str) -> bool:
        return self.path(path).is_file()

    def stamp(self, path: str) -> list[str]:
        stat = self.path(path).stat()
        return [str(fact) for fact in (stat.st_size, stat.st_mtime_ns, stat.st_ino)]

    def read(self, path: str) -> bytes:
        return self.path(path).read_bytes()

    def open(self, path: str) -> BinaryIO:
        return self.path(path).open("rb")

    def write(self, path: str, data: bytes) -> None:
        with self.create(path) as file:
            file.write(data)

    @contextmanager
    def create(self, path: str) -> Generator[BinaryIO]:
        target = self.path(path)
        with _draft_of(target) as draft:
            with Draft.begin(draft, target) as file:
                yield file
                file.sync()
            draft.replace(target)

    def copy(self, source: str, target: str) -> None:
        from_, to = self.path(source), self.path(target)
        with _draft_of(to) as draft:
            try:
                os.link(from_, draft)
            except FileNotFoundError:
                raise
            except OSError:  # another file system, or one without hard links
                with tell_when_full(to, from_.stat().st_size):
                    shutil.copyfile(from_, draft)
            draft.replace(to)

    def list(self, folder: str) -> list[str]:
        base = self.path(folder)
        if not base.is_dir():
            return []
        return sorted(
            p.relative_to(self._root).as_posix() for p in base.rglob("*") if p.is_file() and not p.name.startswith(".")
        )

    def delete(self, path: str) -> None:
        self.path(path).unlink(missing_ok=True)

    def sweep(self, folder: str, name: str | None = None) -> None:
        base = self.path(folder)
        oldest = time.time() - ABANDONED_AFTER_S
        for draft in base.glob(f".{name or ''}*.tmp") if base.is_dir() else ():
            with suppress(OSError):  # another sweeper was first, or it is not ours to remove
                if draft.stat().st_mtime < oldest or (name is not None and not _is_written(draft)):
                    draft.unlink()

    def check(self) -> None:
        probe = f"_probe-{uuid.uuid4().hex[:8]}"
        try:
            self.write(probe, b"fourmill")
            self.delete(probe)
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(
                f"store {self.root!r} cannot be written ({error.strerror}); choose another root or mend its rights"
            ) from error


def _is_written(draft: Path) -> bool:
    """Whether the writer is another process of this machine that lives: a run of the same block beside this one, say."""
    pid = (draft.name.split(".")[-3:-2] or [""])[0]  # as `_draft_of` names it
    if not pid.isdecimal() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def _draft_of(target: Path) -> Generator[Path]:
    """The hidden sibling that a file is written to first; gone afterwards, whatever happens."""
    with tell_when_full(target, 0):
        target.parent.mkdir(parents=True, exist_ok=True)
    # The process id and a random part: a killed writer's orphan may still be at work beside its successor.
    draft = target.with_name(f".{target.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield draft
    finally:
        draft.unlink(missing_ok=True)


_openers: dict[str, Callable[[str], Store]] = {}


def register_opener(scheme: str, opener: Callable[[str], Store]) -> None:
    """Let `opener(root)` open the roots that begin with `scheme://`; the last one registered serves."""
    _openers[scheme] = opener


def is_local(root: str) -> bool:
    """Whether a root is a folder of this machine."""
    return "://" not in root or root.startswith("file://")


def open_store(root: str) -> Store:
    """The store behind a root: a folder, `file://...`, or `scheme://...` of a registered opener.

    Raises:
        StoreError: a scheme that is not served.
    """
    if is_local(root):
        return LocalStore(root.removeprefix("file://"))
    scheme = root.partition("://")[0]
    if scheme not in _openers:
        served = ", ".join(f"{known}://" for known in sorted(_openers))
        raise StoreError(
            f"store root {root!r}: {scheme}:// is not served; give a folder such as out/demo/store, or one of: {served or 'none'}"
        )
    return _openers[scheme](root)


def check_writable(root: str) -> None:
    """Prove that the store can be written, before any work starts.

    Raises:
        StoreError: it cannot, with the reason.
    """
    open_store(root).check()
