"""`tokens/*`: labels to tokens, tokens to aligned shards, shards to the manifest."""

from typing import Any

import dagster as dg

from fourmill.assets.result import Inspection, Verdict, check_spec, data_version, materialize_block, picture, table
from fourmill.assets.workshop import OWNERS, Workshop
from fourmill.core.digest import digest_json
from fourmill.core.modality import IMAGE_TOKENS, LABELS, TEXTS
from fourmill.runtime.manifests import MIN_COVERAGE, coverage, publish_manifest
from fourmill.runtime.models import current
from fourmill.runtime.project import Project
from fourmill.runtime.session import Session
from fourmill.runtime.stages import align_stage, features_digest, token_stage
from fourmill.runtime.token_assets import TokenAsset
from fourmill.runtime.token_assets import token_assets as list_token_assets
from fourmill.runtime.workers import token_modalities
from fourmill.tokenize import align
from fourmill.tokenize.checks import aligned_problems, token_figures, token_preview, token_problems
from fourmill.tokenize.config import TOKENS_VERSION


def token_assets(project: Project, blocks: dg.PartitionsDefinition) -> list[dg.AssetsDefinition]:
    """The tokens group of a project."""
    return [
        *(_token_asset(project, blocks, asset) for asset in list_token_assets(project).values()),
        _shards_asset(project, blocks),
        _manifest(),
    ]


def _token_asset(project: Project, blocks: dg.PartitionsDefinition, asset: TokenAsset) -> dg.AssetsDefinition:
    name, label, tokenizer = asset.name, asset.label, asset.tokenizer
    key = dg.AssetKey(["tokens", name])
    source = dg.AssetKey(["labels", label]) if label in LABELS else dg.AssetKey([project.dataset, "images"])

    modality = project.modalities()[asset.modality]

    def inspect(session: Session, block: str) -> Inspection:
        place = (session.store, project.dataset, project.layout, block, modality)
        problems = token_problems(*place, project.tokenizing.crops.num)
        found = {"block": block, "problems": table(["problem"], [[p] for p in problems[:20]])}
        ref = current(session.store, project.dataset, tokenizer, f"tokenizers/{tokenizer}")
        shown: dict[str, Any] = {"tokenizer": ref.digest}
        if not problems:  # of tokens that are wrong there are neither
            shown |= token_figures(*place)
            sheet = token_preview(*place)
            if sheet is not None:
                shown["preview"] = picture(sheet, f"{name} tokens of {block}")
        return [Verdict("tokens_in_range", not problems, metadata=found)], shown

    @dg.asset(
        key=key,
        deps=[source, dg.AssetKey(["tokenizers", tokenizer])],
        partitions_def=blocks,
        backfill_policy=dg.BackfillPolicy.multi_run(1),
        group_name="tokens",
        kinds={"ray", "webdataset"},
        owners=OWNERS,
        tags={"modality": label, "stage": "tokens"},
        pool="gpu_label",
        code_version=_code_version(project, label),
        description=_text(asset),
        check_specs=[check_spec(key, "tokens_in_range", "Every id is below the vocabulary, every grid complete.")],
    )
    def tokens(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
        return materialize_block(context, workshop, lambda session: token_stage(session, name), inspect)

    return tokens


def _code_version(project: Project, label: str) -> str:
    """The default's is the bare version, so that what does not change tokens makes none stale."""
    tokenizing = project.tokenizing
    changed = {**tokenizing.recipe, **({"crops": tokenizing.crops.digest} if tokenizing.crops.digest else {})}
    parts = [TOKENS_VERSION, *([features_digest(project)[:8]] if label == "clip" else [])]
    return "-".join([*parts, *([digest_json(changed)[:8]] if changed and label not in TEXTS else [])])


def _text(asset: TokenAsset) -> str:
    if asset.label == "clip":
        return (
            f"CLIP tokens of {asset.px}-pixel crops: crop to features to tokens in one go; features are never stored."
        )
    if asset.label == "caption":
        return "Captions that encode in the joint vocabulary, as text; the trainer encodes them."
    if asset.label == "det":
        return "Boxes as the detection sequences' source; the trainer orders and encodes them after its crop."
    return f"Tokens of {asset.label}: one codebook index a patch of each crop at {asset.px} pixels, int16."


def _shards_asset(project: Project, blocks: dg.PartitionsDefinition) -> dg.AssetsDefinition:
    key = dg.AssetKey(["tokens", "shards"])

    folders = align.public_folders(token_modalities(project))

    def inspect(session: Session, block: str) -> Inspection:
        problems = aligned_problems(session.store, project.dataset, project.layout, block, folders, project.input_px)
        found = {"block": block, "problems": table(["problem"], [[p] for p in problems[:20]])}
        return [Verdict("keys_aligned", not problems, metadata=found)], {}

    @dg.asset(
        key=key,
        deps=[
            dg.AssetKey([project.dataset, "images"]),
            *(dg.AssetKey(["tokens", name]) for name in list_token_assets(project)),
        ],
        partitions_def=blocks,
        backfill_policy=dg.BackfillPolicy.multi_run(1),
        group_name="tokens",
        kinds={"ray", "webdataset"},
        owners=OWNERS,
        code_version="-".join(filter(None, [align.VERSION, project.tokenizing.crops.digest[:8]])),
        description="Aligned tars in the public 4M layout: equal keys in equal order in every modality's folder.",
        check_specs=[
            check_spec(key, "keys_aligned", "Tars read back: same keys everywhere, bytes as their receipts say.")
        ],
    )
    def shards(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
        return materialize_block(context, workshop, align_stage, inspect)

    return shards


def _manifest() -> dg.AssetsDefinition:
    key = dg.AssetKey(["tokens", "manifest"])

    @dg.asset(
        key=key,
        deps=[
            dg.AssetDep(dg.AssetKey(["tokens", "shards"]), partition_mapping=dg.AllPartitionMapping()),
            # It names each of them; another one may make the same shards.
            *(dg.AssetKey(["tokenizers", name]) for name in (*IMAGE_TOKENS, "text")),
        ],
        group_name="tokens",
        kinds={"python", "json"},
        owners=OWNERS,
        code_version="2",
        description="Every shard digest, tokenizer digest, count and gap of the token dataset: what a training run is made from.",
        check_specs=[check_spec(key, "coverage", f"At least {MIN_COVERAGE:.0%} of the rows are in the shards.")],
    )
    def manifest(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
        session = workshop.session(context)
        made, path = publish_manifest(session)
        share = coverage(made)
        verdict = Verdict("coverage", share >= MIN_COVERAGE, metadata={"share": round(share, 4)})
        digests = [[name, entry.tokenizer or "pixels"] for name, entry in made.modalities.items()]
        return dg.MaterializeResult(
            metadata={
                "dagster/row_count": sum(made.num_samples(split) for split in made.splits),
                "train_samples": made.num_samples("train"),
                "val_samples": made.num_samples("val"),
                "rows": made.rows,
                "missing": table(["status", "rows"], sorted(made.missing.items(), key=lambda item: -item[1])),
                "tokenizers": table(["modality", "tokenizer"], digests),
                "manifest": path,
                "digest": made.digest,
            },
            data_version=data_version(context, made.digest, [verdict]),
            check_results=[verdict.result(key)],
        )

    return manifest
