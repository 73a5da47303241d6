"""`fourmill demo` and `fourmill run`: prepare, check, materialize, show."""

from collections.abc import Sequence

from rich.console import Console

from fourmill.core.names import Layout
from fourmill.core.store import open_store
from fourmill.ingest.config import SourceConfig
from fourmill.ingest.demo_source import DEMO_HOST, write_demo_list
from fourmill.ingest.source import count_rows
from fourmill.pipelines import environment, preflight, profiles
from fourmill.pipelines.definitions import build_definitions
from fourmill.pipelines.live import live_progress
from fourmill.pipelines.runner import close_orphans, materialize_all, open_instance
from fourmill.pipelines.status import Node
from fourmill.pipelines.summary import print_summary
from fourmill.pipelines.workspace import Workspace, routes
from fourmill.pseudolabel.choices import labellers_from
from fourmill.pseudolabel.config import feature_dim
from fourmill.pseudolabel.members import own_labellers
from fourmill.runtime.labeller_weights import pinned_labellers
from fourmill.runtime.project import Project
from fourmill.runtime.ray_session import stop_ray
from fourmill.runtime.tokenizer_weights import with_tokenizer
from fourmill.tokenize.released import PREFIX, TEXT

SCENE_SEED = 0


def run_demo(workspace: Workspace, profile: str, train_minutes: float | None, console: Console) -> None:
    """The chain on generated scenes.

    Raises:
        ValueError: the machine, the profile or the folder is not fit for it.
    """
    project = pinned_labellers(profiles.profile(profile, workspace.out, train_minutes))
    with preflight.only_one(workspace.out):
        project = still_served(workspace, project)
        workspace.keep(project)
        with live_progress(console) as listener:
            write_demo_list(
                workspace.scenes,
                num_rows=project.layout.num_rows,
                size_px=project.input_px,
                seed=SCENE_SEED,
                url_base=f"http://{DEMO_HOST}/",
                progress=lambda done, total, note: listener("scenes to download", done, total, note),
            )
        preflight.check_machine(project)
        _materialize(workspace, project, console)


def run_list(
    workspace: Workspace,
    list_place: str,
    labellers: str,
    allow_hosts: Sequence[str],
    num_blocks: int,
    train_minutes: float,
    profile: str,
    console: Console,
    *,
    opt_out: str | None = None,
    store: str | None = None,
    retry_failed: bool = False,
    labels: Sequence[str] = (),
) -> None:
    """Any list through the same assets, at the demo's sizes.

    Args:
        opt_out: path of a list of domains, URLs and images to leave out.
        store: root of the store, a folder or s3://bucket/prefix; below the workspace by default.
        retry_failed: ask again for images whose failure may have passed.
        labels: labels beside 4M's own, as `pseudolabel.members.OWN` has them.

    Raises:
        ValueError: the list, the labellers or the machine is not fit for it.
    """
    preflight.check_source(SourceConfig(list=list_place))
    base = profiles.profile(profile, workspace.out, train_minutes)
    if store is not None:
        base = base.model_copy(update={"store": store, "scratch": str(workspace.out / "scratch")})
    base = base.model_copy(update={"labellers": {**base.labellers, **own_labellers(labels)}})
    project = list_project(base, list_place, labellers, allow_hosts, num_blocks, opt_out)
    with preflight.only_one(workspace.out):
        project = still_served(workspace, project)
        preflight.check_machine(project)
        workspace.keep(project)
        _materialize(workspace, project, console, retry_failed)


def still_served(workspace: Workspace, project: Project) -> Project:
    """The project with the imported tokenizers that the folder's project names (`fourmill weights add tokenizer_rgb`)."""
    if not workspace.project_file.exists():
        return project
    for label, digest in workspace.project().served_tokenizers.items():
        project = with_tokenizer(project, label if label == TEXT else f"{PREFIX}{label}", digest)
    return project


def list_project(
    base: Project,
    list_place: str,
    labellers: str,
    allow_hosts: Sequence[str],
    num_blocks: int,
    opt_out: str | None = None,
) -> Project:
    """A profile over another list: shards are cut so that the blocks hold all rows."""
    source = base.source.model_copy(update={"list": list_place})
    rows = count_rows(source)
    shards_per_block = max(1, min(200, -(-rows // (num_blocks * 500))))
    layout = Layout(
        rows_per_shard=max(1, -(-rows // (num_blocks * shards_per_block))),
        shards_per_block=shards_per_block,
        num_blocks=num_blocks,
    )
    chosen = {**base.labellers, **labellers_from(labellers, store=open_store(base.store))}
    features = feature_dim(chosen["clip"])
    clip = base.tokenizers["clip"].model_copy(update={"feature_dim": features})
    return base.model_copy(
        update={
            "profile": f"list-{labellers if labellers in ('seeded', 'scene') else 'weights'}",
            "source": source,
            "layout": layout,
            "ingest": base.ingest.model_copy(update={"allow_hosts": tuple(allow_hosts), "opt_out": opt_out}),
            "labellers": chosen,
            "tokenizers": {**base.tokenizers, "clip": clip},
            "train_set": base.train_set.model_copy(update={"blocks": tuple(layout.block_keys()[:6])}),
        }
    )


def _materialize(workspace: Workspace, project: Project, console: Console, retry_failed: bool = False) -> None:
    instance = open_instance(workspace.home)
    orphans = close_orphans(instance)
    if orphans:
        console.print(f"{orphans} earlier run(s) ended without a word; continuing from what they finished")
    try:
        with routes(workspace, environment.connect_to()) as connect_to, live_progress(console) as listener:
            defs = build_definitions(project, connect_to, listener)
            runs = materialize_all(defs, project, instance, _announce(console), retry_failed)
    finally:
        stop_ray()
    if not runs:
        console.print("everything is up to date; nothing was done again")
    print_summary(project, instance, workspace, console)


def _announce(console: Console):
    def announce(job: str, nodes: list[Node]) -> None:
        block = f" {nodes[0].partition}" if nodes[0].partition else ""
        console.print(
            f"[bold]{job}{block}[/]: {', '.join(node.name for node in nodes)}", highlight=False, soft_wrap=True
        )

    return announce
