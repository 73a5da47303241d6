"""What happens by itself: the weekly rebuild of stale blocks, and training when a new manifest stands."""

from collections.abc import Iterator, Sequence
from typing import Any

import dagster as dg

from fourmill.core.digest import digest_json
from fourmill.core.store import open_store
from fourmill.pipelines.status import Node, read_status
from fourmill.runtime.project import Project


def schedules(project: Project, jobs: Sequence[Any]) -> list[dg.ScheduleDefinition]:
    """One schedule: every Sunday at two, the token blocks that are missing or stale, and no others."""
    job = _job(jobs, "tokenize_block")

    @dg.schedule(job=job, cron_schedule="0 2 * * 0", name="weekly_token_rebuild")
    def weekly_token_rebuild(context: dg.ScheduleEvaluationContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
        """Rebuild the token blocks whose labels, tokenizers or code have changed."""
        repository = context.repository_def
        if repository is None:
            yield dg.SkipReason("no code location at hand")
            return
        nodes = read_status(repository.asset_graph, context.instance, open_store(project.store))
        requests = list(rebuild_requests(nodes, project.layout.block_keys()))
        yield from requests or [dg.SkipReason("every token block is up to date")]

    return [weekly_token_rebuild]


def rebuild_requests(nodes: Sequence[Node], blocks: Sequence[str]) -> Iterator[dg.RunRequest]:
    """One run a block that has tokens to redo; the run key names what made it stale, so that a tick twice runs once."""
    for block in blocks:
        stale = [n for n in nodes if n.partition == block and n.name.startswith("tokens/") and n.state != "ok"]
        if stale:
            why = digest_json([[n.name, n.state, n.reason] for n in stale])[:12]
            yield dg.RunRequest(run_key=f"{block}:{why}", partition_key=block, asset_selection=[n.key for n in stale])


def sensors(project: Project, jobs: Sequence[Any]) -> list[dg.SensorDefinition]:
    """One sensor, off until switched on: a new manifest starts training once."""
    job = _job(jobs, "train_4m")

    @dg.asset_sensor(asset_key=dg.AssetKey(["tokens", "manifest"]), job=job, name="train_on_new_manifest")
    def train_on_new_manifest(
        context: dg.SensorEvaluationContext, event: dg.EventLogEntry
    ) -> Iterator[dg.RunRequest | dg.SkipReason]:
        """Train 4M on a manifest that nobody trained on yet."""
        made = event.asset_materialization
        version = (made.tags or {}).get("dagster/data_version") if made else None
        if version is None:
            yield dg.SkipReason("the manifest carries no data version")
            return
        fine_tunes = ["text2im"] if project.superres is None else ["text2im", "superres"]
        models = [dg.AssetKey(["fourm", name]) for name in ("pretrain", *fine_tunes, "evaluation", "samples")]
        yield dg.RunRequest(run_key=version, asset_selection=models)

    return [train_on_new_manifest]


def _job(jobs: Sequence[Any], name: str) -> Any:
    return next(job for job in jobs if job.name == name)
