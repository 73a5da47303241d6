"""`fourmill weights`: public weights of labellers and tokenizers, verified and kept in the store under their digests."""

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fourmill.core.store import Store, is_local, open_store
from fourmill.pipelines.workspace import Workspace
from fourmill.pseudolabel.labeller import NetworkError
from fourmill.pseudolabel.stored import CARD, Pointer, add_command, origins, read_pointer
from fourmill.runtime.labeller_weights import pinned_labellers, with_weights
from fourmill.runtime.project import Project, write_project
from fourmill.runtime.tokenizer_weights import add_tokenizer, stored_tokenizers, trained_tokenizers, with_tokenizer
from fourmill.tokenize.released import PREFIX, RELEASED, TEXT

# Each network a paragraph that is not filled: \b is typer's mark of one.
_ORIGINS = origins()
_PUBLIC = {**_ORIGINS, **RELEASED}
_NAMES = "\n\n".join(f"\b\n  {name:<17}{one.about}\n{'':19}{one.source}" for name, one in _PUBLIC.items())
_TRAINED = "trained by the project"
_FILES = "\n".join(f"  {add_command(name)}" for name, origin in _ORIGINS.items() if origin.url)

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help=f"""{__doc__}

Add each network once; from then on labellers load it by its digest, with no network, on every machine that reads the
store. An added tokenizer serves a project in the place of one that is trained. Names, and the public weights of each:

{_NAMES}

\b
Examples:
  fourmill weights add depth omnidata_dpt_depth_v2.ckpt --out out/cc12m
{_FILES}
  fourmill weights add semseg hf:facebook/mask2former-swin-base-coco-panoptic --store s3://bucket/cc12m
  fourmill weights add tokenizer_rgb hf:EPFL-VILAB/4M_tokenizers_rgb_16k_224-448 --out out/cc12m
  fourmill weights list --out out/cc12m
""",
)
_console = Console()
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Folder of a project: its store, or store/ in it where there is no project yet."),
]
StoreRoot = Annotated[str | None, typer.Option("--store", help="A store by its root: a folder or s3://bucket/prefix.")]


@app.command(
    help=f"""Verify weights, convert them to safetensors, keep them under their digest with origin and licence.

Every key must fit the network; those that do not are named. Pickles are read without running anything in them. A project
in --out takes the new weights at once, which makes that one label and what is made of it stale. hf: repositories are
downloaded; a file that is published elsewhere is downloaded first:

\b
{_FILES}
"""
)
def add(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(_PUBLIC)}.")],
    source: Annotated[
        str,
        typer.Argument(
            help="hf:OWNER/NAME, a Hugging Face folder, or the file: for depth, normal (.ckpt, .pth), vitdet (.pkl), tokenizers "
            "(.safetensors, .pth) and text (.json)."
        ),
    ],
    out: Out = None,
    store: StoreRoot = None,
    licence: Annotated[
        str | None, typer.Option(help="The weights' licence, for the card; of an hf: repository, what its page says.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of an hf: repository.")] = None,
) -> None:
    """Put weights into a store; a project in `out` takes them at once."""
    if name not in _PUBLIC:
        raise ValueError(f"no weights are called {name!r}; names are {', '.join(_PUBLIC)}")
    kept = _open(out, store)
    kept.check()
    path, origin = Path(source).expanduser(), f"file {Path(source).name}"
    if source.startswith("hf:"):
        from fourmill.runtime.hub import fetch_weights

        fetched = fetch_weights(source.removeprefix("hf:"), revision)
        path, origin, licence = fetched.path, f"{source} at {fetched.commit}", licence or fetched.licence
    # A file says nothing of its own licence, and may be another than the public one.
    licence = licence or f"not stated; the public weights': {_PUBLIC[name].licence}"
    if name in RELEASED:
        _add_tokenizer(kept, name, path, origin, licence, out)
        return
    from fourmill.pseudolabel.convert import add_weights

    try:
        pointer = add_weights(kept, name, path, origin, licence)
    except NetworkError as error:
        raise ValueError(f"{error}. Give the weights that `fourmill weights --help` names for {name}") from error
    typer.echo(f"{name}: stored:{name}/{pointer.digest} in {kept.root} ({pointer.origin}; licence: {pointer.licence})")
    if out is not None and Workspace(out.resolve()).project_file.exists():
        workspace = Workspace(out.resolve())
        weights = f"stored:{name}/{pointer.digest}"
        project = with_weights(workspace.project(), name, weights)
        write_project(project, workspace.project_file)
        labels = [label for label, config in project.labellers.items() if getattr(config, "weights", None) == weights]
        said = f"{', '.join(labels)} now made with them" if labels else _how_to_use(name, weights)
        typer.echo(f"{workspace.project_file}: {said}")


def _how_to_use(name: str, weights: str) -> str:
    origin = _ORIGINS[name]
    labeller = {"kind": origin.kind, "weights": weights}
    return f"no label is made with them yet; for that write {json.dumps({origin.label: labeller})} into its labellers"


