"""Lineage: from a checkpoint back to manifest, tokenizers, label networks, list and URL; and from a sample forward."""

from collections.abc import Mapping
from typing import Any

from fourmill.core.ledger import ledger_path
from fourmill.core.manifest import Manifest, read_manifest
from fourmill.core.modality import IMAGE_TOKENS, IMAGES
from fourmill.core.names import SPLITS, Split, row_of, sample_key, shard_name
from fourmill.core.shards import Receipt, ShardPlace, read_receipt, read_rows
from fourmill.core.store import Store
from fourmill.pseudolabel.members import label_format
from fourmill.runtime.models import FOURM_ASSETS, ModelMissingError, ModelRef, current
from fourmill.runtime.session import Session
from fourmill.tokenize.align import FOLDER as ALIGNED

Tree = dict[str, Any]


class TraceError(ValueError):
    """Nothing by that name."""


def trace_anything(session: Session, what: str, sample: str | None = None) -> Tree:
    """The lineage of a model (name or digest) or of a sample (its row number, also without leading zeros).

    Args:
        sample: with a model, follow this sample too; the first training sample otherwise.

    Raises:
        TraceError: neither a model nor a sample of this project.
    """
    if what.isdecimal() and len(what) == 9:
        return trace_sample(session, what)
    for name, asset in FOURM_ASSETS.items():
        try:
            ref = current(session.store, session.project.dataset, name, asset)
        except ModelMissingError:
            if what == name:
                raise
            continue
        if what == name or (len(what) >= 6 and ref.digest.startswith(what)):
            return trace_model(session, ref, sample)
    if what.isdecimal():  # after the models: a digest may begin with digits
        return trace_sample(session, what)
    raise TraceError(
        f"{what!r} is neither a model of this project ({', '.join(FOURM_ASSETS)}, or a digest) nor a sample, which is given by "
        "its row number in the list"
    )


def trace_model(session: Session, ref: ModelRef, sample: str | None) -> Tree:
    """Checkpoint -> manifest -> tokenizers, shards -> list -> one sample's URL."""
    store, dataset = session.store, session.project.dataset
    manifest = read_manifest(store, ref.report["manifest"])
    shards = manifest.splits["train"]
    sample = _first_sample(store, dataset, shards[0].shard) if sample is None else _key_of(sample)
    return {
        ref.name: {"digest": ref.digest, "path": ref.path, "steps": ref.report["steps"], "seed": ref.report["seed"]},
        "shards consumed": ref.report["consumed"],
        "manifest": {
            "digest": manifest.digest,
            "path": ref.report["manifest"],
            "train samples": manifest.num_samples("train"),
            "shards": f"{shard_name(shards[0].shard)} .. {shard_name(shards[-1].shard)}",
        },
        "tokenizers": {name: _tokenizer(store, dataset, name, manifest) for name in (*IMAGE_TOKENS, "text")},
        "list": {"digest": manifest.source_digest, "path": session.project.source.where},
        f"sample {sample}": trace_sample(session, sample),
    }


def _first_sample(store: Store, dataset: str, shard: int) -> str:
    rows = read_rows(store, ShardPlace(dataset, "train", ALIGNED, shard)).to_pylist()
    return next(row["key"] for row in rows if row["status"] == "ok")


def _key_of(sample: str) -> str:
    if not sample.isdecimal():
        raise TraceError(f"{sample!r} is no sample: give its row number in the list, as in 000000123 or 123")
    return sample_key(int(sample))


def _tokenizer(store: Store, dataset: str, name: str, manifest: Manifest) -> Tree:
    names = [n for n, entry in manifest.modalities.items() if n == name or n.startswith(f"tok_{name}@")]
    digest = manifest.modalities[names[0]].tokenizer if names else manifest.modalities["caption"].tokenizer
    ref = current(store, dataset, name, f"tokenizers/{name}")
    if ref.digest != digest:
        return {"digest": digest, "note": "another tokenizer serves by now"}
    fitted_on = {"train set": ref.report["train_set"]} if "train_set" in ref.report else {}  # text's are captions
    return {"digest": digest, "path": ref.path, **fitted_on}


def trace_sample(session: Session, key: str) -> Tree:
    """One row of the list through every stage: its URL, what became of it, and by which network.

    Raises:
        TraceError: the project has no such row, or has not come to it yet.
    """
    project, store = session.project, session.store
    key = sample_key(int(key))
    row = row_of(key)
    if row >= project.layout.num_rows:
        raise TraceError(f"row {row} is beyond this project's {project.layout.num_rows} rows")
    shard = row // project.layout.rows_per_shard
    for split in SPLITS:
        images = _row(store, ShardPlace(project.dataset, split, IMAGES, shard), key)
        if images is not None:
            return {
                "url": images["url"],
                "caption": images["caption"],
                "row": row,
                "split": split,
                "shard": shard_name(shard),
                "block": project.layout.block_of_row(row),
                "images": _stage(store, project.dataset, split, IMAGES, shard, key),
                **{
                    f"labels/{label}": _stage(store, project.dataset, split, label_format(label).folder, shard, key)
                    for label in project.stored_labels()
                },
                **{
                    f"tokens/{name}": _stage(store, project.dataset, split, f"_tokens/{name}", shard, key)
                    for name in project.modalities()
                    if not name.startswith("rgb@")
                },
                "tokens/shards": _stage(store, project.dataset, split, ALIGNED, shard, key),
                "ledger": ledger_path(project.dataset, split, ALIGNED, project.layout.block_of_row(row)),
            }
    raise TraceError(
        f"no sample {key} in {shard_name(shard)}: its block {project.layout.block_of_row(row)} is not downloaded yet"
    )


def _row(store: Store, place: ShardPlace, key: str) -> Mapping[str, Any] | None:
    if not store.exists(place.rows):
        return None
    rows = read_rows(store, place)
    keys = rows["key"].to_pylist()
    return rows.slice(keys.index(key), 1).to_pylist()[0] if key in keys else None


def _stage(store: Store, dataset: str, split: Split, folder: str, shard: int, key: str) -> Tree:
    place = ShardPlace(dataset, split, folder, shard)
    row, receipt = _row(store, place, key), read_receipt(store, place)
    if row is None or receipt is None:
        return {"status": "not there"}
    said = {"status": row["status"], **({"reason": row["reason"]} if row["reason"] else {})}
    return {**said, **({"sha256": row["digest"]} if row["digest"] else {}), **_made_by(receipt)}


def _made_by(receipt: Receipt) -> Tree:
    recipe = receipt.recipe
    weights = {"weights": recipe.weights} if recipe.weights else {}
    tar = {"tar": receipt.tar_sha256} if receipt.tar_sha256 else {}
    return {**weights, "code": recipe.code_version, "run": receipt.run_id, **tar}
