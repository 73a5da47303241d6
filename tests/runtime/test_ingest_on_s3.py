"""The ingest stage with its store on S3, Ray's actors and all: what comes out is what a disk gives."""

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fourmill.core.ledger import write_ledger
from fourmill.core.names import SPLITS, Layout
from fourmill.core.shards import ShardPlace, finished
from fourmill.core.store import open_store
from fourmill.core.work import ShardJob
from fourmill.ingest.config import IngestConfig, SourceConfig
from fourmill.ingest.duplicates import finish_block
from fourmill.ingest.source import build_source_index
from fourmill.ingest.worker import ImageWorker, images_recipe

DRIVER = Path(__file__).parents[1] / "data" / "ingest_block.py"
ROWS_PER_SHARD = 8


@pytest.mark.ray
@pytest.mark.servers
def test_actors_on_s3_make_what_a_disk_holds_though_the_server_dies_twice(
    mortal: Any, pictures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = mortal.fresh_root(monkeypatch)
    deaths: list[int] = []  # numbers of the requests for pictures that the store dies at
    lock = threading.Lock()

    def maybe_die(number: int) -> None:
        with lock:
            if deaths and number >= deaths[0]:
                deaths.pop(0)
                mortal.kill()
                mortal.start()

    pictures.on_request = maybe_die
    stores = [str(tmp_path / "store"), f"{root}/calm", f"{root}/rough"]
    driver = drive(pictures, tmp_path, stores, mortal.environment)
    disk, calm = next(driver), next(driver)
    each = pictures.asked // 2
    deaths += [pictures.asked + each // 3, pictures.asked + 2 * each // 3]
    rough = next(driver)
    assert disk["blocks"]["block_00"][1]["ok"] > 20 and disk["made_again"] == [0, 0]
    assert disk["blocks"]["block_01"][1]["duplicate"] >= 1
    assert calm == disk
    assert not deaths and pictures.asked >= 3 * each
    assert rough == disk


def drive(pictures: Any, out: Path, stores: list[str], environment: dict[str, str]) -> Iterator[dict[str, Any]]:
    """What the driver says of each store, as soon as it says it."""
    given = {"out": str(out), "list": str(pictures.list), "connect_to": pictures.connect_to, "stores": stores}
    command = [sys.executable, str(DRIVER), json.dumps({**given, "rows_per_shard": ROWS_PER_SHARD})]
    with (out / "log.txt").open("w+") as log:
        with subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process:
            assert process.stdout
            yield from (json.loads(line) for line in process.stdout if line.startswith("{"))
        log.seek(0)
        pytest.fail(f"the driver ended with code {process.returncode}:\n{log.read()[-4000:]}")


def test_a_worker_on_s3_makes_the_digests_of_a_disk(
    s3: Any, pictures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk, on_s3 = (make_block(root, pictures) for root in (str(tmp_path / "store"), s3.fresh_root(monkeypatch)))
    assert on_disk == on_s3 and on_disk[1]


@pytest.mark.parametrize("name", ["list.tsv", "list.tsv.gz"])
def test_a_list_in_a_bucket_is_numbered_as_one_on_a_disk(
    s3: Any, pictures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    text = pictures.list.read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    bucket = open_store(s3.fresh_root(monkeypatch))
    bucket.write(f"lists/{name}", (tmp_path / name).read_bytes())
    layout = Layout(rows_per_shard=ROWS_PER_SHARD, shards_per_block=4, num_blocks=2)
    made = [
        build_source_index(bucket, dataset, SourceConfig(list=place), layout)
        for dataset, place in {"disk": str(tmp_path / name), "bucket": f"{bucket.root}/lists/{name}"}.items()
    ]
    assert made[0].num_rows == made[1].num_rows == len(text.splitlines())
    assert made[0].digest == made[1].digest
    gone = SourceConfig(list=f"{bucket.root}/lists/gone.tsv")
    with pytest.raises(ValueError, match=r"gone\.tsv"):
        build_source_index(bucket, "gone", gone, layout)


def make_block(root: str, pictures: Any) -> tuple[str, dict[str, int], dict[str, bytes]]:
    """The second block in this process: digest, counts, tars."""
    store, layout = open_store(root), Layout(rows_per_shard=ROWS_PER_SHARD, shards_per_block=4, num_blocks=2)
    config = IngestConfig(retry_wait_s=0.0, max_retry_wait_s=0.0)
    build_source_index(store, "pics", SourceConfig(list=str(pictures.list), val_fraction=0.25), layout)
    shards = layout.shards_of("block_01")
    with ImageWorker(root, "pics", layout, config, pictures.connect_to) as worker:
        for shard in shards:
            for split in SPLITS:
                recipe = images_recipe(store, "pics", config, split, shard)
                worker.run(ShardJob(split, shard, recipe, "run"))
                assert finished(store, ShardPlace("pics", split, "images", shard), recipe)
    finish_block(store, "pics", layout, "block_01")
    report = write_ledger(store, "pics", "images", "block_01", shards, "pics/images", 8)
    return report.digest, report.counts, {p: store.read(p) for p in store.list("pics") if p.endswith(".tar")}
