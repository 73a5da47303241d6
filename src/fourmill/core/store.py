"""Where everything lives: one root, relative POSIX paths, files that appear whole or not at all.

`LocalStore` is the only one so far; the protocol is what an object store must offer to take its place.
"""

import os
import shutil
import uuid
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol


class StoreError(ValueError):
    """A store that cannot be used, said with the next step."""


class Store(Protocol):
    """Relative POSIX paths below one root. A path is written once as a whole, then read; never appended to."""

    @property
    def root(self) -> str: ...

    def exists(self, path: str) -> bool: ...

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


class LocalStore:
    """A folder. Writes go to a hidden sibling, are synced, then renamed over the target."""

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
        parts = PurePosixPath(path)
        if parts.is_absolute() or ".." in parts.parts:
            raise StoreError(f"{path!r} leaves the store; paths are relative and hold no '..'")
        return self._root / parts

    def exists(self, path: str) -> bool:
        return self.path(path).is_file()

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
        target.parent.mkdir(parents=True, exist_ok=True)
        # The process id and a random part: a killed writer's orphan may still be at work beside its successor.
        draft = target.with_name(f".{target.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with draft.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)

    def copy(self, source: str, target: str) -> None:
        to = self.path(target)
        to.parent.mkdir(parents=True, exist_ok=True)
        draft = to.with_name(f".{to.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            try:
                os.link(self.path(source), draft)
            except OSError:  # another file system, or one without hard links
                shutil.copyfile(self.path(source), draft)
            draft.replace(to)
        finally:
            draft.unlink(missing_ok=True)

    def list(self, folder: str) -> list[str]:
        base = self.path(folder)
        if not base.is_dir():
            return []
        return sorted(
            p.relative_to(self._root).as_posix() for p in base.rglob("*") if p.is_file() and not p.name.startswith(".")
        )

    def delete(self, path: str) -> None:
        self.path(path).unlink(missing_ok=True)


def open_store(root: str) -> Store:
    """The store behind a root URL.

    Raises:
        StoreError: a scheme that is not served.
    """
    if "://" in root and not root.startswith("file://"):
        raise StoreError(
            f"store root {root!r}: only local folders are served so far; give a path such as out/demo/store"
        )
    return LocalStore(root.removeprefix("file://"))


def check_writable(root: str) -> None:
    """Prove that the store can be written, before any work starts.

    Raises:
        StoreError: it cannot, with the reason.
    """
    store = open_store(root)
    probe = f"_probe-{uuid.uuid4().hex[:8]}"
    try:
        store.write(probe, b"fourmill")
        store.delete(probe)
    except OSError as error:
        raise StoreError(
            f"store {root!r} cannot be written ({error.strerror}); choose another root or mend its rights"
        ) from error