def _add_tokenizer(store: Store, name: str, path: Path, origin: str, licence: str, out: Path | None) -> None:
    digest = add_tokenizer(store.root, name, path, origin, licence)
    typer.echo(f"{name}: models/{name}/{digest} in {store.root} ({origin}; licence: {licence})")
    if out is None:
        return
    workspace, label = Workspace(out.resolve()), name.removeprefix(PREFIX)
    if not workspace.project_file.exists():
        typer.echo(
            f"no project at {out} yet that it could serve; make one that it serves from the start: `fourmill run --out "
            f"{shlex.quote(str(out))} --list FILE ... --set served_tokenizers.{label}={digest}`"
        )
        return
    before = workspace.project()
    after = with_tokenizer(before, name, digest)
    write_project(after, workspace.project_file)
    typer.echo(f"{workspace.project_file}: it serves as tokenizers/{label}, without training")
    if after != before:
        typer.echo(
            f"its tokens, and all that is made of them, are stale; the way back: `{_way_back(before, after, out)}`"
        )


def _way_back(before: Project, after: Project, out: Path) -> str:
    """The command line that sets what adding a tokenizer changed to what it was; its networks among it."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    changes = {"served_tokenizers": old["served_tokenizers"], **_changes("text", old["text"], new["text"])}
    for label, config in old["tokenizers"].items():
        changes |= _changes(f"tokenizers.{label}", config, new["tokenizers"][label])
    settings = [f"--set {shlex.quote(f'{key}={json.dumps(value)}')}" for key, value in changes.items()]
    return " ".join(["fourmill run --out", shlex.quote(str(out)), *settings])


def _changes(path: str, old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    return {f"{path}.{key}": value for key, value in old.items() if value != new.get(key)}


@app.command("list")
def list_weights(
    out: Out = None,
    store: StoreRoot = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """The weights in a store: which serve, where they are from, under which licence; and earlier ones."""
    kept = _open(out, store)
    project = _project(out)
    if project is None and is_local(kept.root) and not Path(kept.root).is_dir():
        raise ValueError(
            f"there is nothing at {out or kept.root}: neither a project nor a store; look at the path, or put the first weights "
            "there with `fourmill weights add`"
        )
    pointers = {name: pointer for name in _ORIGINS if (pointer := read_pointer(kept, name))}
    digests = {name: _digests(kept, name) for name in _ORIGINS}
    tokenizers = stored_tokenizers(kept.root)
    served = _served(project)
    trained = trained_tokenizers(project) if project else {}
    if as_json:
        rows: list[dict[str, Any]] = [
            {"name": n, "stored": digests[n], **({"serves": p.model_dump()} if (p := pointers.get(n)) else {})}
            for n in _ORIGINS
        ]
        for name, found in tokenizers.items():
            serves = next((one for one in found if one["digest"] == served.get(name)), None)
            rows.append({"name": name, "imported": found, **({"serves": serves} if serves else {})})
            if name in trained:
                rows[-1] |= {"serves": {"digest": trained[name], "source": _TRAINED}}
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table("name", "serves", "from", "licence", "stored, earlier")
    for name in _ORIGINS:
        pointer = pointers.get(name)
        others = [digest[:12] for digest in digests[name] if pointer is None or digest != pointer.digest]
        table.add_row(name, *_shown(pointer), ", ".join(others))
    for name, found in tokenizers.items():
        if name in trained:
            table.add_row(name, trained[name][:12], _TRAINED, "", "")
        for one in found or ([] if name in trained else [{}]):
            digest = one.get("digest", "")
            shown = (digest[:12], "") if digest and digest == served.get(name) else ("", digest[:12])
            table.add_row(name, shown[0], one.get("source", "none yet"), one.get("licence", ""), shown[1])
    _console.print(table)


@app.command()
def pin(out: Annotated[Path, typer.Option("--out", help="Folder of a project.")]) -> None:
    """Write the digests of the weights that serve now into a project that was made before they were there."""
    workspace = Workspace(out.resolve())
    before = workspace.project()
    project = pinned_labellers(before)
    write_project(project, workspace.project_file)
    changed = [label for label in project.labellers if project.labellers[label] != before.labellers[label]]
    typer.echo(f"{workspace.project_file}: {', '.join(changed) or 'nothing'} pinned")


def _open(out: Path | None, store: str | None) -> Store:
    if (out is None) == (store is None):
        raise ValueError("say where the weights are kept: either --out FOLDER of a project, or --store ROOT")
    if store is not None:
        return open_store(store)
    assert out is not None
    workspace = Workspace(out.resolve())
    return open_store(workspace.project().store if workspace.project_file.exists() else str(workspace.out / "store"))


def _project(out: Path | None) -> Project | None:
    workspace = Workspace(out.resolve()) if out is not None else None
    return workspace.project() if workspace is not None and workspace.project_file.exists() else None


def _served(project: Project | None) -> dict[str, str]:
    """By name: digests of the imported tokenizers that a project serves; a store alone cannot say."""
    served: dict[str, str] = {**project.served_tokenizers} if project else {}
    return {TEXT if label == TEXT else f"{PREFIX}{label}": digest for label, digest in served.items()}


def _digests(store: Store, name: str) -> list[str]:
    return sorted(path.split("/")[2] for path in store.list(f"weights/{name}") if path.endswith(f"/{CARD}"))


def _shown(pointer: Pointer | None) -> tuple[str, str, str]:
    return ("none yet", "", "") if pointer is None else (pointer.digest[:12], pointer.origin, pointer.licence)
