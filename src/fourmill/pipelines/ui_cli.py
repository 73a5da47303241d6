"""`fourmill ui`: Dagster's UI over one project, on loopback."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fourmill.pipelines import environment, preflight
from fourmill.pipelines.workspace import Workspace, routes

# Dagster's own command line, without two warnings that ask nothing of the reader: that another command exists, and that
# the dagster.yaml of the current folder, as at this repository's root, does not serve. A project's own does.
_DAGSTER = """
import logging, warnings
warnings.filterwarnings("ignore", "Function `dev_command` is superseded")
logging.getLogger("dagster").addFilter(lambda record: "in the current folder" not in record.getMessage())
from dagster._cli import main
main()
"""


def ui(
    out: Annotated[Path, typer.Option("--out", help="Folder of the project.")] = Path("out/demo"),
    port: Annotated[
        int,
        typer.Option(min=1, max=65535, help="Port on 127.0.0.1; the UI has no password, so it stays on loopback."),
    ] = 3000,
) -> None:
    """Dagster's UI over a project's state; the demo's pictures are served while it runs, so blocks can be rebuilt.

    Runs that were started from it go on when it ends; `fourmill status` shows them, and the UI, started again, ends them.
    """
    from fourmill.pipelines.open_runs import close_killed
    from fourmill.pipelines.runner import open_instance

    workspace, console = Workspace(out.resolve()), Console()
    workspace.project()
    preflight.check_port(port)
    if killed := close_killed(open_instance(workspace.home)):
        console.print(f"{killed} earlier run(s) ended without a word; they are marked failed")
    with routes(workspace, environment.connect_to()) as connect_to:
        variables = environment.child_environment(workspace.home, workspace.project_file, connect_to)
        command = [sys.executable, "-c", _DAGSTER, "dev", "-m", "fourmill.pipelines.definitions"]
        console.print(f"the UI will be at http://127.0.0.1:{port} in about half a minute; Ctrl-C ends it")
        # Begun by a shell's `&`, this program ignores interrupts, which is right; its servers must not, or nothing ends them. They
        # have a session of their own: Ctrl-C in a terminal would end their runs too.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        command += ["-h", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, env=variables, start_new_session=True)
        signal.signal(signal.SIGINT, before)
        for ending in (signal.SIGTERM, signal.SIGHUP):  # ended politely, or with its terminal, it ends its servers too
            signal.signal(ending, signal.default_int_handler)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            code = process.wait()
    _say_what_goes_on(workspace, console)
    raise typer.Exit(code if code > 0 else 0)


def _say_what_goes_on(workspace: Workspace, console: Console) -> None:
    """Runs are processes of their own, which Dagster leaves alone when its UI ends."""
    from fourmill.pipelines.definitions import build_definitions
    from fourmill.pipelines.open_runs import open_runs
    from fourmill.pipelines.runner import open_instance

    with open_instance(workspace.home) as instance:
        runs = open_runs(instance, build_definitions(workspace.project()).get_repository_def())
    for one in runs:
        if one.state == "running":
            what = "goes on; `fourmill status` shows it, and `fourmill ui`, started again, can end it"
            console.print(f"{one.name} {what}", soft_wrap=True)
        elif one.state == "queued":
            console.print(f"{one.name} waits until `fourmill ui` is started again", soft_wrap=True)
