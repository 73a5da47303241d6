"""The manifest: the one document between the blocks of tokens and training.

It names every shard with its digests and count, every tokenizer, every gap. A training run and every checkpoint carry
its digest, and the digest is what Dagster compares to say whether a model is stale.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from fourmill.core.digest import digest_json
from fourmill.core.modality import Modality, Resolutions
from fourmill.core.names import Split
from fourmill.core.store import Store


class ModalityEntry(BaseModel):
    """One modality of the training set; mirrors `core.modality.Modality`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["pixels", "tokens", "text"]
    folder: str
    ext: str
    grid: int
    vocab_size: int | None
    tokenizer: str | None = Field(description="Digest of the tokenizer that made the tokens; None for pixels.")


class ShardEntry(BaseModel):
    """One shard number: the same keys in the same order in every folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shard: int
    count: int
    tars: dict[str, str] = Field(description="sha256 of the tar, by folder.")


class Manifest(BaseModel):
    """A complete, aligned training set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    dataset: str
    input_px: int = Field(description="Side of the crops of the base resolution.")
    patch_px: int
    source_digest: str
    modalities: dict[str, ModalityEntry]
    text_tokenizer: str = Field(description="Store path of the WordPiece file (tokenizer.json).")
    splits: dict[Split, list[ShardEntry]]
    rows: int = Field(description="Rows of the list that the blocks cover.")
    missing: dict[str, int] = Field(description="Rows that are in no tar, by status and stage.")

    @property
    def digest(self) -> str:
        """Digest of everything in the manifest."""
        return digest_json(self.model_dump(mode="json"))

    def num_samples(self, split: Split) -> int:
        """Samples of a split."""
        return sum(entry.count for entry in self.splits[split])

    def modality(self, name: str) -> Modality:
        """The modality as the model sees it. Raises KeyError."""
        entry = self.modalities[name]
        return Modality(name, entry.kind, entry.folder, entry.ext, entry.grid, entry.vocab_size)

    def at(self, resolutions: Resolutions) -> list[Modality]:
        """The texts, and the images of the base resolution alone (`input_px`) or of both."""
        found = [self.modality(name) for name in self.modalities]
        return [m for m in found if resolutions == "both" or m.px in (None, self.input_px)]


def manifest_path(dataset: str, digest: str) -> str:
    """Where a manifest is kept; never rewritten with other content."""
    return f"{dataset}/manifests/{digest}.json"


def write_manifest(store: Store, manifest: Manifest) -> str:
    """Publish a manifest under its digest and return its path."""
    path = manifest_path(manifest.dataset, manifest.digest)
    store.write(path, manifest.model_dump_json(indent=1).encode())
    return path


def read_manifest(store: Store, path: str) -> Manifest:
    """Read a manifest. Raises FileNotFoundError, and ValueError when its content is not a manifest."""
    return Manifest.model_validate_json(store.read(path))
