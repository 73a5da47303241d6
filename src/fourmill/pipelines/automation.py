"""What happens by itself: the weekly rebuild of stale blocks, and training when a new manifest stands."""

from collections.abc import Iterator, Sequence
from typing import Any

import dagster as dg

from fourmill.assets.result import FAILED
from fourmill.assets.training import MANIFEST, PRETRAIN
from fourmill.core.digest import digest_json
from fourmill.core.store import open_store
from fourmill.pipelines.open_runs import open_runs
from fourmill.pipelines.outside import changed_outside
from fourmill.pipelines.status import DATA_VERSION, INPUT_VERSION, Node, Place, read_status, spoken
from fourmill.runtime.project import Project

_TOKENS = "tokens/"
_TO_DO = ("missing", "failed", "stale")


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

    What only waits for something else is as it should be, and will do. The run key names what made it stale, so that a tick twice
    runs once.

    Args:
        nodes: in topological order.
    """
    to_do = {(node.key, node.partition) for node in nodes if node.state in _TO_DO}
    for block in blocks:
        redone: dict[Place, Node] = {}
        for node in nodes:
            place = node.key, node.partition
            is_tokens, behind = node.partition == block and node.name.startswith(_TOKENS), set(node.behind)
            is_wanted = place in to_do or behind & redone.keys()
            if is_tokens and is_wanted and not (to_do & behind) - redone.keys():
                redone[place] = node
        if redone:
            why = digest_json([[n.name, n.state, n.reason] for n in redone.values()])[:12]
            keys = [n.key for n in redone.values()]
            yield dg.RunRequest(run_key=f"{block}:{why}", partition_key=block, asset_selection=keys)


def _nothing_to_do(nodes: Sequence[Node]) -> str:
    if all(n.state == "ok" for n in nodes if n.partition is not None and n.name.startswith(_TOKENS)):
        return "every token block is up to date"
    first = next(n for n in nodes if n.state in _TO_DO)
    place = spoken((first.key, first.partition))
    return f"nothing can be rebuilt yet: {place} is {first.state}" + (f", {first.reason}" if first.reason else "")


def sensors(project: Project, jobs: Sequence[Any]) -> list[dg.SensorDefinition]:
    """One sensor, off until switched on: a new manifest starts training once."""
    job = _job(jobs, "train_4m")

    @dg.asset_sensor(asset_key=MANIFEST, job=job, name="train_on_new_manifest")
    def train_on_new_manifest(
        context: dg.SensorEvaluationContext, event: dg.EventLogEntry
    ) -> Iterator[dg.RunRequest | dg.SkipReason]:
        """Train 4M on a manifest that nobody trained or trains on yet."""
        made, jobs = event.asset_materialization, context.repository_def
        version = (made.tags or {}).get(DATA_VERSION) if made else None
        if version is None or version.startswith(FAILED) or jobs is None:
            yield dg.SkipReason("the manifest failed its check" if version else "the manifest carries no data version")
            return
        runs = [
            one for one in open_runs(context.instance, jobs) if one.makes((PRETRAIN, None)) and one.state != "killed"
        ]
        if runs:
            yield dg.SkipReason(f"{runs[0].name} trains already")
            return
        fine_tunes = ["text2im"] if project.superres is None else ["text2im", "superres"]
        models = [dg.AssetKey(["fourm", name]) for name in ("pretrain", *fine_tunes, "evaluation", "samples")]
        left = [key for key in models if _made_of(context.instance, key) != version]
        if not left:
            yield dg.SkipReason("all of fourm/* was made of this manifest")
            return
        yield dg.RunRequest(run_key=f"{version}:{event.run_id}", asset_selection=left)

    return [train_on_new_manifest]


def _made_of(instance: dg.DagsterInstance, key: dg.AssetKey) -> str | None:
    """Data version of the manifest that the latest of an asset was made of."""
    event = instance.get_latest_materialization_event(key)
    made = event.asset_materialization if event else None
    return (made.tags or {}).get(f"{INPUT_VERSION}{MANIFEST.to_user_string()}") if made else None


def _job(jobs: Sequence[Any], name: str) -> Any:
    return next(job for job in jobs if job.name == name)
