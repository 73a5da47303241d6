"""`labels/depth`, `labels/normal`, `labels/semseg`, `labels/det`: what networks see in the images."""

import dagster as dg

from fourmill.assets.result import Inspection, Verdict, check_spec, materialize_block, picture, table
from fourmill.assets.workshop import OWNERS, Workshop
from fourmill.core.modality import LABELS
from fourmill.pseudolabel.checks import check_block
from fourmill.pseudolabel.config import VERSION, config_digest, weights_digest
from fourmill.pseudolabel.preview import label_preview
from fourmill.runtime.project import Project
from fourmill.runtime.session import Session
from fourmill.runtime.stages import label_stage

_TEXTS = {
    "depth": "Depth of every image, 16-bit, near small and far large.",
    "normal": "Surface normals of every image in the camera's frame, 8 bits a channel.",
    "semseg": "COCO panoptic class of every pixel, raw ids 0..132, 255 where there is none.",
    "det": "Boxes of COCO's 80 things in every image, corners as shares of the sides.",
}


def label_assets(project: Project, blocks: dg.PartitionsDefinition) -> list[dg.AssetsDefinition]:
    """One asset a label; adding a labeller to `LABELS` and the project adds its asset."""
    return [_label_asset(project, blocks, label) for label in LABELS]


def _label_asset(project: Project, blocks: dg.PartitionsDefinition, label: str) -> dg.AssetsDefinition:
    key = dg.AssetKey(["labels", label])
    config = project.labellers[label]

    def inspect(session: Session, block: str) -> Inspection:
        report = check_block(session.store, project.dataset, project.layout, block, label)
        found = {"block": block, "problems": table(["problem"], [[p] for p in report.problems[:20]])}
        sheet = label_preview(session.store, project.dataset, project.layout, block, label)
        return [Verdict("labels_match_images", report.passed, metadata=found)], {
            "labeller": config.kind,
            "weights": weights_digest(config),
            "figures": dg.MetadataValue.json(report.figures),
            "preview": picture(sheet, f"{label} of {block}"),
        }

    @dg.asset(
        key=key,
        deps=[dg.AssetKey([project.dataset, "images"])],
        partitions_def=blocks,
        backfill_policy=dg.BackfillPolicy.multi_run(1),
        group_name="labels",
        kinds={"ray", "webdataset"},
        owners=OWNERS,
        tags={"modality": label, "stage": "label"},
        pool="gpu_label",
        code_version=f"{VERSION}-{weights_digest(config)[:8]}-{config_digest(config)[:8]}",
        description=_TEXTS[label],
        check_specs=[check_spec(key, "labels_match_images", "One label an image, of its size, with values in range.")],
    )
    def labels(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
        return materialize_block(context, workshop, lambda session: label_stage(session, label), inspect)

    return labels
