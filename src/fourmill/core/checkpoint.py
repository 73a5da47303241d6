"""Checkpoints of a training on local disk (torch is imported here): whole or not at all, and only for the inputs they were made from."""

import logging
from pathlib import Path
from typing import Any

import torch

from fourmill.core.store import LocalStore

_log = logging.getLogger(__name__)
_FILE = "checkpoint.pt"


def save_checkpoint(folder: Path, input_digest: str, state: dict[str, Any]) -> None:
    """Replace the checkpoint of a run folder."""
    store = LocalStore(folder)
    store.sweep("", f"{_FILE}.")  # of a killed writer; a run folder has one writer at a time
    with store.create(_FILE) as file:
        torch.save({"input_digest": input_digest, **state}, file)


def load_checkpoint(folder: Path, input_digest: str) -> dict[str, Any] | None:
    """The state to go on from, or None: there is none, it is damaged, or it was made from other inputs."""
    path = folder / _FILE
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on a damaged file
        _log.warning("%s cannot be read (%s); training starts anew", path, error)
        return None
    if state.get("input_digest") != input_digest:
        _log.warning("%s was made from other inputs and is not used; training starts anew", path)
        return None
    return state


def drop_checkpoint(folder: Path) -> None:
    """Remove the checkpoint of a finished training."""
    (folder / _FILE).unlink(missing_ok=True)
