"""Aligned shards: the same keys in the same order in every folder, as the public 4M's loader demands.

A sample that one modality lacks (a label network rejected it, a caption did not encode) is dropped from all of them
here, with the missing modality as its reason. The folders are the public layout: `rgb`, `caption`, `det`,
`crop_settings` and one `tok_*` a tokenizer. Where nothing is dropped, a tar is linked rather than written again.
"""

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from fourmill.core.crops import CropConfig
from fourmill.core.digest import digest_json
from fourmill.core.modality import CROPS, IMAGES, tokens_asset
from fourmill.core.names import SampleKey, Split
from fourmill.core.shards import (
    Item,
    Receipt,
    Recipe,
    ShardPlace,
    gone,
    need,
    needed_members,
    read_rows,
    write_receipt,
    write_shard,
)
from fourmill.core.store import Store, open_store
from fourmill.core.work import ShardJob
from fourmill.tokenize.crop_settings import crop_settings

VERSION = "1"
# Digest of the shard's tars, so that the ledger's digest is of their content.
_EXTRA = pa.schema([("tars", pa.string())])
FOLDER = "_aligned"  # holds receipts and rows only; the tars are in the public folders


def token_folder(modality: str) -> str:
    """Where a modality's tokens wait to be aligned."""
    return f"_tokens/{modality}"


def source_folders(modalities: Sequence[str]) -> dict[str, str]:
    """Public folder -> folder it is made from, for all that is copied (crop settings are those that the tokens were made by)."""
    return {"rgb": IMAGES, **{name: token_folder(name) for name in modalities}}


def public_folders(modalities: Sequence[str]) -> list[str]:
    """All folders of an aligned shard."""
    return [*source_folders(modalities), CROPS]


def source_asset(dataset: str, public: str, base_px: int) -> str:
    """The asset that makes what a public folder is copied from.

    Args:
        base_px: side of the crops of the base resolution, whose tokens' assets have no size in their names.
    """
    return f"{dataset}/images" if public == "rgb" else tokens_asset(public, base_px)


def align_recipe(
    store: Store,
    dataset: str,
    split: Split,
    shard: int,
    modalities: Sequence[str],
    base_px: int,
    crops: CropConfig | None = None,
) -> Recipe:
    """The recipe of one aligned shard.

    Raises:
        MissingShardError: a modality of the shard is not there.
    """
    inputs = {CROPS: crops.digest} if crops and crops.digest else {}
    for public, folder in source_folders(modalities).items():
        inputs[folder] = need(
            store, ShardPlace(dataset, split, folder, shard), source_asset(dataset, public, base_px)
        ).content
    return Recipe(stage="align", code_version=VERSION, inputs=inputs)


class AlignWorker:
    """Makes the aligned tars of one shard and split."""

    def __init__(
        self, store_root: str, dataset: str, modalities: Sequence[str], base_px: int, crops: CropConfig | None = None
    ) -> None:
        self._store = open_store(store_root)
        self._crops = crops or CropConfig()
        self._dataset, self._base_px = dataset, base_px
        self._modalities = tuple(modalities)

    def run(self, job: ShardJob) -> Receipt:
        """Publish every folder of the shard, then the receipt that makes it done.

        Raises:
            ValueError: tokens of other crops than the others'.
            MissingShardError: a tar that is to be aligned is not there.
            TarError: one is damaged.
        """
        self._check_crops(job)
        folders = source_folders(self._modalities)
        places = {folder: ShardPlace(self._dataset, job.split, folder, job.shard) for folder in folders.values()}
        ok = {folder: _ok_keys(self._store, place) for folder, place in places.items()}
        keys = sorted(set.intersection(*(set(k) for k in ok.values())))
        for public, folder in folders.items():
            target = ShardPlace(self._dataset, job.split, public, job.shard)
            if ok[folder] == keys:
                self._link(places[folder], target, job)
            else:
                self._rewrite(places[folder], target, keys, job)
        self._write_crops(keys, job)
        place = ShardPlace(self._dataset, job.split, FOLDER, job.shard)
        tars = self._digest_of_tars(public_folders(self._modalities), job)
        sets = {folder: set(found) for folder, found in ok.items()}
        rows = [_aligned_item(key, sets, tars) for key in ok[IMAGES]]
        return write_shard(self._store, place, job.recipe, rows, job.run_id, _EXTRA)

    def _check_crops(self, job: ShardJob) -> None:
        for modality in self._modalities:
            if not modality.startswith("tok_"):
                continue
            place = ShardPlace(self._dataset, job.split, token_folder(modality), job.shard)
            if need(self._store, place, self._asset(modality)).recipe.inputs.get(CROPS, "") != self._crops.digest:
                raise ValueError(
                    f"{modality} of {place.tar} was made of other crops than the project's {self._crops.num}: "
                    f"materialize {self._asset(modality)} for its block again"
                )

    def _asset(self, public: str) -> str:
        return source_asset(self._dataset, public, self._base_px)

    def _digest_of_tars(self, folders: Sequence[str], job: ShardJob) -> str:
        places = [ShardPlace(self._dataset, job.split, folder, job.shard) for folder in folders]
        return digest_json([need(self._store, place, "tokens/shards").tar_sha256 for place in places])

    def _link(self, source: ShardPlace, target: ShardPlace, job: ShardJob) -> None:
        receipt = need(self._store, source, self._asset(target.folder))
        self._store.delete(target.receipt)  # a kill from here on leaves no old receipt beside a new tar
        if receipt.tar_sha256 is None:
            self._store.delete(target.tar)
        else:
            try:
                self._store.copy(source.tar, target.tar)
            except FileNotFoundError as error:
                raise gone(source, self._asset(target.folder)) from error
        self._store.copy(source.rows, target.rows)
        write_receipt(self._store, target, receipt.model_copy(update={"recipe": job.recipe, "run_id": job.run_id}))

    def _rewrite(self, source: ShardPlace, target: ShardPlace, keys: list[SampleKey], job: ShardJob) -> None:
        wanted = set(keys)
        ext = _member_ext(source.folder)
        members = needed_members(self._store, source, self._asset(target.folder))
        items = (Item(k, ext=ext, data=data) for k, data in members if k in wanted)
        write_shard(self._store, target, job.recipe, items, job.run_id)

    def _write_crops(self, keys: list[SampleKey], job: ShardJob) -> None:
        target = ShardPlace(self._dataset, job.split, CROPS, job.shard)
        rows_of = crop_settings(self._store, target, self._crops)
        items = (Item(key, ext="npy", data=_npy(np.array(rows_of[key], np.int64))) for key in keys)
        write_shard(self._store, target, job.recipe, items, job.run_id)


def _ok_keys(store: Store, place: ShardPlace) -> list[SampleKey]:
    rows = read_rows(store, place)
    return [SampleKey(k) for k, s in zip(rows["key"].to_pylist(), rows["status"].to_pylist(), strict=True) if s == "ok"]


def _aligned_item(key: SampleKey, ok: dict[str, set[SampleKey]], tars: str) -> Item:
    lacking = [folder.removeprefix("_tokens/") for folder, keys in ok.items() if key not in keys]
    if not lacking:
        return Item(key, extra={"tars": tars})
    return Item(key, status=f"no_{lacking[0]}", reason=f"missing in {', '.join(lacking)}", extra={"tars": tars})


def _member_ext(folder: str) -> str:
    name = folder.removeprefix("_tokens/")
    return {IMAGES: "jpg", "caption": "txt", "det": "json"}.get(name, "npy")


def _npy(array: np.ndarray) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=False)
    return sink.getvalue()
