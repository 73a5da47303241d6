"""Captions of pictures at hand: from the class folder they lie in, or from the text or JSON beside them."""

import json
from collections.abc import Callable
from pathlib import Path

from fourmill.ingest.config import SourceConfig

MAX_CAPTION_BYTES = 1024**2  # of a text or JSON file
_MAX_NAMES_BYTES = 16 * 1024**2


class CaptionError(ValueError):
    """A picture without a caption; the message is its row's reason."""


def class_captions(config: SourceConfig) -> Callable[[str], bytes]:
    """Caption by name of the class folder, raising CaptionError for a folder that the names' file does not know.

    Raises:
        ValueError: the names' file cannot be read.
    """
    names = read_class_names(Path(config.class_names)) if config.class_names else None

    def caption(folder: str) -> bytes:
        if names is not None and folder not in names:
            raise CaptionError(f"class {folder!r} is not in {config.class_names}")
        name = names[folder] if names is not None else folder.replace("_", " ").strip()
        return config.caption_template.replace("{name}", name).encode(errors="surrogateescape")

    return caption


def read_class_names(path: Path) -> dict[str, str]:
    """Class folder to name.

    Lines of `n01440764 tench, Tinca tinca` (a space or tab between), or JSON: an object of such pairs, or ImageNet's
    index (`{"0": ["n01440764", "tench"]}`). Of several names the first counts.

    Raises:
        ValueError: it is missing, too long, or neither.
    """
    try:
        if path.stat().st_size > _MAX_NAMES_BYTES:
            raise ValueError(f"class_names {str(path)!r} is over {_MAX_NAMES_BYTES} bytes; give one line a class")
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"class_names {str(path)!r} cannot be read ({error}); give one line a class") from error
    pairs = _json_pairs(text, path) if text.lstrip().startswith("{") else _line_pairs(text, path)
    return {folder: name.split(",")[0].strip().replace("_", " ") for folder, name in pairs}


def text_caption(data: bytes) -> bytes:
    """Caption of a `.txt` member or file: all of it."""
    return data


def json_caption(data: bytes) -> bytes:
    """Caption of a `.json` member or file: its `caption`, as img2dataset writes it.

    Raises:
        CaptionError: not JSON, or no caption in it.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CaptionError("no caption: its JSON cannot be read") from error
    caption = found.get("caption") if isinstance(found, dict) else None
    if not isinstance(caption, str):
        raise CaptionError("no caption: its JSON has none")
    return caption.encode(errors="backslashreplace")


def _line_pairs(text: str, path: Path) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        folder, *name = line.split(maxsplit=1)[:2] or [""]
        if folder and not name:
            raise ValueError(f"class_names {str(path)!r}, line {number}: {line[:80]!r}, expected `folder name`")
        if folder:
            pairs.append((folder, name[0]))
    return pairs


def _json_pairs(text: str, path: Path) -> list[tuple[str, str]]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"class_names {str(path)!r} is not JSON ({error}); give one line a class") from error
    pairs = [tuple(value) if isinstance(value, list) else (key, value) for key, value in found.items()]
    if not all(len(pair) == 2 and all(isinstance(part, str) for part in pair) for pair in pairs):
        raise ValueError(f"class_names {str(path)!r}: expected an object of folder to name; give one line a class")
    return pairs
