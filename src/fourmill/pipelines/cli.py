"""From a list of image URLs and captions to a pretrained 4M, every stage an asset of Dagster.

Begin with `fourmill demo`, then `fourmill ui`; then your own list: `fourmill run --list FILE --out FOLDER --labellers seeded`, and with
real networks `fourmill weights` and `fourmill doctor`. What was done is never done again.

Exit codes: 0 done, 1 failed, 2 misused.
"""

import json
import logging
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console

from fourmill.pipelines import environment, weights_cli
from fourmill.pipelines.doctor import doctor
from fourmill.pipelines.profiles import PROFILES
from fourmill.pipelines.status_cli import status
from fourmill.pipelines.ui_cli import ui
from fourmill.pipelines.workspace import Workspace
from fourmill.pseudolabel.choices import Detector
from fourmill.pseudolabel.members import OWN
from fourmill.runtime.project import problems_of
from fourmill.tokenize.released import RELEASED

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help=__doc__, rich_markup_mode=None, pretty_exceptions_enable=False
)
app.add_typer(weights_cli.app, name="weights")
_console = Console()
Out = Annotated[Path, typer.Option("--out", help="Folder of the project: store, Dagster's state, pictures.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
_INTERRUPTED = 130  # as typer ends a program after Ctrl-C
_DEMO_OUT = Path("out/demo")
_RUN_MINUTES = 0.5  # of 4M's training on a list


@app.command()
def demo(
    out: Out = _DEMO_OUT,
    train_minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Length of 4M's training, in minutes of an idle 2-core machine; default 3."),
    ] = None,
    profile: Annotated[str, typer.Option(help="Sizes: demo, or smallest, whose figures mean nothing.")] = "demo",
) -> None:
    """The whole chain on generated scenes: list, images, labels, tokenizers, tokens, 4M, pictures.

    Everything is real except the labels, which are read from each scene's own description. A second call does no
    work twice; a killed one is continued.
    """
    from fourmill.pipelines.demo import run_demo

    _check_minutes(train_minutes, profile)
    run_demo(Workspace(out.resolve()), profile, train_minutes, _console)


@app.command()
def run(
    out: Out,
    list_place: Annotated[
        str | None,
        typer.Option(
            "--list", help="Path, s3://... or https://... of a TSV (`URL<TAB>caption` a line), CSV or Parquet file."
        ),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="In place of a list: a tree of class folders with pictures (ImageNet's layout).")
    ] = None,
    tars: Annotated[
        Path | None, typer.Option(help="In place of a list: a folder of webdataset tars, img2dataset's among them.")
    ] = None,
    labellers: Annotated[
        str | None,
        typer.Option(
            help="stored (real networks, see `fourmill weights`), seeded (tiny random ones), scene (the demo's pictures only), "
            "or a folder of networks; by default the profile's, where it has real ones."
        ),
    ] = None,
    detector: Annotated[
        Detector | None,
        typer.Option(help="Of the stored ones: ViTDet, or one of transformers'; by default the profile's."),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A host that may have a private or loopback address; repeat for more.")
    ] = None,
    num_blocks: Annotated[
        int | None, typer.Option(help="Blocks to cut the list into; by default one a 200,000 rows.")
    ] = None,
    train_minutes: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Length of 4M's training at the demo's sizes, in minutes of an idle 2-core machine; default 0.5.",
        ),
    ] = None,
    profile: Annotated[str, typer.Option(help=f"Sizes: {', '.join(PROFILES)}.")] = "demo",
    opt_out: Annotated[
        Path | None,
        typer.Option(help="Text file of what to leave out, one a line: domain:example.org, url:..., sha256:..."),
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="Where the data goes: a folder or s3://bucket/prefix; below --out by default.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Ask again for images whose failure may have passed.")
    ] = False,
    labels: Annotated[
        list[str] | None,
        typer.Option(help=f"A label beside depth, normal, semseg and det: {', '.join(OWN)}. Repeat for more."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any value of project.json: source.url_column=link, ingest.per_host=4. Repeat for more."
        ),
    ] = None,
) -> None:
    """Any CC12M-style list, or pictures at hand, through the same assets, at the demo's sizes.

    The folder keeps the project as project.json. Without a source, `fourmill run --out FOLDER` goes on with what that says.
    A command with a source changes what it names; what was edited by hand otherwise stays.
    """
    from fourmill.pipelines.demo import run_kept, run_list
    from fourmill.pipelines.lists import Choice

    _check_minutes(train_minutes, profile)
    sources = [
        {"list": list_place if "://" in list_place else str(Path(list_place).resolve())} if list_place else None,
        {"list": "", "kind": "folder", "root": str(folder.resolve())} if folder else None,
        {"list": "", "kind": "webdataset", "root": str(tars.resolve())} if tars else None,
    ]
    given = [source for source in sources if source]
    workspace = Workspace(out.resolve())
    if len(given) > 1:
        raise ValueError(
            "give one of --list, --folder and --tars; more data sets go into project.json as more_datasets"
        )
    if not given:
        if labellers or detector or allow_host or num_blocks or opt_out or store or labels or train_minutes is not None:
            raise ValueError(
                "these options go with --list, --folder or --tars; change a project that is there with --set, for instance --set "
                """'labellers.canny={"kind":"canny"}'"""
            )
        run_kept(workspace, _console, retry_failed=retry_failed, settings=settings or [])
        return
    run_list(
        workspace,
        given[0],
        Choice(
            labellers=labellers,
            detector=detector,
            allow_hosts=allow_host or [],
            num_blocks=num_blocks,
            opt_out=str(opt_out.resolve()) if opt_out else None,
            labels=labels or [],
        ),
        profile,
        _RUN_MINUTES if train_minutes is None else train_minutes,
        _console,
        store=store,
        retry_failed=retry_failed,
        settings=settings or [],
    )


