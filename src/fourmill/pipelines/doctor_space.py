"""`fourmill doctor`: whether the disks that a project writes to have room, each with all that is to lie on it."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fourmill.core.store import is_local
from fourmill.pipelines import preflight
from fourmill.pipelines.doctor_finding import Finding
from fourmill.pseudolabel.config import SceneConfig
from fourmill.runtime.project import Project
from fourmill.tokenize.packed import copies_folder

_STORED_BYTES = 1_000_000  # an image, its labels and its tokens at the paper's sizes (docs/benchmarks.md)
_SCENE_BYTES = 30_000  # the demo's


def space(project: Project) -> Iterator[Finding]:
    """One finding a disk."""
    disks: dict[int, tuple[list[Path], int]] = {}
    for folder, wanted in _wanted(project):
        there = next(p for p in (folder, *folder.parents) if p.exists())
        disk = os.stat(there).st_dev
        folders, before = disks.get(disk, ([], 0))
        disks[disk] = ([*folders, there], before + wanted)
    for folders, wanted in disks.values():
        yield _finding(folders, max(wanted, preflight.MIN_FREE_DISK_MB * 1_000_000))


def _wanted(project: Project) -> Iterator[tuple[Path, int]]:
    """Folders, and the bytes that a whole run leaves or for a time needs in each."""
    feature_dim = project.tokenizers["clip"].feature_dim or 0
    configs = (project.train_set, *project.more_train_sets.values())
    sets = [config.most_bytes(project.input_px, project.patch_px, feature_dim) for config in configs]
    if is_local(project.store):
        each = _SCENE_BYTES if isinstance(project.labellers["depth"], SceneConfig) else _STORED_BYTES
        rows = sum(dataset.layout.num_rows for dataset in project.datasets())
        yield Path(project.store.removeprefix("file://")).absolute(), each * rows + sum(sets)
    else:
        yield copies_folder(), sum(sets)
    yield project.local_folder.absolute(), max(sets)  # a set grows there before it is published


def _finding(folders: list[Path], wanted: int) -> Finding:
    free = shutil.disk_usage(folders[0]).free
    named = ", ".join(dict.fromkeys(map(str, folders)))
    if free >= wanted:
        return Finding("free space", "ok", f"{_gigabytes(free)} in {named}, about {_gigabytes(wanted)} needed")
    return Finding(
        "free space",
        "missing",
        f"{_gigabytes(free)} in {named}, and about {_gigabytes(wanted)} are needed; choose another --out, or a store elsewhere",
    )


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"
