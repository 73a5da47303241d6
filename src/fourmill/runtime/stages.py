"""The block stages: how each of them is run over a block, shard by shard, and when its ledger may be published.

A stage's ledger is written only after its checks have passed; the next stage asks for the ledger, so a bad block
cannot get past, in whichever run it is tried.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace

from fourmill.core.digest import Json, digest_json
from fourmill.core.ledger import BlockReport, ledger_path, write_ledger
from fourmill.core.modality import IMAGES, LABEL_FOLDERS
from fourmill.core.names import SPLITS, Split, shard_name
from fourmill.core.shards import Receipt, Recipe, finished, places_of, read_receipt
from fourmill.core.work import ShardJob
from fourmill.ingest.duplicates import finish_block
from fourmill.ingest.optout import publish_opt_out, read_opt_out
from fourmill.ingest.stale import remember_opt_out
from fourmill.ingest.statuses import MAY_PASS
from fourmill.ingest.worker import images_recipe
from fourmill.pseudolabel.config import DptConfig, config_digest, label_version, weights_digest
from fourmill.pseudolabel.members import label_format
from fourmill.pseudolabel.named_weights import architecture
from fourmill.pseudolabel.worker import label_recipe
from fourmill.runtime.labeller_weights import require_labellers
from fourmill.runtime.models import current
from fourmill.runtime.pace import Pace
from fourmill.runtime.pool import run_shards
from fourmill.runtime.project import Project
from fourmill.runtime.ray_session import check_python
from fourmill.runtime.session import Session
from fourmill.runtime.token_assets import token_assets
from fourmill.runtime.workers import token_modalities
from fourmill.tokenize.align import FOLDER as ALIGNED
from fourmill.tokenize.align import align_recipe, public_folders, token_folder
from fourmill.tokenize.crop_settings import FOLDER as CROP_SETTINGS
from fourmill.tokenize.worker import token_recipe


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
    again: Callable[[Receipt], bool] | None = None  # finished shards that this run works on all the same
    unit: str = "rows"  # what people count here
    together: int = 1  # shards that an actor takes at a time
    network_of: Callable[[str], str | None] = lambda digest: None  # architecture behind a digest of weights, for people
    also: "tuple[BlockStage, ...]" = ()  # stages some of whose shards this one makes too; it publishes none of theirs
    beside: tuple[str, ...] = ()  # folders of no stage that its workers write to as well
    parts: tuple[str, ...] = ()  # folders of no stage that a shard is in too: by the same recipe, or it is not done


def run_block(session: Session, stage: BlockStage, block: str) -> int:
    """Make the shards of a block that are not there yet; return how many were made or changed.

    Raises:
        BlockNotReadyError: an upstream block has no ledger.
        PythonMissingError: the stage's own Python is not on this machine, where its actors are to be.
        ShardError: a worker failed.
    """
    project, store = session.project, session.store
    ray = project.ray.for_stage(stage.asset)
    for folder, asset in stage.needs.items():
        for split in SPLITS:
            if not store.exists(ledger_path(project.dataset, split, folder, block)):
                raise BlockNotReadyError(
                    f"{stage.asset} {block}: {asset} has no ledger for {block}: it was not materialized, or its checks failed. "
                    f"Materialize {asset} for {block} and look at its checks"
                )
    folders = [stage.folder, *stage.parts, *(other.folder for other in stage.also)]
    work = list(_work(session, stage, block))
    if work:
        check_python(ray, stage.asset)
        withdraw_ledger(session, stage, block)
        for other in stage.also:
            if any(_work(session, other, block)):
                withdraw_ledger(session, other, block)
        for folder in (*folders, *stage.beside):
            for split in SPLITS:
                store.sweep(f"{project.dataset}/{split}/{folder}")
    jobs = [job for job, _ in work]
    pace = Pace(len(jobs), unit=stage.unit)
    progress = session.progress(f"{stage.asset} {block}")
    try:
        made = run_shards(stage.factory, stage.arguments, jobs, ray, progress, pace, stage.together)
    except BaseException:
        # Its actors are gone, and what they were writing takes room that the next run may lack. Not `beside`: others write there.
        for job in jobs:
            for folder in folders:
                store.sweep(f"{project.dataset}/{job.split}/{folder}", f"{shard_name(job.shard)}.")
        raise
    session.measured.clear()
    session.measured.update(pace.facts())
    if stage.finish:
        stage.finish(block)
    return sum(receipt != before for receipt, (_, before) in zip(made, work, strict=True))


def _work(session: Session, stage: BlockStage, block: str) -> Iterator[tuple[ShardJob, Receipt | None]]:
    """Shards to be worked on, with the receipt of those that are done already."""
    project = session.project
    for place in places_of(project.dataset, project.layout, block, stage.folder):
        recipe = stage.recipe(place.split, place.shard)
        done, *parts = (
            finished(session.store, replace(place, folder=folder), recipe) for folder in (stage.folder, *stage.parts)
        )
        if done is None or None in parts or (stage.again is not None and stage.again(done)):
            yield ShardJob(place.split, place.shard, recipe, session.run_id), done


def made_in_run(session: Session, stage: BlockStage, block: str) -> int:
    """How many of a stage's shards this run has made, be it by a stage that makes them too (`also`)."""
    project = session.project
    places = places_of(project.dataset, project.layout, block, stage.folder)
    receipts = [read_receipt(session.store, place) for place in places]
    return sum(receipt is not None and receipt.run_id == session.run_id for receipt in receipts)