@app.command()
def trace(
    what: Annotated[
        str, typer.Argument(help="A model (fourm, text2im, superres, a digest) or a sample, by its row number.")
    ] = "fourm",
    out: Out = _DEMO_OUT,
    sample: Annotated[str | None, typer.Option(help="Follow this sample, by its row number, down to its URL.")] = None,
    as_json: AsJson = False,
) -> None:
    """From a checkpoint back to the URLs: manifest, shards, tokenizers, labellers, list, sample."""
    from fourmill.runtime.session import Session
    from fourmill.runtime.trace import trace_anything

    tree = trace_anything(Session(Workspace(out.resolve()).project()), what, sample)
    if as_json:
        typer.echo(json.dumps(tree, indent=1))
    else:
        _print_tree(tree)


@app.command("export")
def export_model(
    name: Annotated[str, typer.Argument(help=f"A tokenizer that serves: {', '.join(RELEASED)}.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    out: Out = _DEMO_OUT,
) -> None:
    """Write a tokenizer as files that the public 4M loads: model.safetensors and config.json; of text, tokenizer.json."""
    from fourmill.runtime.tokenizer_weights import export_tokenizer

    project = Workspace(out.resolve()).project()
    export_tokenizer(project, name, target.expanduser().resolve())
    typer.echo(f"{name} written to {target}")


for command in (status, ui, doctor):
    app.command()(command)


def _check_minutes(train_minutes: float | None, profile: str) -> None:
    """See that a length of 4M's training is given to a profile that has one.

    Raises:
        ValueError: it is given to another, whose length is in steps.
    """
    if train_minutes is not None and profile in PROFILES and profile != "demo":
        raise ValueError(
            f"--train-minutes goes with --profile demo; the steps of {profile} are fixed: change them with --set pretrain.steps=N"
        )


def _print_tree(tree: dict[str, object], indent: int = 0) -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            _console.print(f"{'  ' * indent}[bold]{key}", highlight=False)
            _print_tree(value, indent + 1)
        else:
            _console.print(f"{'  ' * indent}{key}: {value}", highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line; expected errors are one message, not a traceback."""
    from fourmill.pipelines.runner import RunFailedError

    environment.calm_threads()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended politely, it ends as by Ctrl-C
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        app()
    except RunFailedError as error:
        Console(stderr=True).print(f"[red]failed:[/] {error}", soft_wrap=True)
        sys.exit(1)
    except SystemExit as ended:
        if ended.code == _INTERRUPTED:
            Console(stderr=True).print("[red]interrupted[/]; the same command goes on with what is left")
        raise
    except ValidationError as error:
        Console(stderr=True).print("[red]config:[/] " + "; ".join(problems_of(error)), soft_wrap=True)
        sys.exit(2)
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"[red]cannot start:[/] {error}", soft_wrap=True)
        sys.exit(2)
    except Exception as error:
        if not type(error).__module__.startswith("sqlalchemy."):
            raise
        cause = getattr(error, "orig", error)
        Console(stderr=True).print(
            f"[red]failed:[/] Dagster's state in the project's folder cannot be read or written ({cause}): is the disk full? "
            "Make room (`fourmill doctor` says how much); the same command goes on with what is left",
            soft_wrap=True,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
