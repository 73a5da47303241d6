"""`labels/depth`, `labels/normal`, `labels/semseg`, `labels/det`, and what a project adds: what networks see in the images."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import dagster as dg

from fourmill.assets.result import Inspection, Verdict, check_spec, materialize_block, picture, table
from fourmill.assets.workshop import OWNERS, Workshop
from fourmill.core.names import SPLITS
from fourmill.pseudolabel import drift
from fourmill.pseudolabel.checks import CHECKS, CheckReport, check_block
from fourmill.pseudolabel.config import config_digest, label_version, weights_digest
from fourmill.pseudolabel.members import label_format
from fourmill.pseudolabel.named_weights import network_name
from fourmill.pseudolabel.preview import contact_sheet, label_preview
from fourmill.pseudolabel.statistics import write_statistics
from fourmill.runtime.labeller_weights import require_labellers
from fourmill.runtime.project import Project
from fourmill.runtime.ray_session import dashboard_url, no_dashboard
from fourmill.runtime.session import Session
from fourmill.runtime.stages import BlockStage, label_stage, made_in_run

DRIFT = "like_the_blocks_before"
_DRIFT_TEXT = (
    f"No figure's mean lies more than {drift.MIN_DEVIATIONS:g} of an image's standard deviations, and {drift.MIN_ERRORS:g} "
    f"standard errors, from that of the blocks published already ({drift.MIN_IMAGES} images or more on each side)."
)
_MEASURED = ("images_per_second", "gpu_forward_share", "network_share", "ray_dashboard")  # as `_how_it_went` names it
_MOST_ROWS = 25  # of what is wrong, on the asset's page


def label_assets(project: Project, blocks: dg.PartitionsDefinition, is_main: bool = True) -> list[dg.AssetsDefinition]:
    """One asset a stored label; a labeller in the project for a label of `pseudolabel.members` adds its asset.

    Args:
        is_main: whether the data set is the one that 4M is trained on; another's assets carry its name.
    """
    return [_label_asset(project, blocks, label, is_main) for label in project.stored_labels()]


def label_key(label: str, of: str = "") -> dg.AssetKey:
    """The asset of a label: `labels/depth` of the main data set, `NAME/labels/depth` of another, which `of` names."""
    return dg.AssetKey([*([of] if of else []), "labels", label])


def _label_asset(project: Project, blocks: dg.PartitionsDefinition, label: str, is_main: bool) -> dg.AssetsDefinition:
    key = label_key(label, "" if is_main else project.dataset)
    config = project.labellers[label]
    version = f"{label_version(config)}-{weights_digest(config)[:8]}-{config_digest(config)[:8]}"

    def inspect(context: dg.AssetExecutionContext, wanted: Sequence[str], session: Session, block: str) -> Inspection:
        report = check_block(session.store, project.dataset, project.layout, block, label)
        return [*_verdicts(report, block), _drift_verdict(session, report, block, label)], {
            "labeller": network_name(config, session.store),
            "weights": weights_digest(config),
            **_made_together(context, session, label_stage(session, label, wanted)),
            **_how_it_went(session),
            **_figures(report),
            **_pictures(session, block, label),
        }

    @dg.asset(
        key=key,
        deps=[dg.AssetKey([project.dataset, "images"])],
        partitions_def=blocks,
        backfill_policy=dg.BackfillPolicy.multi_run(1),
        group_name="labels" if is_main else f"{project.dataset}_labels",
        kinds={"ray", "webdataset"},
        owners=OWNERS,
        tags={"modality": label, "stage": "label"},
        pool="gpu_label",
        code_version=version,
        description=label_format(label).about,
        check_specs=[
            *(check_spec(key, check, text) for check, text in CHECKS.items()),
            check_spec(key, DRIFT, _DRIFT_TEXT, blocking=False),
        ],
    )
    def labels(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
        wanted, here = _labels_of_run(context, key), workshop.for_dataset(project.dataset)
        require_labellers(project, wanted)
        make_stage = partial(label_stage, label=label, wanted=wanted)
        return materialize_block(context, here, make_stage, partial(inspect, context, wanted))

    return labels


def _labels_of_run(context: dg.AssetExecutionContext, of: dg.AssetKey) -> list[str]:
    """The labels that this run makes of the same data set, in order."""
    keys = context.run.asset_selection or context.job_def.asset_layer.executable_asset_keys
    return sorted(key.path[-1] for key in keys if key.path[:-1] == of.path[:-1])


def _verdicts(report: CheckReport, block: str) -> list[Verdict]:
    return [
        Verdict(
            check,
            not problems,
            metadata={
                "block": block,
                "num_problems": len(problems),
                "problems": table(["problem"], [[one] for one in problems[:_MOST_ROWS]]),
            },
        )
        for check, problems in report.found.items()
    ]


def _drift_verdict(session: Session, report: CheckReport, block: str, label: str) -> Verdict:
    """Compare the block with the published ones, and keep its figures for those that come."""
    project, store = session.project, session.store
    published, used = drift.published_statistics(store, project.dataset, project.layout, block, label)
    found = drift.drifts(report.statistics, published)
    write_statistics(store, project.dataset, label_format(label).folder, block, report.statistics)
    rows = drift.drift_rows(found)[:_MOST_ROWS]
    enough = min(report.statistics.labelled, published.labelled) >= drift.MIN_IMAGES
    metadata: dict[str, Any] = {
        "block": block,
        "compared_with": ", ".join(sorted(used)) or "no published block",
        "drifted": table(["figure", "block", "published", "deviations"], rows),
    }
    if used and not enough:
        metadata["note"] = f"fewer than {drift.MIN_IMAGES} labelled images on one side: too few to tell"
    return Verdict(DRIFT, not found, blocking=False, metadata=metadata)


def _made_together(context: dg.AssetExecutionContext, session: Session, stage: BlockStage) -> dict[str, Any]:
    """On the page of a stage that made another's shards too: whose; on that other's page: with whom, and how that went."""
    block, shown = context.partition_key, dict[str, Any]()
    before = {other.asset: _earlier_in_run(context, other.asset, block) for other in stage.also}
    also = [one.asset for one in stage.also if not before[one.asset] and made_in_run(session, one, block)]
    if session.measured and also:
        shown["also_made"] = ", ".join(also)
    for asset, found in before.items():
        if stage.asset in str(found["also_made"].value if "also_made" in found else "").split(", "):
            num_made = made_in_run(session, stage, block)
            num_all = len(SPLITS) * session.project.layout.shards_per_block
            shown |= {name: found[name] for name in _MEASURED if name in found}
            shown |= {"made_with": asset, "shards_made": num_made, "shards_kept": num_all - num_made}
    return shown


def _earlier_in_run(context: dg.AssetExecutionContext, asset: str, block: str) -> Mapping[str, dg.MetadataValue[Any]]:
    """Metadata of a label's block as this run has materialized it; none where it has not."""
    key = dg.AssetKey([*context.asset_key.path[:-1], asset.rpartition("/")[2]])
    wanted = dg.AssetRecordsFilter(asset_key=key, asset_partitions=[block])
    for record in context.instance.fetch_materializations(wanted, limit=1).records:
        if record.run_id == context.run.run_id and record.asset_materialization is not None:
            return record.asset_materialization.metadata
    return {}


def _how_it_went(session: Session) -> dict[str, Any]:
    """Throughput of this run, and where to look at its Ray; nothing where every shard was there already."""
    if not session.measured:
        return {}
    ray = session.project.ray
    where = dashboard_url(ray)
    return {**session.measured, "ray_dashboard": dg.MetadataValue.url(where) if where else no_dashboard(ray)}


def _figures(report: CheckReport) -> dict[str, Any]:
    """Numbers as numbers, so that Dagster draws them over the blocks; histograms as tables, the largest first."""
    shown: dict[str, Any] = {}
    for name, value in report.figures.items():
        if isinstance(value, dict):
            rows = [[key, count] for key, count in value.items()]
            shown[name] = table(["reason" if name == "rejected" else "class", name], rows)
        elif isinstance(value, int | float):
            shown[name] = value
    return shown


def _pictures(session: Session, block: str, label: str) -> dict[str, Any]:
    project, place = session.project, (session.store, session.project.dataset, session.project.layout, block)
    return {
        "preview": picture(label_preview(*place, label), f"{label} of {block}", "jpeg"),
        "contact_sheet": picture(contact_sheet(*place, project.stored_labels()), f"labels of {block} so far", "jpeg"),
    }
