"""Downloads beside img2dataset: the same local server, in turns; CPU and wall time a URL, and the worker's memory.

Both sides keep proportions, reduce the longer side to 256 pixels, write JPEG q95 into tars with sha256, in two processes
of 64 requests each; img2dataset reads no EXIF here, which it does by default. Ours is `ImageWorker`, what Ray actors run.
CPU is user and system time of the side's processes; the server has one of its own that is not counted. Marginal is what
the calls that make shards take, by clocks around them in the processes that make them: start-up (interpreters, imports,
for the most part) is not in it, and is shown apart.
"""

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.ingest_sides import Cost, Task, ask_ours, run_ours, run_theirs, their_python, their_version
from bench.ingest_site import make_certificate, make_large, make_small, make_tiny, plan, serving
from bench.report import report


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rounds: int
    http_rounds: int  # of the small pictures, whose cost over the limit is told by a few hundredths
    rows: int
    https_rows: int
    large_rows: int
    memory_rows: int


FULL = Sizes(rounds=5, http_rounds=11, rows=2000, https_rows=1000, large_rows=400, memory_rows=100_000)
QUICK = Sizes(rounds=1, http_rounds=1, rows=300, https_rows=40, large_rows=30, memory_rows=1000)


@dataclass
class Scene:
    """One kind of traffic: its task and what the sides took, round by round."""

    name: str
    task: Task
    plan: Path
    ours: list[Cost]
    theirs: list[Cost]
    limits: list[float]  # CPU seconds a URL of bare fetching and the codec

    def a_url(self, side: Sequence[Cost], attribute: str) -> float:
        """Milliseconds a URL; the median of the rounds."""
        return statistics.median(getattr(cost, attribute) for cost in side) / self.task.rows * 1e3


def _play(scene: Scene, turn: int) -> None:
    """One round of a scene: img2dataset, this project, the limits."""
    task = replace(scene.task, folder=f"{scene.task.folder}-{turn}")
    scene.theirs.append(run_theirs(task))
    scene.ours.append(run_ours(task))
    if abs(scene.ours[-1].ok - scene.theirs[-1].ok) > 0.01 * task.rows:  # a busy machine may cost either a timeout
        raise RuntimeError(f"{scene.name}: {scene.ours[-1].ok} images here, {scene.theirs[-1].ok} from img2dataset")
    scene.limits.append(sum(float(str(cost)) for cost in ask_ours("alone", task, str(scene.plan)).values()))
    shutil.rmtree(task.folder)


def _remember(root: Path, sizes: Sizes) -> list[float]:
    """Resident MB after each thousand rows."""
    folder = root / "tiny"
    folder.mkdir()
    make_tiny(folder, 200)
    with serving(plan(sizes.memory_rows, sorted(folder.iterdir()), all_good=True), root) as base:
        found = ask_ours("memory", Task(sizes.memory_rows, base, str(root / "memory"), ""))
    curve = found["rss_mb"]
    assert isinstance(curve, list)
    return curve


def _measure(root: Path, sizes: Sizes, large_px: tuple[int, int]) -> tuple[list[Scene], list[float]]:
    pictures = {"small": root / "small", "large": root / "large"}
    for folder in pictures.values():
        folder.mkdir()
    make_small(pictures["small"], sizes.rows)
    make_large(pictures["large"], min(100, sizes.large_rows), large_px)
    small, large = (sorted(folder.iterdir()) for folder in pictures.values())
    certificate, authorities = make_certificate(root)
    folders = {name: root / name for name in ("http", "https", "2mp")}
    for folder in folders.values():
        folder.mkdir()
    plans = {
        "http": plan(sizes.rows, small),
        "https": plan(sizes.https_rows, small),
        "2mp": plan(sizes.large_rows, large, all_good=True),
    }
    with (
        serving(plans["http"], folders["http"]) as http,
        serving(plans["https"], folders["https"], certificate) as https,
        serving(plans["2mp"], folders["2mp"]) as two_mp,
    ):
        bases = {"http": http, "https": https, "2mp": two_mp}

        def scene(name: str, rows: int) -> Scene:
            task = Task(rows, bases[name], str(root / f"run-{name}"), str(authorities))
            return Scene(name, task, folders[name] / "plan.json", [], [], [])

        scenes = [scene(name, len(rows)) for name, rows in plans.items()]
        for turn in range(sizes.http_rounds):
            for one in scenes:
                if turn < sizes.rounds or one.name == "http":
                    _play(one, turn)
    return scenes, _remember(root, sizes)


def _table(scenes: Sequence[Scene]) -> tuple[list[list[object]], dict[str, float]]:
    rows: list[list[object]] = []
    figures: dict[str, float] = {}
    for scene in scenes:
        sides = {"img2dataset": scene.theirs, "ours": scene.ours}
        cpu = {name: scene.a_url(side, "work_cpu_s") for name, side in sides.items()}
        wall = {name: scene.a_url(side, "work_wall_s") for name, side in sides.items()}
        limit = statistics.median(scene.limits) * 1e3
        for name, side in sides.items():
            start_up = statistics.median(cost.cpu_s - cost.work_cpu_s for cost in side)
            in_all = scene.a_url(side, "cpu_s")
            rows.append([name, scene.name, cpu[name], cpu[name] / limit, in_all, start_up, wall[name], side[-1].ok])
        rows.append(["fetch + codec", scene.name, limit, 1.0, "", "", "", ""])
        figures[f"cpu_cost_ratio_{scene.name}"] = cpu["ours"] / cpu["img2dataset"]
        figures[f"wall_ratio_{scene.name}"] = wall["ours"] / wall["img2dataset"]
        if scene.name == "http":
            figures["cost_over_limit"] = cpu["ours"] / limit
    return rows, figures


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of few rows; ends within a minute")
    parser.add_argument(
        "--large",
        default="2048x1536",
        type=lambda given: tuple(map(int, given.split("x"))),
        help="size of the large pictures, by default one that both decoders reduce by whole numbers",
    )
    given = parser.parse_args()
    sizes = QUICK if given.quick else FULL
    their_python()
    with tempfile.TemporaryDirectory(prefix="fourmill-bench-") as root:
        scenes, curve = _measure(Path(root), sizes, given.large)
    rows, figures = _table(scenes)
    early = curve[len(curve) // 10]
    figures["rss_growth_mb"] = curve[-1] - early
    shown = [curve[i] for i in range(0, len(curve), max(1, len(curve) // 10))] + [curve[-1]]
    print(f"img2dataset {their_version()}; resident MB of one worker over {sizes.memory_rows} rows: {shown}")
    columns = [
        "side",
        "traffic",
        "CPU ms/URL",
        "over limit",
        "with start-up",
        "start-up, CPU s",
        "wall ms/URL",
        "images",
    ]
    report("ingest", columns, rows, figures)


if __name__ == "__main__":
    main()
