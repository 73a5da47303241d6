"""`fourmill status`: what is there, what is missing and why, and which runs are at it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fourmill.pipelines.workspace import Workspace

if TYPE_CHECKING:  # `fourmill --help` loads no Dagster
    from fourmill.pipelines.open_runs import OpenRun
    from fourmill.pipelines.status import Node

_COLOURS = {"ok": "green", "missing": "yellow", "failed": "red", "stale": "yellow", "waiting": "dim"}
_OF_KILLED = "its process was killed; the next `fourmill run` goes on from what it had finished, and `fourmill ui` marks it failed"


def status(
    out: Annotated[Path, typer.Option("--out", help="Folder of the project.")] = Path("out/demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Every asset and block: ok, missing, failed, stale, or waiting for something upstream; and the runs that are at them."""
    from fourmill.pipelines.definitions import build_definitions
    from fourmill.pipelines.open_runs import open_runs
    from fourmill.pipelines.outside import changed_outside
    from fourmill.pipelines.runner import open_instance
    from fourmill.pipelines.status import read_status
    from fourmill.runtime.session import Session

    workspace = Workspace(out.resolve())
    project = workspace.project()
    defs, store, instance = build_definitions(project), Session(project).store, open_instance(workspace.home)
    nodes = read_status(defs.resolve_asset_graph(), instance, store, changed_outside(project, store))
    runs = open_runs(instance, defs.get_repository_def())
    if as_json:
        typer.echo(json.dumps([_row(node, runs) for node in nodes], indent=1))
    else:
        _print(nodes, runs, Console())


def _row(node: "Node", runs: "list[OpenRun]") -> dict[str, object]:
    at_it = [{"id": one.run_id, "state": one.state} for one in _at(node, runs)]
    return {"asset": node.name, "block": node.partition, "state": node.state, "reason": node.reason, "runs": at_it}


def _at(node: "Node", runs: "list[OpenRun]") -> "list[OpenRun]":
    """The runs that are to make a place, or have made it already, and have not ended."""
    return [one for one in runs if one.makes((node.key, node.partition))]


def _print(nodes: "list[Node]", runs: "list[OpenRun]", console: Console) -> None:
    table = Table("asset", "block", "state", "why")
    for node in nodes:
        at_it = [f"{one.name}: {one.state}" for one in _at(node, runs) if node.state != "ok"]
        why = "; ".join(filter(None, [node.reason, *at_it]))
        table.add_row(node.name, node.partition or "", f"[{_COLOURS[node.state]}]{node.state}", why)
    console.print(table)
    for one in runs:
        told = f"{one.state}; {_OF_KILLED}" if one.state == "killed" else one.state
        console.print(f"{one.name}: {told}", highlight=False, soft_wrap=True)
