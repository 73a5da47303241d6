"""`cc12m/source_index` and `cc12m/images`: from the list to pictures."""

import dagster as dg
from pydantic import Field

from fourmill.assets.result import Inspection, Verdict, check_spec, data_version, materialize_block, picture, table
from fourmill.assets.workshop import OWNERS, Workshop
from fourmill.core.digest import digest_config
from fourmill.ingest import preview
from fourmill.ingest.config import NO_EFFECT_ON_CONTENT, VERSION, WHERE_IT_LIES
from fourmill.ingest.duplicates import copies_elsewhere
from fourmill.ingest.source import build_source_index
from fourmill.runtime.project import Project
from fourmill.runtime.session import Session
from fourmill.runtime.stages import images_stage

# Of what arrives: hosts serve some error pages as images, a captive portal or a broken proxy serves nothing else.
MIN_DECODABLE_SHARE = 0.5
# Of what is asked for: links die by and by, but below this it is rather the network, a rate limit or an old list.
MIN_SUCCESS_SHARE = 0.4


class ImagesConfig(dg.Config):
    """What one run may be asked for beside its block; it never changes what a finished block should be."""

    retry_failed: bool = Field(
        default=False,
        description="Fetch the rows again whose failure may have passed: timeouts, connections, DNS, HTTP 429 and 5xx. Images "
        "that are there are not fetched again, and shards that gain none keep their bytes.",
    )


def ingest_assets(project: Project, blocks: dg.PartitionsDefinition) -> list[dg.AssetsDefinition]:
    """The ingest group of one data set: the project's main one, or another as `Project.for_dataset` gives it."""
    index_key, images_key = dg.AssetKey([project.dataset, "source_index"]), dg.AssetKey([project.dataset, "images"])

    @dg.asset(
        key=index_key,
        group_name="ingest",
        kinds={"python", "parquet"},
        owners=OWNERS,
        code_version=f"{VERSION}-{digest_config(project.source, WHERE_IT_LIES)[:8]}",
        description=f"The rows of {project.dataset}: a picture's address and caption each, numbered for good; bad ones too.",
        check_specs=[check_spec(index_key, "list_has_rows", "At least one row can be downloaded.")],
    )
    def source_index(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
        session = workshop.for_dataset(project.dataset).session(context)
        progress = session.progress(f"{project.dataset}/source_index")
        index = build_source_index(session.store, project.dataset, project.source, project.layout, progress)
        good = index.num_rows - index.num_bad_rows
        verdict = Verdict("list_has_rows", good > 0, metadata={"rows": good})
        return dg.MaterializeResult(
            metadata={
                "dagster/row_count": index.num_rows,
                "bad_rows": index.num_bad_rows,
                "repeated_urls": index.num_repeated_urls,
                "kind": project.source.kind,
                "source": project.source.where,
                "digest": index.digest,
                "domains": table(["domain", "rows"], preview.domain_table(session.store, project.dataset)),
            },
            data_version=data_version(context, index.digest, [verdict]),
            check_results=[verdict.result(index_key)],
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
            check_spec(images_key, "all_shards_there", "Every shard of the block is done, in both splits."),
            check_spec(images_key, "rows_add_up", "Every row of the block has exactly one status."),
            check_spec(
                images_key,
                "decodable",
                f"Something arrived, and at least {MIN_DECODABLE_SHARE:.0%} of what arrived could be decoded.",
            ),
            check_spec(
                images_key,
                "success_rate",
                f"At least {MIN_SUCCESS_SHARE:.0%} of the rows that were asked for became images.",
                blocking=False,
            ),
            check_spec(
                images_key,
                "no_copies_in_later_blocks",
                "No block holds an image that an earlier block has; those named are to be materialized again, without downloads.",
                blocking=False,
            ),
        ],
    )
    def images(
        context: dg.AssetExecutionContext, config: ImagesConfig, workshop: dg.ResourceParam[Workshop]
    ) -> dg.MaterializeResult:
        return materialize_block(
            context,
            workshop.for_dataset(project.dataset),
            lambda session: images_stage(session, config.retry_failed),
            _inspect,
        )

    return [source_index, images]


def _inspect(session: Session, block: str) -> Inspection:
    store, project = session.store, session.project
    found = preview.survey_block(store, project.dataset, project.layout, block)
    decodable, success = found.num_decoded / max(found.num_arrived, 1), found.num_images / max(found.num_asked, 1)
    copies = copies_elsewhere(store, project.dataset, project.layout, block)
    nothing_asked = found.num_asked == 0
    verdicts = [
        Verdict(
            "all_shards_there",
            found.num_shards == found.wanted_shards,
            metadata={"block": block, "shards": found.num_shards, "expected": found.wanted_shards},
        ),
        Verdict(
            "rows_add_up",
            found.num_rows == found.wanted_rows,
            metadata={"block": block, "rows": found.num_rows, "rows_of_the_list": found.wanted_rows},
        ),
        Verdict(
            "decodable",
            nothing_asked or decodable >= MIN_DECODABLE_SHARE,
            metadata={"block": block, "arrived": found.num_arrived, "decodable_share": round(decodable, 4)},
        ),
        Verdict(
            "success_rate",
            nothing_asked or success >= MIN_SUCCESS_SHARE,
            blocking=False,
            metadata={"block": block, "asked": found.num_asked, "ok_share": round(success, 4)},
        ),
        Verdict(
            "no_copies_in_later_blocks",
            not copies,
            blocking=False,
            metadata={"block": block, "materialize_again": ", ".join(copies) or "none", "copies": sum(copies.values())},
        ),
    ]
    sheet = preview.images_preview(store, project.dataset, project.layout, block)
    return verdicts, {
        "failures": table(["status", "rows", "percent", "example"], preview.failure_table(found)),
        "hosts": table(["host", "rows", "ok_percent"], preview.host_table(found)),
        "contact_sheet": picture(sheet, f"images of {block}"),
    }
