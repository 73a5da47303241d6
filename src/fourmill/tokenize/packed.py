"""Arrays of a training set in one file, written as samples come and read where they lie: neither is ever whole in memory.

The file is a safetensors file, which any reader of those takes; nothing in it runs.
"""

import hashlib
import json
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from fourmill.core.draft import Draft
from fourmill.core.once import copy_once
from fourmill.core.store import ABANDONED_AFTER_S, LocalStore, Store

_DTYPES = {"U8": np.uint8, "U16": np.uint16, "I64": np.int64, "F16": np.float16}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_PIECE = 1 << 22
_PREFIX = "pack-"


@dataclass
class _Rows:
    """What one array has so far: a file of its rows, one after the other."""

    file: BinaryIO
    dtype: np.dtype[Any]
    row: tuple[int, ...]
    count: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.count, *self.row)

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape))


@dataclass
class PackWriter:
    """Takes rows of named arrays, in a folder of its own that is gone afterwards; needs twice the set's size on disks in all."""

    scratch: Path | None = None  # parent of that folder, where killed writers' are removed too; the system's by default
    _arrays: dict[str, _Rows] = field(default_factory=dict)

    def __enter__(self) -> Self:
        if self.scratch is not None:
            self.scratch.mkdir(parents=True, exist_ok=True)
            _sweep(self.scratch)
        self._folder = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=self.scratch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for rows in self._arrays.values():
            rows.file.close()
        self._folder.cleanup()

    def append(self, name: str, rows_NX: NDArray[Any]) -> None:
        """Add rows to an array; the first ones say what it holds.

        Raises:
            ValueError: rows of another shape or type than the first, or of a type that no set has.
        """
        rows = self._arrays.get(name)
        if rows is None:
            if rows_NX.dtype not in _NAMES:
                raise ValueError(f"{name} is {rows_NX.dtype}; training sets hold {', '.join(map(str, _NAMES))}")
            file = Path(self._folder.name, name.replace("/", ".")).open("w+b")
            rows = self._arrays[name] = _Rows(file, rows_NX.dtype, rows_NX.shape[1:])
        if (rows_NX.dtype, rows_NX.shape[1:]) != (rows.dtype, rows.row):
            raise ValueError(f"{name} has rows {rows.dtype} {rows.row}, got {rows_NX.dtype} {rows_NX.shape[1:]}")
        rows.file.write(np.ascontiguousarray(rows_NX).data)
        rows.count += len(rows_NX)

    def rows(self, name: str) -> NDArray[Any]:
        """What an array has so far, where it lies."""
        rows = self._arrays[name]
        rows.file.flush()
        return np.memmap(rows.file.name, rows.dtype, "r", shape=rows.shape)

    def publish(self, store: Store, folder: str) -> tuple[str, str]:
        """Write the file under the digest of its bytes, unless it is there: (digest, path)."""
        digest = hashlib.sha256()
        for piece in self._pieces():
            digest.update(piece)
        path = f"{folder}/{digest.hexdigest()}.safetensors"
        if not store.exists(path):
            with store.create(path) as file:
                for piece in self._pieces():
                    file.write(piece)
        return digest.hexdigest(), path

    def _pieces(self) -> Iterator[bytes]:
        # Wide types first, so that all are aligned.
        ordered = sorted(self._arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
        header, at = dict[str, Any](), 0
        for name, rows in ordered:
            end = at + rows.num_bytes
            header[name] = {"dtype": _NAMES[rows.dtype], "shape": rows.shape, "data_offsets": (at, end)}
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        yield struct.pack("<Q", len(text)) + text
        for _, rows in ordered:
            rows.file.flush()
            rows.file.seek(0)
            while piece := rows.file.read(_PIECE):
                yield piece


def _sweep(scratch: Path) -> None:
    oldest = time.time() - ABANDONED_AFTER_S
    for left in scratch.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another one was first
            if max(one.stat().st_mtime for one in (left, *left.iterdir())) < oldest:
                shutil.rmtree(left)


def copies_folder() -> Path:
    """Where a machine keeps its copies of remote stores' training sets."""
    return Path.home() / ".cache" / "fourmill" / "train_sets"


def local_file(store: Store, path: str, cache: Path | None = None) -> Path:
    """A file of the store as one of this machine; from a remote store copied to `cache`, once a machine.

    Raises:
        FileNotFoundError: it is not in the store.
        StoreFullError: there is no room for the copy.
    """
    if isinstance(store, LocalStore):
        if not store.exists(path):
            raise FileNotFoundError(path)
        return store.path(path)
    target = (cache or copies_folder()) / path.rpartition("/")[2]

    def copy(draft: Path) -> None:
        with store.open(path) as source, Draft.begin(draft, target) as file:
            shutil.copyfileobj(source, file, _PIECE)
            file.sync()

    return copy_once(target, copy)


def map_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a file, by name, read from it as somebody asks for their rows.

    Raises:
        SafetensorError: it is no such file, or is cut.
    """
    with safe_open(path, "numpy"):  # checks the header and that the offsets fill the file
        pass
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {
        name: np.memmap(
            path, _DTYPES[entry["dtype"]], "r", 8 + length + entry["data_offsets"][0], tuple(entry["shape"])
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }
