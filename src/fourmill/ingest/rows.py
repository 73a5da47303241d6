"""The rows of a source, whatever its kind and format: one stream of batches, which can be read more than once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal
from urllib.parse import urlsplit

import pyarrow as pa

from fourmill.ingest.at_hand_folder import read_folder
from fourmill.ingest.at_hand_webdataset import read_webdataset
from fourmill.ingest.config import SourceConfig
from fourmill.ingest.list_file import local_list
from fourmill.ingest.list_parquet import read_parquet
from fourmill.ingest.list_text import read_csv, read_tsv

Format = Literal["tsv", "csv", "parquet"]
Rows = Callable[[], Iterator[pa.RecordBatch]]
"""Reads the source from its beginning: batches of `listing.ROWS`."""

_FORMATS: dict[str, Format] = {
    ".tsv": "tsv",
    ".txt": "tsv",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_COMPRESSED = {".gz", ".zst", ".zstd"}
_MAGIC = {b"\x1f\x8b\x08": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}


@contextmanager
def open_rows(config: SourceConfig) -> Iterator[Rows]:
    """The rows of a source; a remote list lies in a temporary file while the block runs.

    Raises:
        ValueError: the source is missing or cannot be read, or its format cannot be told.
    """
    if config.kind == "list":
        file_format = format_of(config)
        with local_list(config.list) as path:
            yield lambda: _list_rows(path, file_format, config)
    elif not Path(config.root).is_dir():
        raise ValueError(f"no folder at {config.root!r}; give the folder of the pictures as source.root")
    else:
        yield lambda: read_folder(config) if config.kind == "folder" else read_webdataset(config)


def format_of(config: SourceConfig) -> Format:
    """Format of a list: what the config says, else what its name ends with, a compression's ending left aside.

    Raises:
        ValueError: the ending is none that is known.
    """
    if config.format != "auto":
        return config.format
    path = urlsplit(config.list).path if "://" in config.list else config.list
    endings = [suffix.lower() for suffix in PurePosixPath(path).suffixes]
    if endings and endings[-1] in _COMPRESSED:
        endings.pop()
    if not endings or endings[-1] not in _FORMATS:
        raise ValueError(
            f"the format of the list {config.where!r} cannot be told by its ending (known: {', '.join(_FORMATS)}, "
            "with .gz or .zst behind); set source.format to 'tsv', 'csv' or 'parquet'"
        )
    return _FORMATS[endings[-1]]


def _list_rows(path: Path, file_format: Format, config: SourceConfig) -> Iterator[pa.RecordBatch]:
    if file_format == "parquet":
        yield from read_parquet(path, config)
        return
    with _open_text(path) as file:
        try:
            yield from (read_tsv if file_format == "tsv" else read_csv)(file, config)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"the list {config.where!r} breaks off ({error}); fetch or write it again") from error


@contextmanager
def _open_text(path: Path) -> Iterator[BinaryIO]:
    """A text, decompressed as it is read when its first bytes say that it is compressed."""
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(0)
        codec = next((codec for magic, codec in _MAGIC.items() if start.startswith(magic)), None)
        if codec is None:
            yield file
            return
        with pa.CompressedInputStream(file, codec) as stream:
            yield stream  # pyright: ignore[reportReturnType]  (it reads; no more is asked of it)
