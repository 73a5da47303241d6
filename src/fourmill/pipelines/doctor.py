"""`fourmill doctor`: whether this machine has all that a project needs, and what to do about what it lacks."""

import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fourmill.core.store import check_writable, is_local
from fourmill.pipelines import preflight
from fourmill.pipelines.doctor_finding import Finding, State
from fourmill.pipelines.doctor_pythons import stage_pythons
from fourmill.pipelines.doctor_space import space
from fourmill.pipelines.profiles import PROFILES, profile
from fourmill.pipelines.workspace import Workspace
from fourmill.runtime.labeller_weights import missing_weights, pinned_labellers
from fourmill.runtime.project import Project
from fourmill.runtime.ray_session import RayConfig, check_reachable
from fourmill.runtime.tokenizer_weights import missing_tokenizers

_LIBRARIES = ("torch", "torchvision", "transformers", "timm", "safetensors", "ray", "dagster")


def doctor(
    out: Annotated[
        Path, typer.Option("--out", help="Folder of a project; without one, --profile says what it would be.")
    ] = Path("out/demo"),
    profile_name: Annotated[
        str | None, typer.Option("--profile", help=f"Look at this profile, not at the folder's: {', '.join(PROFILES)}.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """What a project needs and this machine lacks: weights, libraries, GPU, store, Ray, space. Exit code 1 if anything.

    Stored weights are read whole, and compared with the digest that they are named by.
    """
    workspace = Workspace(out.resolve())
    if profile_name is None and workspace.project_file.exists():
        project = workspace.project()
    else:
        project = profile(profile_name or "demo", workspace.out)
    findings = list(examine(pinned_labellers(project)))
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        _print(project, findings)
    raise typer.Exit(1 if any(finding.state == "missing" for finding in findings) else 0)


def examine(project: Project) -> Iterator[Finding]:
    """Look at everything; nothing is changed, and no Ray is started."""
    yield from _libraries()
    yield _gpu(project.ray)
    yield from _weights(project)
    yield from stage_pythons(project)
    for dataset in project.datasets():
        source = dataset.source
        yield _checked(f"source of {dataset.name}", source.where, partial(preflight.check_source, source))
    yield _checked("store", f"{project.store} can be written", lambda: _check_store(project.store))
    where = project.ray.address or "a local one will be started"
    yield _checked("Ray", where, lambda: check_reachable(project.ray))
    yield from space(project)
    yield _checked("memory", "enough", preflight.check_memory)


def _checked(what: str, fine: str, check: Callable[[], None]) -> Finding:
    try:
        check()
    except (ValueError, OSError) as error:
        return Finding(what, "missing", str(error))
    return Finding(what, "ok", fine)


def _check_store(root: str) -> None:
    """Whether it can be written; the folders that finding out makes are removed again, so that looking leaves nothing."""
    path = Path(root.removeprefix("file://")).absolute()
    made = [folder for folder in (path, *path.parents) if not folder.exists()] if is_local(root) else []
    try:
        check_writable(root)
    finally:
        for folder in made:
            with suppress(OSError):  # never made, or in use by another program by now
                folder.rmdir()


def _libraries() -> Iterator[Finding]:
    for name in _LIBRARIES:
        try:
            yield Finding(name, "ok", version(name))
        except PackageNotFoundError:
            yield Finding(name, "missing", f"not installed; install fourmill[ml,pipeline], or {name} alone")


def _gpu(ray: RayConfig) -> Finding:
    shares = [ray, *(ray.for_stage(name) for name in ray.stages)]
    wanted = max(share.gpus_per_worker for share in shares)
    if importlib.util.find_spec("torch") is None:
        return Finding("GPU", "note", "cannot tell without torch")
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found:
        return Finding("GPU", "ok", f"{found}: {torch.cuda.get_device_name(0)}")
    if not wanted:
        return Finding("GPU", "ok", "none, and none is asked for")
    if ray.address not in (None, "local"):
        return Finding("GPU", "note", f"none here; those of the cluster at {ray.address} are used")
    return Finding(
        "GPU",
        "missing",
        f"stages ask for {wanted:g} a worker, and torch {torch.__version__} sees none: look at nvidia-smi and at torch's build, "
        "give ray.address of a cluster that has them, or set gpus_per_worker to 0",
    )


def _weights(project: Project) -> Iterator[Finding]:
    missing = missing_weights(project, is_thorough=True)
    for label, config in project.labellers.items():
        named = getattr(config, "weights", "no weights needed")
        state: State = "missing" if label in missing else "ok"
        yield Finding(f"labeller of {label}", state, missing.get(label, f"{config.kind}: {named}"))
    lacking = missing_tokenizers(project)
    for label, digest in project.served_tokenizers.items():
        fine: State = "missing" if label in lacking else "ok"
        yield Finding(f"tokenizer of {label}", fine, lacking.get(label, f"imported, {digest[:12]}"))


def _print(project: Project, findings: list[Finding]) -> None:
    table = Table("", "", f"profile {project.profile}")
    marks = {"ok": "[green]ok", "missing": "[red]missing", "note": "[yellow]note"}
    for finding in findings:
        table.add_row(finding.what, marks[finding.state], finding.detail)
    console = Console()
    console.print(table)
    missing = sum(finding.state == "missing" for finding in findings)
    console.print(f"{missing} missing" if missing else "nothing is missing")
