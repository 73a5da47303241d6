"""Webdataset tars as a source, img2dataset's output among them: every sample is a row, in the tars' own order."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import pyarrow as pa

from fourmill.ingest.at_hand import IMAGE_ENDINGS, AtHandError, ending, open_inside, tar_address, walk
from fourmill.ingest.at_hand_captions import MAX_CAPTION_BYTES, CaptionError, json_caption, text_caption
from fourmill.ingest.at_hand_tar import BrokenTarError, Member, scan_tar
from fourmill.ingest.config import SourceConfig
from fourmill.ingest.listing import BATCH_ROWS, MAX_URL_CHARS, at_hand_rows

_MAX_MEMBERS = 64  # of a sample that are looked at


@dataclass(frozen=True)
class _Row:
    offset: int
    size: int
    caption: bytes = b""
    fault: str | None = None
    origin: str | None = None


@dataclass
class _Sample:
    """Members with one stem, which follow each other."""

    stem: str
    members: dict[str, Member] = field(default_factory=dict)  # by ending; the first of each counts

    @property
    def first(self) -> Member:
        return next(iter(self.members.values()))


def read_webdataset(config: SourceConfig) -> Iterator[pa.RecordBatch]:
    """Rows of all tars below the root, by the tars' paths, then as they lie in each.

    A sample is the members that follow each other and whose names are equal up to the first dot. Its picture is the
    first member with a picture's ending, its caption the `.txt`, or `caption` of the `.json`, its origin the `url` of the
    `.json`. A sample without caption, a link, a compressed tar, and the place where a broken tar ends are bad rows; the
    other tars are still read. Only headers, texts and JSON are read.

    Raises:
        ValueError: the root or a folder in it cannot be read.
    """
    root = Path(config.root)
    for entry in walk(root):
        if entry.name.lower().endswith((".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
            relative = os.path.relpath(entry.path, root)
            batch: list[_Row] = []
            for row in _tar_rows(root, relative, config.captions):
                batch.append(row)
                if len(batch) == BATCH_ROWS:
                    yield _batch(relative, batch)
                    batch = []
            if batch:
                yield _batch(relative, batch)


def _batch(relative: str, rows: list[_Row]) -> pa.RecordBatch:
    place = os.fsencode(relative).decode(errors="backslashreplace")
    return at_hand_rows(
        [tar_address(relative, row.offset, row.size) for row in rows],
        [row.caption for row in rows],
        [place] * len(rows),
        {number: row.fault for number, row in enumerate(rows) if row.fault},
        [row.origin for row in rows],
    )


def _tar_rows(root: Path, relative: str, captions: str) -> Iterator[_Row]:
    if ending(relative) != "tar":
        yield _Row(0, 0, fault="a compressed tar, in which no picture has a place of its own; unpack it")
        return
    end = 0
    try:
        with open_inside(root, relative) as file:
            length = os.fstat(file.fileno()).st_size
            for sample in _samples(file):
                yield _row(file, sample, captions, length)
                last = list(sample.members.values())[-1]
                end = last.offset + last.size
    except BrokenTarError as error:
        yield _Row(end, 0, fault=str(error))
    except AtHandError as error:
        yield _Row(0, 0, fault=error.reason)
    except OSError as error:
        yield _Row(end, 0, fault=f"the tar cannot be read on ({error.strerror})")


def _samples(file: BinaryIO) -> Iterator[_Sample]:
    sample: _Sample | None = None
    try:
        for member in scan_tar(file):
            stem, extension = _parts(member.name)
            if sample is None or stem != sample.stem:
                if sample is not None:
                    yield sample
                sample = _Sample(stem)
            if len(sample.members) < _MAX_MEMBERS:
                sample.members.setdefault(extension, member)
    except BrokenTarError:
        if sample is not None:
            yield sample
        raise
    if sample is not None:
        yield sample


def _parts(name: str) -> tuple[str, str]:
    """`dir/0001` and `seg.png` of `dir/0001.seg.PNG`: webdataset's rule."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}", extension.lower()


def _row(file: BinaryIO, sample: _Sample, captions: str, length: int) -> _Row:
    picture = next((member for extension, member in sample.members.items() if extension in IMAGE_ENDINGS), None)
    if picture is None:
        there = ", ".join(f".{extension[:20]}" for extension in list(sample.members)[:8])
        return _Row(sample.first.offset, 0, fault=f"no picture among its members: {there}")
    if not picture.is_file:
        return _Row(picture.offset, 0, fault="its picture is no regular member but a link or a device")
    if picture.offset + picture.size > length:
        return _Row(picture.offset, picture.size, fault=f"the tar ends at byte {length}, inside the picture")
    try:
        caption = _caption(file, sample, captions)
        return _Row(picture.offset, picture.size, caption, origin=_origin(file, sample))
    except CaptionError as error:
        return _Row(picture.offset, picture.size, fault=str(error))


def _caption(file: BinaryIO, sample: _Sample, captions: str) -> bytes:
    if captions == "none":
        return b""
    for extension, read in (("txt", text_caption), ("json", json_caption)):
        member = sample.members.get(extension)
        if captions not in ("auto", extension) or member is None or not member.is_file:
            continue
        if member.size > MAX_CAPTION_BYTES:
            raise CaptionError(f"no caption: its .{extension} is over {MAX_CAPTION_BYTES} bytes")
        file.seek(member.offset)
        return read(file.read(member.size))
    raise CaptionError("no caption: " + ("neither .txt nor .json" if captions == "auto" else f"no .{captions}"))


def _origin(file: BinaryIO, sample: _Sample) -> str | None:
    """Where img2dataset downloaded the picture, without credentials and cut like a URL; None when no JSON tells."""
    member = sample.members.get("json")
    if member is None or not member.is_file or member.size > MAX_CAPTION_BYTES:
        return None
    file.seek(member.offset)
    try:
        described = json.loads(file.read(member.size))
    except (ValueError, RecursionError):
        return None
    url = described.get("url") if isinstance(described, dict) else None
    if not isinstance(url, str):
        return None
    url = url.strip().encode(errors="backslashreplace").decode()[:MAX_URL_CHARS]
    try:
        parts = urlsplit(url)
        _, at, host = parts.netloc.rpartition("@")
    except ValueError:
        return url
    return (parts._replace(netloc=host).geturl() if at else url) or None
