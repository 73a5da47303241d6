"""Tars that img2dataset made say where their pictures came from: opt-outs by domain and URL hold for those as well."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from fourmill.core.names import SPLITS
from fourmill.core.work import ShardJob
from fourmill.ingest.config import SourceConfig
from fourmill.ingest.optout import publish_opt_out
from fourmill.ingest.rows import open_rows
from fourmill.ingest.source import build_source_index, is_current
from fourmill.ingest.stale import blocks_to_rebuild
from fourmill.ingest.worker import ImageWorker, finish_block

URLS = {
    0: "https://kept.test/0.jpg",
    1: "https://www.gone.test/1.jpg",
    2: "http://kept.test/2.jpg",
    3: "http://GONE.test:80/3.jpg",
    4: "http://kept.test/gone.test/4.jpg",
    5: None,
}


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    with tarfile.open(path, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def img2dataset_tar(root: Path, jpeg, urls: Mapping[int, str | None] = URLS) -> SourceConfig:
    """A folder with one tar as img2dataset writes it: picture, caption and JSON a sample."""
    root.mkdir(exist_ok=True)
    members: dict[str, bytes] = {}
    for row, url in urls.items():
        described = {"caption": f"json {row}", "url": url, "key": f"{row:09d}", "status": "success", "width": 24}
        members |= {
            f"{row:09d}.jpg": jpeg(row),
            f"{row:09d}.json": json.dumps(described).encode(),
            f"{row:09d}.txt": f"picture {row}".encode(),
        }
    write_tar(root / "00000.tar", members)
    return SourceConfig(kind="webdataset", root=str(root), val_fraction=0.4)


def run(ingest, source: SourceConfig) -> None:
    """Make both blocks."""
    digest = publish_opt_out(ingest.store, ingest.opt_out)
    where = (ingest.store.root, "pics", ingest.layout, ingest.config)
    with ImageWorker(*where, source=source, opt_out=digest) as worker:
        for block in ingest.layout.block_keys():
            for shard in ingest.layout.shards_of(block):
                for split in SPLITS:
                    worker.run(ShardJob(split, shard, ingest.recipe(split, shard), "run"))
            finish_block(ingest.store, "pics", ingest.layout, block)


def opt_out(ingest, quick_config, *entries: str) -> None:
    path = ingest.folder / "opt_out.txt"
    path.write_text("\n".join(entries))
    ingest.config = quick_config(opt_out=str(path))


def opted_out(ingest) -> list[int]:
    return [row for row, found in sorted(ingest.rows().items()) if found["status"] == "opted_out"]


@pytest.mark.parametrize(
    ("entry", "gone"),
    [
        ("domain:gone.test", [1, 3]),
        ("www.gone.test", [1]),
        ("http://kept.test/0.jpg", [0]),
        ("kept.test", [0, 2, 4]),
        ("url:tar:00000.tar#512+1", []),
    ],
)
@pytest.mark.parametrize("when", ["from the start", "later"])
def test_an_entry_names_what_was_downloaded_from_there(ingest, jpeg, quick_config, entry, gone, when) -> None:
    source = img2dataset_tar(ingest.folder / "tars", jpeg)
    build_source_index(ingest.store, "pics", source, ingest.layout)
    if when == "later":
        run(ingest, source)
        assert {row["status"] for row in ingest.rows().values()} == {"ok"}
    opt_out(ingest, quick_config, entry)
    run(ingest, source)
    assert opted_out(ingest) == gone
    assert {row for row, found in ingest.rows().items() if found["status"] == "ok"} == URLS.keys() - set(gone)
    assert [row["final_url"] for _, row in sorted(ingest.rows().items())] == list(URLS.values())
    assert all(row["http_status"] is None for row in ingest.rows().values())


def test_an_entry_taken_off_brings_the_picture_back(ingest, jpeg, quick_config) -> None:
    source = img2dataset_tar(ingest.folder / "tars", jpeg)
    build_source_index(ingest.store, "pics", source, ingest.layout)
    opt_out(ingest, quick_config, "gone.test")
    run(ingest, source)
    opt_out(ingest, quick_config)
    run(ingest, source)
    assert opted_out(ingest) == [] and len(ingest.rows()) == 6
    assert [row["final_url"] for _, row in sorted(ingest.rows().items())] == list(URLS.values())


def test_only_shards_that_hold_such_pictures_depend_on_the_list(ingest, jpeg, quick_config) -> None:
    source = img2dataset_tar(ingest.folder / "tars", jpeg)
    build_source_index(ingest.store, "pics", source, ingest.layout)
    shards = [(split, shard) for split in SPLITS for shard in range(2)]
    before = {where: ingest.recipe(*where) for where in shards}
    opt_out(ingest, quick_config, "gone.test")
    changed = [where for where in shards if ingest.recipe(*where) != before[where]]
    assert {shard for _, shard in changed} == {0}
    assert blocks_to_rebuild(ingest.store, "pics", ingest.layout, ingest.opt_out) == []  # no block is finished yet


def test_another_origin_is_another_source(ingest, jpeg) -> None:
    source = img2dataset_tar(ingest.folder / "tars", jpeg)
    first = build_source_index(ingest.store, "pics", source, ingest.layout)
    assert is_current(ingest.store, "pics", source)
    img2dataset_tar(ingest.folder / "tars", jpeg, {**URLS, 2: "http://gone.test/2.jpg"})  # of the same length
    assert not is_current(ingest.store, "pics", source)
    assert build_source_index(ingest.store, "pics", source, ingest.layout).digest != first.digest


@pytest.mark.parametrize(
    ("described", "origin"),
    [
        (b'{"url": " http://a.test/x?y=1#z "}', "http://a.test/x?y=1#z"),
        (b'{"url": "https://me:secret@a.test/x"}', "https://a.test/x"),
        (b'{"url": "http://a.test/' + b"x" * 5000 + b'"}', "http://a.test/" + "x" * (2000 - 14)),
        (b'{"url": "http://a.test/\\ud800"}', "http://a.test/\\ud800"),
        (b'{"url": "http://[broken"}', "http://[broken"),
        (b'{"url": ""}', None),
        (b'{"url": 7}', None),
        (b'{"url": null}', None),
        (b'{"caption": "no url"}', None),
        (b'["http://a.test/x"]', None),
        (b"[" * 100_000, None),
        (b"no json", None),
        (b"", None),
        (b'{"url": "http://a.test/x", "more": "' + b"x" * 2**20 + b'"}', None),
    ],
)
@pytest.mark.parametrize("captions", ["auto", "none"])
def test_what_a_json_tells_of_the_origin(tmp_path: Path, described: bytes, origin: str | None, captions: str) -> None:
    write_tar(tmp_path / "a.tar", {"0.jpg": b"picture", "0.txt": b"a cat", "0.json": described})
    config = SourceConfig.model_validate({"kind": "webdataset", "root": str(tmp_path), "captions": captions})
    with open_rows(config) as opened:
        (row,) = [row for batch in opened() for row in batch.to_pylist()]
    assert (row["origin"], row["reason"], row["url"]) == (origin, None, "tar:a.tar#512+7")


def test_other_rows_have_no_origin(ingest, site, answer, jpeg) -> None:
    ingest.number([f"{site.put(f'/{row}', answer(jpeg(row)))}\tc" for row in range(2)])
    with open_rows(SourceConfig(list=str(ingest.folder / "list.tsv"))) as opened:
        assert [row["origin"] for batch in opened() for row in batch.to_pylist()] == [None, None]
    ingest.run("block_00")
    assert [row["final_url"] for _, row in sorted(ingest.rows().items())] == [
        f"http://pictures.test/{n}" for n in range(2)
    ]
