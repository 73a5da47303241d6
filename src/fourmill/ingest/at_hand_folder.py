"""A folder tree as a source: every picture below the root is a row, in the order of their paths."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pyarrow as pa

from fourmill.ingest.at_hand import IMAGE_ENDINGS, AtHandError, ending, file_address, open_inside, walk
from fourmill.ingest.at_hand_captions import (
    MAX_CAPTION_BYTES,
    CaptionError,
    class_captions,
    json_caption,
    text_caption,
)
from fourmill.ingest.config import SourceConfig
from fourmill.ingest.listing import BATCH_ROWS, at_hand_rows

_LINKED_FOLDER = "a link to a folder, which is not entered; give that folder as a dataset's root"
_Captioner = Callable[[str], bytes]  # from a picture's path below the root; raises CaptionError


def read_folder(config: SourceConfig) -> Iterator[pa.RecordBatch]:
    """Rows of a folder tree: ImageNet's layout with captions by class, or pictures with a text or JSON beside them.

    A file is a picture by its ending; other files are no rows. A link is a row: a bad one when it leads out of the root
    or to a folder, since no folder behind a link is entered. The class of a picture is the folder that it lies in.

    Raises:
        ValueError: the root, a folder in it or the file of class names cannot be read.
    """
    root = Path(config.root)
    caption_of = _captioner(root, config)
    batch: list[tuple[str, bytes, str, str | None]] = []
    for entry in walk(root):
        relative = os.path.relpath(entry.path, root)
        fault = _link_fault(root, relative, entry) if entry.is_symlink() else None
        if ending(entry.name) not in IMAGE_ENDINGS and fault != _LINKED_FOLDER:
            continue
        caption = b""
        try:
            caption = caption_of(relative)
        except CaptionError as error:
            fault = fault or str(error)
        batch.append((file_address(relative), caption, PurePosixPath(relative).parent.name, fault))
        if len(batch) == BATCH_ROWS:
            yield _rows(batch)
            batch = []
    if batch:
        yield _rows(batch)


def _rows(batch: list[tuple[str, bytes, str, str | None]]) -> pa.RecordBatch:
    urls, captions, places, faults = zip(*batch, strict=True)
    shown = [os.fsencode(place).decode(errors="backslashreplace") for place in places]
    return at_hand_rows(urls, captions, shown, {row: fault for row, fault in enumerate(faults) if fault})


def _link_fault(root: Path, relative: str, entry: os.DirEntry[str]) -> str | None:
    try:
        if entry.is_dir():
            return _LINKED_FOLDER
        open_inside(root, relative).close()
    except AtHandError as error:
        return error.reason
    except OSError as error:  # links that lead in a circle
        return f"a link that leads nowhere ({error.strerror})"
    return None


def _captioner(root: Path, config: SourceConfig) -> _Captioner:
    if config.captions == "none":
        return lambda relative: b""
    if config.captions in ("txt", "json"):
        suffix, read = f".{config.captions}", text_caption if config.captions == "txt" else json_caption
        return lambda relative: read(_beside(root, relative, suffix))
    by_class = class_captions(config)

    def caption(relative: str) -> bytes:
        folder = PurePosixPath(relative).parent.name
        if not folder:
            raise CaptionError(
                "it lies in no class folder; move it into one, or set captions to 'txt', 'json' or 'none'"
            )
        return by_class(folder)

    return caption


def _beside(root: Path, relative: str, suffix: str) -> bytes:
    path = PurePosixPath(relative).with_suffix(suffix)
    try:
        with open_inside(root, str(path)) as file:
            data = file.read(MAX_CAPTION_BYTES + 1)
    except AtHandError as error:
        raise CaptionError(f"no caption: {error.reason}") from error
    if len(data) > MAX_CAPTION_BYTES:
        raise CaptionError(f"no caption: {path.name!r} is over {MAX_CAPTION_BYTES} bytes")
    return data
