"""The table at the end: stage, samples, seconds, figure, baseline, and where to look."""

from typing import Any

import dagster as dg
from rich.console import Console
from rich.table import Table

from fourmill.core.modality import IMAGE_TOKENS
from fourmill.core.store import open_store
from fourmill.pipelines.workspace import Workspace
from fourmill.runtime.page import GRID_PATH, PATH
from fourmill.runtime.project import Project
from fourmill.runtime.token_assets import token_assets

Row = tuple[str, str, str, str, str]


def print_summary(project: Project, instance: dg.DagsterInstance, workspace: Workspace, console: Console) -> None:
    """Print what every stage made, from the latest materializations, and the paths of page and grid."""
    table = Table("stage", "samples", "seconds", "figure", "baseline", title=f"{project.dataset}: {project.profile}")
    for row in summary_rows(project, instance):
        table.add_row(*row)
    console.print(table)
    page, grid = publish_report(project, workspace)
    console.print(f"page: {page}", soft_wrap=True, highlight=False)
    console.print(f"grid: {grid}", soft_wrap=True, highlight=False)


def publish_report(project: Project, workspace: Workspace) -> tuple[str, str]:
    """Put the page and the grid where a person finds them: `report/` of the project's folder.

    From where they lie in the store, not from where a materialization saw them: a project's folder may have been moved.
    """
    workspace.page.parent.mkdir(parents=True, exist_ok=True)
    targets = workspace.page, workspace.page.with_name("samples.png")
    store = open_store(project.store)
    for path, target in zip((PATH, GRID_PATH), targets, strict=True):
        target.write_bytes(store.read(project.runs_path(path)))
    return str(targets[0]), str(targets[1])


def summary_rows(project: Project, instance: dg.DagsterInstance) -> list[Row]:
    """One row a stage; blocks are added up."""
    blocks = project.layout.block_keys()
    data = project.dataset
    rows = [_row(instance, f"{data}/source_index", [None]), _row(instance, f"{data}/images", blocks)]
    rows += [_row(instance, f"labels/{label}", blocks) for label in project.stored_labels()]
    rows.append(_row(instance, "tokenizers/train_set", [None]))
    rows += [_row(instance, f"tokenizers/{name}", [None]) for name in (*IMAGE_TOKENS, "text")]
    rows += [_row(instance, f"tokens/{name}", blocks) for name in token_assets(project)]
    rows += [_row(instance, "tokens/shards", blocks), _row(instance, "tokens/manifest", [None])]
    models = ["pretrain", "text2im"] if project.superres is None else ["pretrain", "text2im", "superres"]
    rows += [_row(instance, f"fourm/{name}", [None]) for name in models]
    return [*rows, *_evaluation_rows(instance)]


def _row(instance: dg.DagsterInstance, asset: str, partitions: list[Any]) -> Row:
    facts = [_facts(instance, dg.AssetKey(asset.split("/")), partition) for partition in partitions]
    counts = [f.get("dagster/partition_row_count", f.get("dagster/row_count")) for f in facts]
    samples = f"{sum(c for c in counts if c is not None)}" if any(c is not None for c in counts) else ""
    seconds = f"{sum(f.get('seconds', 0.0) for f in facts):.1f}"
    figure, baseline = _headline(facts[0]) if len(facts) == 1 else ("", "")
    return asset, samples, seconds, figure, baseline


def _headline(facts: dict[str, Any]) -> tuple[str, str]:
    """The figure a stage is known by; its name is kept in the metadata."""
    name = facts.get("headline")
    if name is None:
        return (f"loss {facts['loss']:.3f}", "") if "loss" in facts else ("", "")
    value, easy = facts.get(f"figure/{name}"), facts.get(f"baseline/{name}")
    return (
        "" if value is None else f"{name} {value:.3f}",
        "" if easy is None else f"{easy:.3f}",
    )


def _evaluation_rows(instance: dg.DagsterInstance) -> list[Row]:
    facts = _facts(instance, dg.AssetKey(["fourm", "evaluation"]), None)
    names = [key.removeprefix("figure/") for key in facts if key.startswith("figure/")]
    rows: list[Row] = []
    for i, name in enumerate(names):
        easy = facts.get(f"baseline/{name}")
        figure, baseline = f"{name} {facts[f'figure/{name}']:.3f}", "" if easy is None else f"{easy:.3f}"
        if i == 0:
            rows.append(("fourm/evaluation", f"{facts['samples']}", f"{facts['seconds']:.1f}", figure, baseline))
        else:
            rows.append(("", "", "", figure, baseline))
    return rows


def _facts(instance: dg.DagsterInstance, key: dg.AssetKey, partition: str | None) -> dict[str, Any]:
    record = instance.get_latest_data_version_record(key, partition_key=partition)
    if record is None or record.asset_materialization is None:
        return {}
    return {name: value.value for name, value in record.asset_materialization.metadata.items()}
