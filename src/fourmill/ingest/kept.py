"""What an earlier run left of a shard of images, and how much of it may stay when the shard is made again.

The rows file names the recipe and, a row, the digest of its member in the tar; so each image proves itself, and it
does not matter whether the shard was done, or a kill fell between the files of its last rewrite (`core/shards.py`).
"""

from collections.abc import Generator
from typing import Any

from fourmill.core.digest import digest_bytes
from fourmill.core.names import SampleKey
from fourmill.core.shards import ROW_SCHEMA, Item, Recipe, ShardPlace, read_remembered
from fourmill.core.store import Store
from fourmill.core.tar import TarError, read_tar

EXT = "jpg"


class KeptShard:
    """Rows of an earlier run by key; no rows when there was none, or when its images became what they are otherwise."""

    def __init__(self, store: Store, place: ShardPlace, recipe: Recipe) -> None:
        """Look at what is there.

        Args:
            recipe: what the shard is to be made by now; other code or settings leave nothing to keep.
        """
        self.rows: dict[str, dict[str, Any]] = {}
        self.same_source = False
        self.has_tar = store.exists(place.tar)
        remembered = read_remembered(store, place)
        if remembered and _made_alike(remembered[0], recipe):
            self.rows = {row["key"]: row for row in remembered[1].to_pylist()}
            self.same_source = remembered[0].inputs.get("source") == recipe.inputs.get("source")


def item_of(row: dict[str, Any], data: bytes | None) -> Item:
    """A ledger's row as it goes into a shard again."""
    own = set(ROW_SCHEMA.names)
    extra = {name: value for name, value in row.items() if name not in own}
    return Item(SampleKey(row["key"]), row["status"], row["reason"], EXT, data, extra, row["digest"])


class Members:
    """The images in a shard's tar, asked for in key order; the tar is read once and one image held at a time."""

    def __init__(self, store: Store, place: ShardPlace) -> None:
        self._store, self._place = store, place
        self._members = self._read()
        self._next: tuple[str, bytes] | None = ("", b"")

    def take(self, key: str, digest: str | None) -> bytes | None:
        """The image of a row; None when it is not there, or not with this sha256."""
        while self._next is not None and self._next[0] < key:
            self._next = next(self._members, None)
        if self._next is None or self._next[0] != key or digest_bytes(self._next[1]) != digest:
            return None
        return self._next[1]

    @property
    def at_end(self) -> bool:
        """Whether the tar has nothing more to give."""
        return self._next is None

    def close(self) -> None:
        """Let go of the tar."""
        self._members.close()

    def _read(self) -> Generator[tuple[str, bytes]]:
        try:
            with self._store.open(self._place.tar) as stream:
                for key, _, data in read_tar(stream, self._place.tar):
                    yield key, data
        except (FileNotFoundError, TarError):
            return


def _made_alike(before: Recipe, now: Recipe) -> bool:
    return (before.stage, before.code_version, before.config) == (now.stage, now.code_version, now.config)
