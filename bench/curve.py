"""What longer training of 4M gives: one demo's tokens, 4M trained from them at several lengths, scored on held-out scenes.

Each length is its own training, as `make demo TRAIN_MINUTES=M` does it, in a copy of the demo's store (hard links); the
demo itself is not changed. Minutes count steps (`profiles.STEPS_PER_MINUTE`), so a busy machine gives the same curve.
A training that the demo has done is not repeated.
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.report import report
from fourmill.pipelines.profiles import STEPS_PER_MINUTE, demo
from fourmill.runtime.project import Project, read_project
from fourmill.runtime.samples import Evaluation, evaluate
from fourmill.runtime.session import Session
from fourmill.runtime.training import loss_holds, train_fourm

FIGURES = ("depth_error", "normal_degrees", "classes_miou", "object_iou", "boxes_found", "caption_words")


def _train(project: Project, out: Path, minutes: float, processes: int, store: Path) -> tuple[float, Evaluation]:
    """Loss of the last steps and figures of 4M trained for so many minutes' steps."""
    pretrain = demo(out, minutes).pretrain.model_copy(update={"precision": project.pretrain.precision})
    changed = {"pretrain": pretrain, "store": str(store), "fourm_processes": processes}
    session = Session(project.model_copy(update=changed), "bench", {}, _say)
    trained = train_fourm(session, "fourm")
    if not loss_holds(trained):
        raise SystemExit(
            f"{minutes} minutes: the last loss is not less than 1.1 times the first, so this model does not serve"
        )
    return trained.report["loss_curve"][-1][1], evaluate(session)


def _link_store(store: Path, copy: Path) -> None:
    """A copy in hard links, but for the run folders: their files are written in place."""
    shutil.copytree(
        store,
        copy,
        ignore=shutil.ignore_patterns("runs"),
        copy_function=lambda source, target: Path(target).hardlink_to(source),
    )


def _say(stage: str, done: int, total: int, note: str) -> None:
    if done % max(1, total // 20) == 0:
        print(f"{stage}: {done}/{total} {note}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of a finished `make demo`")
    parser.add_argument("--minutes", type=float, nargs="+", default=[2, 5, 10, 30], help="lengths to train")
    parser.add_argument("--processes", type=int, default=2, help="that share every batch; on a busy machine one")
    parser.add_argument("--quick", action="store_true", help="twenty steps: only that it runs")
    given = parser.parse_args(arguments)
    project = read_project(given.out / "project.json")
    rows: list[list[object]] = []
    figures: dict[str, float] = {}
    baseline: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="curve-", dir=given.out) as folder:
        store = Path(folder) / "store"
        _link_store(Path(project.store), store)
        for minutes in [0.05] if given.quick else sorted(given.minutes):
            loss, found = _train(project, given.out, minutes, given.processes, store)
            rows.append([minutes, round(minutes * STEPS_PER_MINUTE), loss, *(found.figures[name] for name in FIGURES)])
            figures |= {f"{name}_{minutes:g}": found.figures[name] for name in FIGURES}
            baseline = found.baseline
            print(rows[-1], flush=True)
    base = [baseline.get(name, "") for name in FIGURES]
    report("curve", ["minutes", "steps", "loss", *FIGURES], [*rows, ["mean map", "", "", *base]], figures)


if __name__ == "__main__":
    main()