def publish_ledger(session: Session, stage: BlockStage, block: str, shards_done: int) -> BlockReport:
    """Write the block's ledgers: from here on the next stage may read it."""
    project = session.project
    shards = project.layout.shards_of(block)
    place = (session.store, project.dataset, stage.folder, block, shards)
    return write_ledger(*place, stage.asset, shards_done, stage.network_of)


def withdraw_ledger(session: Session, stage: BlockStage, block: str) -> None:
    """Take a block's ledgers away, so that nothing downstream reads a block that is being changed or is bad."""
    for split in SPLITS:
        session.store.delete(ledger_path(session.project.dataset, split, stage.folder, block))


def images_stage(session: Session, retry_failed: bool = False) -> BlockStage:
    """Download: rows of the list to images.

    Args:
        retry_failed: fetch the rows again whose failure may have passed, also in shards that are done.

    Raises:
        ValueError: the opt-out list cannot be read.
    """
    p, store = session.project, session.store
    opt_out = read_opt_out(p.ingest.opt_out)  # once: all shards of the run go by the same list

    def finish(block: str) -> None:
        finish_block(store, p.dataset, p.layout, block)
        remember_opt_out(store, p.dataset, block, opt_out)

    return BlockStage(
        asset=f"{p.dataset}/images",
        folder=IMAGES,
        factory="fourmill.runtime.workers:images",
        arguments={
            "project": p.model_dump(mode="json"),
            "connect_to": dict(session.connect_to),
            "opt_out": publish_opt_out(store, opt_out),
            "retry_failed": retry_failed,
        },
        recipe=lambda split, shard: images_recipe(store, p.dataset, p.ingest, split, shard, opt_out),
        finish=finish,
        again=(lambda receipt: not MAY_PASS.isdisjoint(receipt.counts)) if retry_failed else None,
    )


def label_stage(session: Session, label: str, wanted: Collection[str] = ()) -> BlockStage:
    """Images to one kind of pseudo-label.

    Args:
        wanted: labels that the same run makes later. Those whose network is fed like this one's are made along with it: an
            image is decoded once for all of them, and their own stage finds its shards done.
    """
    p, store = session.project, session.store
    config = p.labellers[label]
    also = [other for other in wanted if other != label and _fed_alike(p, label, other)]
    return BlockStage(
        asset=f"labels/{label}",
        folder=label_format(label).folder,
        factory="fourmill.runtime.workers:labels",
        arguments={"project": p.model_dump(mode="json"), "label": label, "also": also},
        recipe=lambda split, shard: label_recipe(store, p.dataset, split, shard, label, config),
        needs={IMAGES: f"{p.dataset}/images"},
        unit="images",
        network_of=lambda digest: architecture(config, store) if digest == weights_digest(config) else None,
        also=tuple(label_stage(session, other) for other in also),
    )


def _fed_alike(project: Project, label: str, other: str) -> bool:
    """Depth and normals by DPT at one size, in batches of one size: the same images meet, whoever is first.

    On one share of the machine too: what a project gives either of them holds for the actors that make both.
    """
    configs = [project.labellers[name] for name in (label, other)]
    shares = [project.ray.for_stage(f"labels/{name}").model_copy(update={"stages": {}}) for name in (label, other)]
    fed = {(one.longer_px, one.batch_size) for one in configs if isinstance(one, DptConfig)}
    return all(isinstance(one, DptConfig) for one in configs) and len(fed) == 1 and shares[0] == shares[1]


def token_stage(session: Session, name: str) -> BlockStage:
    """Images or labels to one modality's tokens; captions and boxes to texts that encode.

    Raises:
        WeightsMissingError: the CLIP network of CLIP's tokens is not there.
    """
    p, store = session.project, session.store
    asset = token_assets(p)[name]
    if asset.label == "clip":
        require_labellers(p, ["clip"])
    ref = current(store, p.dataset, asset.tokenizer, f"tokenizers/{asset.tokenizer}")
    needs = {IMAGES: f"{p.dataset}/images"}
    if asset.label in LABEL_FOLDERS:
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
            p.tokenizing,
        ),
        needs=needs,
        together=p.tokenizing.shards_together,
        beside=(CROP_SETTINGS,),
    )


def features_digest(project: Project) -> str:
    """Digest of the CLIP network, its settings and its code: its features are in the clip tokens without being stored."""
    clip = project.labellers["clip"]
    return digest_json([label_version(clip), weights_digest(clip), config_digest(clip)])


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
        recipe=lambda split, shard: align_recipe(
            store, p.dataset, split, shard, modalities, p.input_px, p.tokenizing.crops
        ),
        needs={IMAGES: f"{p.dataset}/images", **needs},
        beside=(CROP_SETTINGS,),
        parts=tuple(public_folders(modalities)),
    )
