"""`cc12m/source_index` and `cc12m/images`: from the list to pictures."""

from collections.abc import Sequence

import dagster as dg

from fourmill.assets.result import Verdict, check_spec, materialize_block, picture, table
from fourmill.assets.workshop import OWNERS, Workshop
from fourmill.core.digest import digest_config
from fourmill.ingest import preview
from fourmill.ingest.config import NO_EFFECT_ON_CONTENT, VERSION
from fourmill.ingest.source import build_source_index
from fourmill.runtime.project import Project
from fourmill.runtime.session import Session
from fourmill.runtime.stages import images_stage

MIN_OK_SHARE = 0.2  # a fifth of CC12M alive is still a data set; less is a broken network or list


def ingest_assets(project: Project, blocks: dg.PartitionsDefinition) -> list[dg.AssetsDefinition]:
    """The ingest group of a project."""
    index_key, images_key = dg.AssetKey([project.dataset, "source_index"]), dg.AssetKey([project.dataset, "images"])

    @dg.asset(
        key=index_key,
        group_name="ingest",
        kinds={"python", "parquet"},
        owners=OWNERS,
        code_version=f"{VERSION}-{digest_config(project.source, {'list'})[:8]}",
        description=f"The list of {project.dataset}: one row a URL and caption, numbered for good. Bad rows stay, with a reason.",
        check_specs=[check_spec(index_key, "list_has_rows", "At least one row can be downloaded.")],
    )
    def source_index(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
        session = workshop.session(context)
        index = build_source_index(session.store, project.dataset, project.source, project.layout)
        good = index.num_rows - index.num_bad_rows
        return dg.MaterializeResult(
            metadata={
                "dagster/row_count": index.num_rows,
                "bad_rows": index.num_bad_rows,
                "repeated_urls": index.num_repeated_urls,
                "list": str(project.source.list),
                "digest": index.digest,
                "domains": table(["domain", "rows"], preview.domain_table(session.store, project.dataset)),
            },
            data_version=dg.DataVersion(index.digest),
            check_results=[Verdict("list_has_rows", good > 0, metadata={"rows": good}).result(index_key)],
        )

    @dg.asset(
        key=images_key,
        deps=[index_key],
        partitions_def=blocks,
        backfill_policy=dg.BackfillPolicy.multi_run(1),
        group_name="ingest",
        kinds={"ray", "webdataset"},
        owners=OWNERS,
        pool="download",
        code_version=f"{VERSION}-{digest_config(project.ingest, NO_EFFECT_ON_CONTENT)[:8]}",
        description="Images of one block, downloaded, checked and normalised to RGB; every row ends in one status of the ledger.",
        check_specs=[
            check_spec(images_key, "rows_add_up", "Every row of the block has exactly one status."),
            check_spec(images_key, "enough_images", f"At least {MIN_OK_SHARE:.0%} of the rows became images."),
        ],
    )
    def images(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
        return materialize_block(context, workshop, images_stage, _judge, _describe)

    return [source_index, images]


def _judge(session: Session, block: str) -> Sequence[Verdict]:
    counts = preview.status_counts(session.store, session.project.dataset, session.project.layout, block)
    rows = sum(counts.values())
    wanted = preview.rows_in_block(session.store, session.project.dataset, session.project.layout, block)
    share = counts.get("ok", 0) / max(rows, 1)
    return [
        Verdict("rows_add_up", rows == wanted, metadata={"block": block, "rows": rows, "rows_of_the_list": wanted}),
        Verdict("enough_images", share >= MIN_OK_SHARE, metadata={"block": block, "ok_share": round(share, 4)}),
    ]


def _describe(session: Session, block: str) -> dict[str, dg.MetadataValue]:
    store, project = session.store, session.project
    failures = preview.failure_table(store, project.dataset, project.layout, block)
    sheet = preview.images_preview(store, project.dataset, project.layout, block)
    return {
        "failures": table(["status", "rows", "example"], failures),
        "contact_sheet": picture(sheet, f"images of {block}"),
    }
