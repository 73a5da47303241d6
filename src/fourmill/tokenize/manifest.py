"""Building the manifest: reads every aligned shard's receipts and refuses what must not be trained on."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fourmill.core.ledger import read_ledger
from fourmill.core.manifest import Manifest, ModalityEntry, ShardEntry
from fourmill.core.modality import CROPS, IMAGES, Modality
from fourmill.core.names import SPLITS, Layout, Split
from fourmill.core.shards import Receipt, Recipe, ShardPlace, need
from fourmill.core.store import Store
from fourmill.tokenize.align import FOLDER, source_asset, source_folders, token_folder
from fourmill.tokenize.freshness import StaleLabelsError, check_fresh
from fourmill.tokenize.worker import asset_of, label_of, source_folder


class ManifestError(ValueError):
    """Shards that do not make a training set together."""


def build_manifest(
    store: Store,
    dataset: str,
    layout: Layout,
    blocks: Iterable[str],
    table: Mapping[str, Modality],
    tokenizers: Mapping[str, str],
    text_tokenizer: str,
    input_px: int,
    patch_px: int,
    source_digest: str,
) -> Manifest:
    """The manifest of all aligned shards of the blocks.

    Args:
        table: modalities by name.
        tokenizers: digest of the tokenizer of each modality; pixels have none.
        text_tokenizer: store path of tokenizer.json.
        input_px: side of the crops of the base resolution.

    Raises:
        ManifestError: tokens of two tokenizers, or made with unlike settings, in one modality; a shard aligned from other tokens
            or images than there are now, or made of other labels; a block without a ledger; or no training sample, or no
            block, at all.
        MissingShardError: an aligned shard is not there.
    """
    blocks = list(blocks)
    if not blocks:
        raise ManifestError(f"a manifest of no block of {dataset}, expected at least one of {layout.num_blocks}")
    splits: dict[Split, list[ShardEntry]] = {}
    settings: dict[str, _Settings] = {}
    for split in SPLITS:
        shards = [shard for block in blocks for shard in layout.shards_of(block)]
        receipts = (_Receipts(store, dataset, split, shard, input_px) for shard in shards)
        entries = [_entry(of_shard, table, tokenizers, settings) for of_shard in receipts]
        splits[split] = [entry for entry in entries if entry.count]
    if not splits["train"]:
        raise ManifestError(f"{dataset} has no training sample in blocks {blocks[0]}..{blocks[-1]}; see the ledgers")
    missing = _missing(store, dataset, blocks)
    return Manifest(
        dataset=dataset,
        input_px=input_px,
        patch_px=patch_px,
        source_digest=source_digest,
        modalities={
            m.name: ModalityEntry(
                kind=m.kind,
                folder=m.folder,
                ext=m.ext,
                grid=m.grid,
                vocab_size=m.vocab_size,
                tokenizer=tokenizers.get(m.name),
            )
            for m in table.values()
        },
        text_tokenizer=text_tokenizer,
        splits=splits,
        rows=sum(missing.values()) + sum(entry.count for entries in splits.values() for entry in entries),
        missing=missing,
    )


@dataclass(frozen=True)
class _Settings:
    """How the tokens of a modality were made, by the first shard that was looked at."""

    digests: tuple[str, ...]
    shard: int


class _Receipts:
    """The receipts of all folders of one shard, each read once: a manifest takes some twenty for each of thousands of shards."""

    def __init__(self, store: Store, dataset: str, split: Split, shard: int, input_px: int) -> None:
        self._store, self.dataset, self.shard, self._input_px = store, dataset, shard, input_px
        self.split: Split = split
        self._read: dict[str, Receipt] = {}

    def place(self, folder: str) -> ShardPlace:
        """Where the shard of a folder is."""
        return ShardPlace(self.dataset, self.split, folder, self.shard)

    def asset(self, public: str) -> str:
        """The asset that makes what a public folder is copied from."""
        return source_asset(self.dataset, public, self._input_px)

    def of(self, folder: str, asset: str) -> Receipt:
        """A folder's, made by an asset. Raises MissingShardError."""
        if folder not in self._read:
            self._read[folder] = need(self._store, self.place(folder), asset)
        return self._read[folder]


