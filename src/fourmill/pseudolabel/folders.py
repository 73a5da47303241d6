"""Whether a folder of weights can be what a labeller wants, as far as names and its config.json tell. No torch, nothing is loaded."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fourmill.pseudolabel.stored import CONFIG_FILE, WEIGHTS_FILE

TRANSFORMERS_FILES = (
    WEIGHTS_FILE,
    f"{WEIGHTS_FILE}.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Any one of them is the weights of a folder that transformers loads."""


def folder_problem(folder: Path, model_types: Sequence[str], weight_files: Sequence[str]) -> str | None:
    """What is wrong with a folder, in words that `at FOLDER` can follow; None: nothing that can be seen without loading it.

    Args:
        model_types: what config.json may say; any, where there are none.
        weight_files: names of which one must be there; an index with every file that it names.
    """
    if not folder.is_dir():
        return "a file" if folder.is_file() else "nothing"
    facts = read_facts(folder)
    if facts is None:
        return f"a folder without {'a readable ' if (folder / CONFIG_FILE).exists() else ''}{CONFIG_FILE}"
    if model_types and facts.get("model_type") not in model_types:
        return f"a network of model_type {facts.get('model_type')!r}"
    if not any(_is_whole(folder / name) for name in weight_files):
        return "a folder without weights"
    return None


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What a folder's config.json says; None where there is none, or what it holds is no object."""
    return _object(folder / CONFIG_FILE)


def facts_in(data: bytes) -> dict[str, Any] | None:
    """What the bytes of a config.json say; None where they are no object."""
    try:
        found = json.loads(data)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _is_whole(path: Path) -> bool:
    if not path.name.endswith(".index.json"):
        return path.is_file()
    named = (_object(path) or {}).get("weight_map")
    if not isinstance(named, dict) or not named:
        return False
    return all((path.parent / str(name)).is_file() for name in set(map(str, named.values())))


def _object(path: Path) -> dict[str, Any] | None:
    try:
        return facts_in(path.read_bytes())
    except OSError:
        return None
