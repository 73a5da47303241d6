"""The whole chain at its smallest, as a user runs it: list to page, again, traced, and killed."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fourmill.core.ledger import read_ledger
from fourmill.core.manifest import read_manifest
from fourmill.core.names import SPLITS
from fourmill.core.shards import ShardPlace, read_members
from fourmill.core.store import LocalStore
from fourmill.pipelines.digests import all_digests
from fourmill.pipelines.workspace import Workspace

pytestmark = pytest.mark.ray
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def store_of(out: Path) -> LocalStore:
    return LocalStore(Workspace(out).project().store)


def manifest_of(out: Path):
    store = store_of(out)
    (path,) = [p for p in store.list("cc12m/manifests") if p.endswith(".json")]
    return read_manifest(store, path)


def test_it_ends_in_a_page_and_a_picture(smallest_demo: Path) -> None:
    page = (smallest_demo / "report" / "index.html").read_text()
    assert page.count("data:image/png;base64,") >= 8
    assert (smallest_demo / "report" / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_every_row_of_the_list_is_accounted_for(smallest_demo: Path) -> None:
    store, project = store_of(smallest_demo), Workspace(smallest_demo).project()
    tables = [
        read_ledger(store, "cc12m", split, "images", block) for split in SPLITS for block in project.layout.block_keys()
    ]
    keys = sorted(key for table in tables for key in table["key"].to_pylist())
    assert keys == [f"{row:09d}" for row in range(project.layout.num_rows)]
    statuses = {status for table in tables for status in table["status"].to_pylist()}
    assert {"ok", "http_404", "bad_row"} <= statuses
    manifest = manifest_of(smallest_demo)
    in_tars = sum(manifest.num_samples(split) for split in SPLITS)
    assert in_tars + sum(manifest.missing.values()) == project.layout.num_rows


def test_every_folder_holds_the_same_keys_in_the_same_order(smallest_demo: Path) -> None:
    store, manifest = store_of(smallest_demo), manifest_of(smallest_demo)
    for split in SPLITS:
        for entry in manifest.splits[split]:
            keys = {
                folder: [key for key, _ in read_members(store, ShardPlace("cc12m", split, folder, entry.shard))]
                for folder in entry.tars
            }
            assert len(set(map(tuple, keys.values()))) == 1, (split, entry.shard)
            assert len(keys["rgb"]) == entry.count


def test_a_second_call_does_nothing_again(smallest_demo: Path, fourmill: Run) -> None:
    before = all_digests(smallest_demo)
    done = fourmill("demo", "--out", str(smallest_demo), "--profile", "smallest")
    assert done.returncode == 0, done.stderr
    assert "nothing was done again" in done.stdout
    assert all_digests(smallest_demo) == before


def test_status_says_ok_everywhere(smallest_demo: Path, fourmill: Run) -> None:
    done = fourmill("status", "--out", str(smallest_demo), "--json")
    nodes = json.loads(done.stdout)
    assert {node["state"] for node in nodes} == {"ok"}
    assert {node["block"] for node in nodes} == {None, "block_00", "block_01"}


def test_a_checkpoint_is_traced_to_a_url(smallest_demo: Path, fourmill: Run) -> None:
    done = fourmill("trace", "fourm", "--out", str(smallest_demo), "--json")
    tree = json.loads(done.stdout)
    (sample,) = [value for key, value in tree.items() if key.startswith("sample ")]
    assert sample["url"].startswith("http://scenes.fourmill.test/")
    assert sample["tokens/shards"]["status"] == "ok"
    assert sample["labels/depth"]["weights"]
    assert tree["manifest"]["digest"] == manifest_of(smallest_demo).digest
    by_digest = fourmill("trace", tree["fourm"]["digest"], "--out", str(smallest_demo), "--json")
    assert json.loads(by_digest.stdout) == tree


def test_a_fine_tune_is_traced_to_both_resolutions(smallest_demo: Path, fourmill: Run) -> None:
    done = fourmill("trace", "superres", "--out", str(smallest_demo), "--json")
    tree = json.loads(done.stdout)
    (sample,) = [value for key, value in tree.items() if key.startswith("sample ")]
    assert (
        sample["tokens/tok_rgb@32"]["weights"]
        == sample["tokens/tok_rgb@64"]["weights"]
        == tree["tokenizers"]["rgb"]["digest"]
    )
    assert tree["manifest"]["digest"] == manifest_of(smallest_demo).digest
    assert manifest_of(smallest_demo).modalities["tok_rgb@32"].grid == 4


def test_a_dead_link_is_traced_to_its_reason(smallest_demo: Path, fourmill: Run) -> None:
    ledger = read_ledger(store_of(smallest_demo), "cc12m", "train", "images", "block_00").to_pylist()
    key = next(row["key"] for row in ledger if row["status"] == "http_404")
    done = fourmill("trace", key, "--out", str(smallest_demo), "--json")
    assert json.loads(done.stdout)["images"]["status"] == "http_404"


def test_a_lost_ledger_is_made_again_with_the_same_digest(smallest_demo: Path, tmp_path: Path, fourmill: Run) -> None:
    """A folder that was moved is a project of its own: its paths are in project.json."""
    out = tmp_path / "out"
    shutil.copytree(smallest_demo, out)
    text = (out / "project.json").read_text().replace(str(smallest_demo), str(out))
    (out / "project.json").write_text(text)
    before = all_digests(out)
    LocalStore(out / "store").delete("cc12m/train/_ledger/depth/block_01.parquet")
    done = fourmill("demo", "--out", str(out), "--profile", "smallest")
    assert done.returncode == 0, done.stderr
    assert "label_block block_01" in done.stdout
    assert all_digests(out) == before


def test_killed_in_the_middle_it_ends_with_the_same_digests(smallest_demo: Path, tmp_path: Path, fourmill: Run) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fourmill.pipelines.cli", "demo", "--out", str(out), "--profile", "smallest"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("tokenizers/depth"):
            break
    orphans = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not psutil.wait_procs(orphans, timeout=180)[1]
    done = fourmill("demo", "--out", str(out), "--profile", "smallest")
    assert done.returncode == 0, done.stderr
    assert "ended without a word" in done.stdout
    assert all_digests(out) == all_digests(smallest_demo)
