"""What happens by itself: the weekly rebuild of stale blocks, and training when a new manifest stands."""

from collections.abc import Iterator, Sequence
from typing import Any

import dagster as dg

from fourmill.assets.result import FAILED
from fourmill.assets.training import MANIFEST, PRETRAIN
from fourmill.core.digest import digest_json
from fourmill.core.store import open_store
from fourmill.pipelines.outside import changed_outside
from fourmill.pipelines.status import DATA_VERSION, INPUT_VERSION, Node, Place, read_status
from fourmill.runtime.project import Project

_TOKENS = "tokens/"


def schedules(project: Project, jobs: Sequence[Any]) -> list[dg.ScheduleDefinition]:
    """One schedule: every Sunday at two, the token blocks that are missing or stale, and no others."""
    job = _job(jobs, "tokenize_block")

    @dg.schedule(job=job, cron_schedule="0 2 * * 0", name="weekly_token_rebuild")
    def weekly_token_rebuild(context: dg.ScheduleEvaluationContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
        """Rebuild the token blocks whose labels, tokenizers or code have changed, or whose files are gone."""
        repository = context.repository_def
        if repository is None:
            yield dg.SkipReason("no code location at hand")
            return
        store = open_store(project.store)
        nodes = read_status(repository.asset_graph, context.instance, store, changed_outside(project, store))
        requests = list(rebuild_requests(nodes, project.layout.block_keys()))
        yield from requests or [dg.SkipReason(_nothing_to_do(nodes))]

    return [weekly_token_rebuild]


def rebuild_requests(nodes: Sequence[Node], blocks: Sequence[str]) -> Iterator[dg.RunRequest]:
    """One run a block that has tokens to redo and all that they are made of.

    The run key names what made it stale, so that a tick twice runs once.

    Args:
        nodes: in topological order.
    """
    for block in blocks:
        tokens = [n for n in nodes if n.partition == block and n.name.startswith(_TOKENS)]
        redone: dict[Place, Node] = {}
        for node in tokens:
            if node.state != "ok" and all(place in redone for place in node.behind):
                redone[node.key, node.partition] = node
        if redone:
            why = digest_json([[n.name, n.state, n.reason] for n in redone.values()])[:12]
            keys = [n.key for n in redone.values()]
            yield dg.RunRequest(run_key=f"{block}:{why}", partition_key=block, asset_selection=keys)


def _nothing_to_do(nodes: Sequence[Node]) -> str:
    tokens = [n for n in nodes if n.partition is not None and n.name.startswith(_TOKENS) and n.state != "ok"]
    if not tokens:
        return "every token block is up to date"
    first = tokens[0]
    behind = ", ".join(" ".join(filter(None, [key.to_user_string(), block])) for key, block in first.behind)
    return f"nothing can be rebuilt yet: {first.name} {first.partition} waits for {behind}"


def sensors(project: Project, jobs: Sequence[Any]) -> list[dg.SensorDefinition]:
    """One sensor, off until switched on: a new manifest starts training once."""
    job = _job(jobs, "train_4m")

    @dg.asset_sensor(asset_key=MANIFEST, job=job, name="train_on_new_manifest")
    def train_on_new_manifest(
        context: dg.SensorEvaluationContext, event: dg.EventLogEntry
    ) -> Iterator[dg.RunRequest | dg.SkipReason]:
        """Train 4M on a manifest that nobody trained on yet."""
        made = event.asset_materialization
        version = (made.tags or {}).get(DATA_VERSION) if made else None
        if version is None or version.startswith(FAILED):
            yield dg.SkipReason("the manifest failed its check" if version else "the manifest carries no data version")
            return
        if _trained_on(context.instance) == version:
            yield dg.SkipReason("fourm/pretrain was trained on this manifest")
            return
        fine_tunes = ["text2im"] if project.superres is None else ["text2im", "superres"]
        models = [dg.AssetKey(["fourm", name]) for name in ("pretrain", *fine_tunes, "evaluation", "samples")]
        yield dg.RunRequest(run_key=version, asset_selection=models)

    return [train_on_new_manifest]


def _trained_on(instance: dg.DagsterInstance) -> str | None:
    """Data version of the manifest that the latest pretraining is of."""
    event = instance.get_latest_materialization_event(PRETRAIN)
    made = event.asset_materialization if event else None
    return (made.tags or {}).get(f"{INPUT_VERSION}{MANIFEST.to_user_string()}") if made else None


def _job(jobs: Sequence[Any], name: str) -> Any:
    return next(job for job in jobs if job.name == name)