def _entry(
    receipts: _Receipts, table: Mapping[str, Modality], tokenizers: Mapping[str, str], settings: dict[str, _Settings]
) -> ShardEntry:
    split, shard = receipts.split, receipts.shard
    aligned = receipts.of(FOLDER, "tokens/shards")
    tars: dict[str, str] = {}
    for folder in [*(m.folder for m in table.values()), CROPS]:
        receipt = receipts.of(folder, "tokens/shards")
        if receipt.num_ok != aligned.num_ok:
            raise ManifestError(
                f"{split} {folder} shard {shard:05d} holds {receipt.num_ok} samples, not {aligned.num_ok}"
            )
        if receipt.tar_sha256 is not None:
            tars[folder] = receipt.tar_sha256
    for modality, digest in tokenizers.items():
        asset = receipts.asset(modality)
        made_by = receipts.of(token_folder(modality), asset).recipe
        if made_by.weights != digest:
            raise ManifestError(
                f"{split} {modality} shard {shard:05d} was made by tokenizer {made_by.weights[:12]}, the current one is "
                f"{digest[:12]}: materialize {asset} and tokens/shards for its block again"
            )
        _check_alike(modality, made_by, receipts, settings)
        _check_label(modality, made_by, receipts)
    texts_and_tokens = [m.name for m in table.values() if m.kind != "pixels"]
    _check_fresh(aligned, receipts, source_folders(texts_and_tokens))
    return ShardEntry(shard=shard, count=aligned.num_ok, tars=tars)


def _check_alike(modality: str, made_by: Recipe, receipts: _Receipts, settings: dict[str, _Settings]) -> None:
    """One side, precision, CLIP network and choice of crops in a modality, as there is one tokenizer."""
    found = (made_by.config, made_by.inputs.get(CROPS, ""))
    first = settings.setdefault(modality, _Settings(found, receipts.shard))
    if found != first.digests:
        raise ManifestError(
            f"{receipts.split} {modality} shard {receipts.shard:05d} was made with other settings (crops, precision, side or CLIP's "
            f"weights) than shard {first.shard:05d}: materialize {receipts.asset(modality)} and tokens/shards for the older one's "
            "block again"
        )


def _check_label(modality: str, made_by: Recipe, receipts: _Receipts) -> None:
    """Tokens are of the labels there are now, and these of the images there are now: of one picture, whatever was made again."""
    label = label_of(modality)
    folder, asset = source_folder(label), asset_of(receipts.dataset, label)
    labels, images = receipts.of(folder, asset), receipts.of(IMAGES, f"{receipts.dataset}/images")
    try:
        check_fresh(receipts.place(folder), asset, labels, images)
    except StaleLabelsError as error:
        raise ManifestError(f"{error}, and then {receipts.asset(modality)} and tokens/shards") from error
    then, now = made_by.inputs.get(folder), labels.content
    if then != now:
        raise ManifestError(
            f"{receipts.split} {modality} shard {receipts.shard:05d} was made of {asset} {(then or 'nothing')[:12]}, which is "
            f"{now[:12]} now; materialize {receipts.asset(modality)} and tokens/shards for its block again"
        )


def _check_fresh(aligned: Receipt, receipts: _Receipts, folders: Mapping[str, str]) -> None:
    """Training reads the aligned tars: they must be of what their sources hold now, not of what these held once."""
    for public, folder in folders.items():
        asset = receipts.asset(public)
        now, then = receipts.of(folder, asset).content, aligned.recipe.inputs.get(folder)
        if then != now:
            raise ManifestError(
                f"{receipts.split} aligned shard {receipts.shard:05d} of {receipts.dataset} is stale: it was made of {asset} "
                f"{(then or 'nothing')[:12]}, which is {now[:12]} now; materialize tokens/shards for its block again"
            )


def _missing(store: Store, dataset: str, blocks: list[str]) -> dict[str, int]:
    """Rows of the list that reached no tar, by what became of them."""
    counts: Counter[str] = Counter()
    for split in SPLITS:
        for block in blocks:
            for folder in (IMAGES, FOLDER):
                counts.update(_statuses(store, dataset, split, folder, block))
    return {status: n for status, n in sorted(counts.items()) if status != "ok"}


def _statuses(store: Store, dataset: str, split: Split, folder: str, block: str) -> list[str]:
    try:
        return read_ledger(store, dataset, split, folder, block)["status"].to_pylist()
    except FileNotFoundError as error:
        asset = "tokens/shards" if folder == FOLDER else f"{dataset}/images"
        raise ManifestError(
            f"{asset} has no {split} ledger for {block}: it was not materialized, or its checks failed. "
            f"Materialize {asset} for {block} and look at its checks"
        ) from error
