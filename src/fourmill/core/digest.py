"""Digests of content: what data versions, receipts and manifests are made of. Never of time, host or path."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]


def digest_bytes(data: bytes) -> str:
    """sha256 of the bytes, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """sha256 of a file of any size, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_json(value: Json) -> str:
    """sha256 of the canonical JSON text (sorted keys, no spaces)."""
    return digest_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())


def digest_config(config: BaseModel, exclude: set[str] | None = None) -> str:
    """Digest of a config's values; `exclude` names fields that cannot change the result (worker counts, addresses)."""
    return digest_json(config.model_dump(mode="json", exclude=exclude))
