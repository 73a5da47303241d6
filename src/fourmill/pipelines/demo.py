"""`fourmill demo` and `fourmill run`: prepare, check, materialize, show."""

from collections.abc import Mapping, Sequence

from rich.console import Console

from fourmill.ingest.config import SourceConfig
from fourmill.ingest.demo_source import DEMO_HOST, write_demo_list
from fourmill.pipelines import environment, preflight, profiles
from fourmill.pipelines.definitions import build_definitions
from fourmill.pipelines.edits import with_settings
from fourmill.pipelines.lists import Choice, list_project, with_grown_list
from fourmill.pipelines.live import live_progress
from fourmill.pipelines.open_runs import close_killed
from fourmill.pipelines.runner import materialize_all, open_instance
from fourmill.pipelines.status import Node
from fourmill.pipelines.summary import print_summary
from fourmill.pipelines.workspace import Workspace, routes
from fourmill.pseudolabel.config import SceneConfig
from fourmill.runtime.labeller_weights import pinned_labellers
from fourmill.runtime.project import Project
from fourmill.runtime.ray_session import stop_ray
from fourmill.runtime.tokenizer_weights import missing_tokenizers, with_tokenizer
from fourmill.tokenize.released import PREFIX, TEXT

SCENE_SEED = 0


def run_demo(workspace: Workspace, profile: str, train_minutes: float | None, console: Console) -> None:
    """The chain on generated scenes.

    Raises:
        ValueError: the machine, the profile or the folder is not fit for it.
    """
    project = pinned_labellers(profiles.profile(profile, workspace.out, train_minutes))
    if not isinstance(project.labellers["depth"], SceneConfig):
        raise ValueError(
            f"the demo is of generated scenes, and the labellers of {profile} are for photographs: give them a list, "
            f"`fourmill run --profile {profile} --list FILE --labellers stored --out FOLDER`"
        )
    with preflight.only_one(workspace.out):
        project = workspace.keep(still_served(workspace, project))
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
    source: Mapping[str, str],
    choice: Choice,
    profile: str,
    train_minutes: float,
    console: Console,
    *,
    store: str | None = None,
    retry_failed: bool = False,
    settings: Sequence[str] = (),
) -> None:
    """Any list, or pictures at hand, through the same assets.

    Args:
        source: the fields of a SourceConfig that say where it lies.
        store: root of the store, a folder or s3://bucket/prefix; below the workspace by default.
        retry_failed: ask again for images whose failure may have passed.
        settings: values of the project, as `ingest.per_host=4`.

    Raises:
        ValueError: the source, the labellers or the machine is not fit for it.
    """
    base = profiles.profile(profile, workspace.out, train_minutes)
    if store is not None:
        base = base.model_copy(update={"store": store, "scratch": str(workspace.out / "scratch")})
    base = base.model_copy(update={"source": SourceConfig.model_validate({**base.source.model_dump(), **source})})
    base = with_settings(base, settings)
    preflight.check_source(base.source)
    before = workspace.project() if workspace.project_file.exists() else None
    project = with_settings(list_project(base, choice, before), settings)
    with preflight.only_one(workspace.out):
        project = workspace.keep(still_served(workspace, project))
        preflight.check_machine(project)
        _materialize(workspace, project, console, retry_failed)


def run_kept(
    workspace: Workspace, console: Console, *, retry_failed: bool = False, settings: Sequence[str] = ()
) -> None:
    """The project that the folder holds, as its `project.json` says.

    Args:
        settings: values to change in it first.

    Raises:
        ValueError: there is none, or the machine is not fit for it.
    """
    with preflight.only_one(workspace.out):
        kept = workspace.project()
        named = with_settings(kept, settings) if settings else kept
        pinned = pinned_labellers(named)  # weights may have come into the store since the project was made
        preflight.check_machine(pinned)
        project = with_grown_list(pinned)  # and rows into its list
        if project != kept:
            workspace.change(project)
        for label, config in project.labellers.items():
            if config != named.labellers[label]:
                console.print(f"{label}: made with {getattr(config, 'weights', '')} from now on", soft_wrap=True)
        if (now := project.layout.num_blocks) != (then := named.layout.num_blocks):
            console.print(f"the list has grown: {now} blocks from now on, {then} until now", soft_wrap=True)
        _materialize(workspace, project, console, retry_failed)


def still_served(workspace: Workspace, project: Project) -> Project:
    """The project with the networks of its imported tokenizers, and with those that the folder's project names.

    They come by `fourmill weights add tokenizer_rgb`, or by --set served_tokenizers.rgb=DIGEST. One that is not in the store
    is said by `preflight`.
    """
    before = workspace.project().served_tokenizers if workspace.project_file.exists() else {}
    served = {**before, **project.served_tokenizers}
    if missing_tokenizers(named := project.model_copy(update={"served_tokenizers": served})):
        return named
    for label, digest in served.items():
        project = with_tokenizer(project, label if label == TEXT else f"{PREFIX}{label}", digest)
    return project


def _materialize(workspace: Workspace, project: Project, console: Console, retry_failed: bool = False) -> None:
    instance = open_instance(workspace.home)
    if killed := close_killed(instance, alone=True):
        console.print(f"{killed} earlier run(s) ended without a word; continuing from what they finished")
    try:
        with routes(workspace, environment.connect_to()) as connect_to, live_progress(console) as listener:
            defs = build_definitions(project, connect_to, listener)
            runs = materialize_all(defs, project, instance, _announce(console), retry_failed, _warn(console))
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


def _warn(console: Console):
    def warn(warning: str) -> None:
        console.print(f"[yellow]warning:[/] {warning}", highlight=False, soft_wrap=True)

    return warn
