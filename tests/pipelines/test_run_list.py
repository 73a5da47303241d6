"""Any list through the same assets: ordinary pictures behind real HTTP, and what the scene labellers say of them."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fourmill.ingest.demo_source import serve_folder
from fourmill.pipelines.digests import all_digests

pytestmark = pytest.mark.ray
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def pictures(tmp_path: Path) -> Iterator[Path]:
    """A list of 24 pictures of several shapes that are no scenes, served on loopback."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(24):
        small = rng.integers(0, 255, (6, 4 + i % 5, 3), np.uint8)
        picture = Image.fromarray(small).resize((90 + 7 * i, 120), Image.Resampling.BICUBIC)
        picture.save(tmp_path / "images" / f"{i}.jpg")
    with serve_folder(tmp_path) as port:
        lines = [f"http://127.0.0.1:{port}/images/{i}.jpg\tcolours number {i}\n" for i in range(24)]
        (tmp_path / "list.tsv").write_text("".join(lines))
        yield tmp_path / "list.tsv"


def run(fourmill: Run, pictures: Path, labellers: str, *more: str) -> "subprocess.CompletedProcess[str]":
    out = str(pictures.parent / "out")
    options = ("--labellers", labellers, "--profile", "smallest")
    return fourmill("run", "--list", str(pictures), "--out", out, *options, *more)


def test_ordinary_pictures_run_through_the_whole_chain(pictures: Path, fourmill: Run) -> None:
    done = run(fourmill, pictures, "seeded", "--allow-host", "127.0.0.1", "--labels", "canny")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "labels/canny" in done.stdout
    assert (pictures.parent / "out" / "report" / "index.html").is_file()
    out = pictures.parent / "out"
    assert "fourm/samples" in all_digests(out)
    before = json.loads((out / "project.json").read_text())
    before["ingest"]["per_host"] = 3
    (out / "project.json").write_text(json.dumps(before))
    on = fourmill("run", "--out", str(out), "--set", "ingest.lookups=7")
    assert on.returncode == 0 and "everything is up to date" in on.stdout, on.stdout[-2000:] + on.stderr[-2000:]
    after = json.loads((out / "project.json").read_text())
    assert (after["ingest"].pop("per_host"), after["ingest"].pop("lookups")) == (3, 7)
    assert after["ingest"].items() <= before["ingest"].items() and after["labellers"] == before["labellers"]


def test_scene_labellers_refuse_them_and_say_what_to_choose(pictures: Path, fourmill: Run) -> None:
    done = run(fourmill, pictures, "scene", "--allow-host", "127.0.0.1")
    assert done.returncode == 1
    message = " ".join(done.stderr.split())
    assert "labels" in message
    assert "--labellers seeded" in message
    assert "Traceback" not in message


def test_loopback_is_refused_unless_allowed_by_name(pictures: Path, fourmill: Run) -> None:
    done = run(fourmill, pictures, "seeded")
    assert done.returncode == 1
    assert "decodable" in " ".join(done.stderr.split())
