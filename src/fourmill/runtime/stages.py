"""The block stages: how each of them is run over a block, shard by shard, and when its ledger may be published.

A stage's ledger is written only after its checks have passed; the next stage asks for the ledger, so a bad block
cannot get past, in whichever run it is tried.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fourmill.core.digest import Json, digest_json
from fourmill.core.ledger import BlockReport, ledger_path, write_ledger
from fourmill.core.modality import LABELS
from fourmill.core.names import SPLITS, Split
from fourmill.core.shards import Recipe, ShardPlace, finished
from fourmill.core.work import ShardJob
from fourmill.ingest.duplicates import finish_block
from fourmill.ingest.worker import images_recipe
from fourmill.pseudolabel.config import config_digest, weights_digest
from fourmill.pseudolabel.worker import label_recipe
from fourmill.runtime.models import current
from fourmill.runtime.pool import run_shards
from fourmill.runtime.project import Project
from fourmill.runtime.session import Session
from fourmill.runtime.token_assets import token_assets
from fourmill.runtime.workers import token_modalities
from fourmill.tokenize.align import FOLDER as ALIGNED
from fourmill.tokenize.align import align_recipe, token_folder
from fourmill.tokenize.worker import token_recipe

LABEL_FOLDERS = {"depth": "depth", "normal": "normal", "semseg": "semseg", "det": "boxes"}


class BlockNotReadyError(ValueError):
    """An upstream block that is missing or did not pass its checks."""


@dataclass(frozen=True)
class BlockStage:
    """One stage over blocks of shards."""

    asset: str
    folder: str
    factory: str  # module:callable of the worker
    arguments: dict[str, Json]
    recipe: Callable[[Split, int], Recipe]
    needs: dict[str, str] = field(default_factory=dict)  # folder of an upstream ledger -> asset that writes it
    finish: Callable[[str], None] | None = None  # a pass over the block after its shards


def run_block(session: Session, stage: BlockStage, block: str) -> int:
    """Make the shards of a block that are not there yet; return how many were made.

    Raises:
        BlockNotReadyError: an upstream block has no ledger.
        ShardError: a worker failed.
    """
    project, store = session.project, session.store
    for folder, asset in stage.needs.items():
        for split in SPLITS:
            if not store.exists(ledger_path(project.dataset, split, folder, block)):
                raise BlockNotReadyError(
                    f"{stage.asset} {block}: {asset} has no ledger for {block}: it was not materialized, or its checks failed. "
                    f"Materialize {asset} for {block} and look at its checks"
                )
    jobs = list(_unfinished(session, stage, block))
    if jobs:
        withdraw_ledger(session, stage, block)
    run_shards(stage.factory, stage.arguments, jobs, project.ray, session.progress(f"{stage.asset} {block}"))
    if stage.finish:
        stage.finish(block)
    return len(jobs)


def _unfinished(session: Session, stage: BlockStage, block: str) -> Iterator[ShardJob]:
    for shard in session.project.layout.shards_of(block):
        for split in SPLITS:
            recipe = stage.recipe(split, shard)
            if not finished(session.store, ShardPlace(session.project.dataset, split, stage.folder, shard), recipe):
                yield ShardJob(split, shard, recipe, session.run_id)


def publish_ledger(session: Session, stage: BlockStage, block: str, shards_done: int) -> BlockReport:
    """Write the block's ledgers: from here on the next stage may read it."""
    project = session.project
    shards = project.layout.shards_of(block)
    return write_ledger(session.store, project.dataset, stage.folder, block, shards, stage.asset, shards_done)


def withdraw_ledger(session: Session, stage: BlockStage, block: str) -> None:
    """Take a block's ledgers away, so that nothing downstream reads a block that is being changed or is bad."""
    for split in SPLITS:
        session.store.delete(ledger_path(session.project.dataset, split, stage.folder, block))


def images_stage(session: Session) -> BlockStage:
    """Download: rows of the list to images."""
    p, store = session.project, session.store
    return BlockStage(
        asset=f"{p.dataset}/images",
        folder="images",
        factory="fourmill.runtime.workers:images",
        arguments={"project": p.model_dump(mode="json"), "connect_to": dict(session.connect_to)},
        recipe=lambda split, shard: images_recipe(store, p.dataset, p.layout, p.ingest, split, shard),
        finish=lambda block: finish_block(store, p.dataset, p.layout, block),
    )


def label_stage(session: Session, label: str) -> BlockStage:
    """Images to one kind of pseudo-label."""
    p, store = session.project, session.store
    return BlockStage(
        asset=f"labels/{label}",
        folder=LABEL_FOLDERS[label],
        factory="fourmill.runtime.workers:labels",
        arguments={"project": p.model_dump(mode="json"), "label": label},
        recipe=lambda split, shard: label_recipe(store, p.dataset, split, shard, label, p.labellers[label]),
        needs={"images": f"{p.dataset}/images"},
    )


def token_stage(session: Session, name: str) -> BlockStage:
    """Images or labels to one modality's tokens; captions and boxes to texts that encode."""
    p, store = session.project, session.store
    asset = token_assets(p)[name]
    ref = current(store, p.dataset, asset.tokenizer, f"tokenizers/{asset.tokenizer}")
    needs = {"images": f"{p.dataset}/images"}
    if asset.label in LABELS:
        needs = {LABEL_FOLDERS[asset.label]: f"labels/{asset.label}"}
    return BlockStage(
        asset=f"tokens/{name}",
        folder=token_folder(asset.modality),
        factory="fourmill.runtime.workers:tokens",
        arguments={
            "project": p.model_dump(mode="json"),
            "name": name,
            "tokenizer_path": ref.path,
            "tokenizer_digest": ref.digest,
        },
        recipe=lambda split, shard: token_recipe(
            store,
            p.dataset,
            split,
            shard,
            asset.modality,
            ref.digest,
            asset.px,
            features_digest(p) if asset.label == "clip" else "",
        ),
        needs=needs,
    )


def features_digest(project: Project) -> str:
    """Digest of the CLIP network and its settings: its features are in the clip tokens without being stored."""
    clip = project.labellers["clip"]
    return digest_json([weights_digest(clip), config_digest(clip)])


def align_stage(session: Session) -> BlockStage:
    """All tokens of a block to aligned tars in the public layout."""
    p, store = session.project, session.store
    modalities = token_modalities(p)
    needs = {token_folder(asset.modality): f"tokens/{asset.name}" for asset in token_assets(p).values()}
    return BlockStage(
        asset="tokens/shards",
        folder=ALIGNED,
        factory="fourmill.runtime.workers:aligned",
        arguments={"project": p.model_dump(mode="json")},
        recipe=lambda split, shard: align_recipe(store, p.dataset, split, shard, modalities),
        needs={"images": f"{p.dataset}/images", **needs},
    )
