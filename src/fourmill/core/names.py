"""Sample keys, shards, blocks and splits: how a row of the list is addressed everywhere else.

A sample key is the row number in the list, so it never changes; a shard is a run of consecutive rows, a block a run of
consecutive shards. A dead URL leaves a gap and nothing is renumbered.
"""

import hashlib
from typing import Annotated, Literal, NewType

from pydantic import BaseModel, ConfigDict, Field

SampleKey = NewType("SampleKey", str)
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")

MAX_BLOCKS = 99  # Dagster stops comparing data versions across an edge with 100 or more upstream partitions


def sample_key(row: int) -> SampleKey:
    """The key of row `row` (0-based): nine digits, no dots, so it can be a tar member's name.

    Raises:
        ValueError: the row does not fit nine digits.
    """
    if not 0 <= row < 10**9:
        raise ValueError(f"row {row} has no sample key: keys hold rows 0 <= row < 1000000000")
    return SampleKey(f"{row:09d}")


def row_of(key: SampleKey) -> int:
    """The row number behind a key."""
    return int(key)


def shard_name(shard: int) -> str:
    """`shard-00012`: the same for every modality, so that equal names hold equal samples."""
    return f"shard-{shard:05d}"


def split_of(url: str, val_fraction: float) -> Split:
    """Validation when a stable hash of the URL says so, so that a rebuilt list keeps its split.

    Args:
        val_fraction: share of URLs that go to validation, 0..1.
    """
    bucket = int.from_bytes(hashlib.sha256(url.encode()).digest()[:8], "big") / 2**64
    return "val" if bucket < val_fraction else "train"


class Layout(BaseModel):
    """How rows become shards and shards become blocks (the Dagster partitions)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows_per_shard: Annotated[int, Field(gt=0, description="Consecutive rows of the list in one shard.")] = 1000
    shards_per_block: Annotated[int, Field(gt=0, description="Consecutive shards in one block.")] = 200
    num_blocks: Annotated[int, Field(gt=0, le=MAX_BLOCKS, description="Blocks; fewer than 100, see ADR 0002.")]

    @property
    def num_rows(self) -> int:
        """Rows that the blocks can hold; a list may be shorter, never longer."""
        return self.rows_per_shard * self.shards_per_block * self.num_blocks

    def block_keys(self) -> list[str]:
        """`block_00`, `block_01`, ...: the partition keys, in order."""
        return [f"block_{i:02d}" for i in range(self.num_blocks)]

    def shards_of(self, block: str) -> range:
        """Shard numbers of a block.

        Raises:
            ValueError: no such block.
        """
        keys = self.block_keys()
        if block not in keys:
            raise ValueError(f"no block {block!r}: this project has {keys[0]}..{keys[-1]}")
        first = keys.index(block) * self.shards_per_block
        return range(first, first + self.shards_per_block)

    def rows_of(self, shard: int) -> range:
        """Row numbers of a shard, whether or not the list reaches that far."""
        first = shard * self.rows_per_shard
        return range(first, first + self.rows_per_shard)

    def block_of_row(self, row: int) -> str:
        """The block that a row sits in."""
        return self.block_keys()[row // (self.rows_per_shard * self.shards_per_block)]
