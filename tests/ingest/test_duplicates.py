"""Exact duplicates over blocks, made in any order and killed at any point."""

import random

import numpy as np
import pytest

from fourmill.core.names import SPLITS, Layout
from fourmill.core.shards import ShardPlace, read_members, read_receipt
from fourmill.core.tar import TarError
from fourmill.core.work import ShardJob
from fourmill.ingest.digest_index import RECORD, buckets, find, has_index, index_path, sort_records
from fourmill.ingest.duplicates import copies_elsewhere, finish_block


def listed(site, answer, jpeg, pictures: list[int]) -> list[str]:
    """A list whose row r shows picture `pictures[r]` under a URL of its own."""
    return [f"{site.put(f'/u{row}', answer(jpeg(one)))}\tc{row}" for row, one in enumerate(pictures)]


def firsts(rows: dict[int, dict]) -> dict[int, int]:
    return {row: int(found["duplicate_of"]) for row, found in rows.items() if found["status"] == "duplicate"}


def expected(pictures: list[int]) -> dict[int, int]:
    return {row: pictures.index(one) for row, one in enumerate(pictures) if pictures.index(one) != row}


@pytest.mark.parametrize("seed", range(3))
def test_in_any_order_of_blocks_every_copy_is_found_in_the_end(ingest, site, answer, jpeg, seed: int) -> None:
    rng = random.Random(seed)
    ingest.layout = Layout(rows_per_shard=3, shards_per_block=2, num_blocks=4)
    pictures = [rng.randrange(12) for _ in range(24)]
    ingest.number(listed(site, answer, jpeg, pictures))
    blocks = rng.sample(ingest.layout.block_keys(), 4)
    named: set[str] = set()
    for block in blocks:
        ingest.run(block)
        named |= set(copies_elsewhere(ingest.store, "pics", ingest.layout, block))
    asked = sum(site.counts.values())
    for block in sorted(named):
        assert ingest.run(block).shards_done == 0
    assert sum(site.counts.values()) == asked  # only this pass was run
    assert set(firsts(ingest.rows())) == set(expected(pictures))
    assert not any(copies_elsewhere(ingest.store, "pics", ingest.layout, block) for block in blocks)


def test_blocks_in_order_name_the_very_first(ingest, site, answer, jpeg) -> None:
    pictures = [0, 1, 0, 2, 2, 3, 1, 4, 0, 5, 3, 4, 6, 7, 0, 7]
    ingest.number(listed(site, answer, jpeg, pictures))
    for block in ingest.layout.block_keys():
        ingest.run(block)
        assert copies_elsewhere(ingest.store, "pics", ingest.layout, block) == {}
    assert firsts(ingest.rows()) == expected(pictures)


def test_a_later_block_is_named_when_an_earlier_one_gains_what_it_holds(
    ingest, site, answer, jpeg, quick_config
) -> None:
    ingest.config = quick_config(retries=0)
    ingest.number(listed(site, answer, jpeg, [0, 1, 2, 3, 4, 5, 6, 7, 8, 1, 9, 10, 11, 12, 13, 1]))
    site.put("/u1", answer(status=503))
    for block in ingest.layout.block_keys():
        ingest.run(block)
    assert firsts(ingest.rows()) == {15: 9}
    site.put("/u1", answer(jpeg(1)))
    ingest.run("block_00", retry_failed=True)
    assert copies_elsewhere(ingest.store, "pics", ingest.layout, "block_00") == {"block_01": 1}
    assert copies_elsewhere(ingest.store, "pics", ingest.layout, "block_01") == {"block_01": 1}
    ingest.run("block_01")
    assert firsts(ingest.rows()) == {9: 1, 15: 1}
    assert copies_elsewhere(ingest.store, "pics", ingest.layout, "block_00") == {}


def test_marking_that_dies_loses_nothing(ingest, site, answer, jpeg, die_at_every_change) -> None:
    pictures = [0, 1, 0, 2, 2, 3, 1, 4]

    def prepare() -> None:
        ingest.number(listed(site, answer, jpeg, pictures))
        with ingest.worker() as worker:
            for shard in ingest.layout.shards_of("block_00"):
                for split in SPLITS:
                    worker.run(ShardJob(split, shard, ingest.recipe(split, shard), "run"))
        site.asked.clear()

    prepare()
    whole = ingest.run("block_00")
    deaths = 0
    for _ in die_at_every_change(
        ingest, prepare, lambda: finish_block(ingest.store, "pics", ingest.layout, "block_00")
    ):
        deaths += 1
        assert ingest.run("block_00").digest == whole.digest
        assert not site.asked  # marking never needs a picture twice
        assert firsts(ingest.rows()) == expected(pictures)
    assert deaths > 8


def test_a_shard_keeps_its_run_its_recipe_and_its_seconds(ingest, site, answer, jpeg) -> None:
    ingest.number(listed(site, answer, jpeg, [0, 0, 1, 1, 0, 1, 0, 1]))
    ingest.run("block_00", "first")
    for shard in range(2):
        for split in SPLITS:
            receipt = read_receipt(ingest.store, ShardPlace("pics", split, "images", shard))
            assert receipt and receipt.run_id == "first" and receipt.recipe == ingest.recipe(split, shard)


def test_an_unfinished_block_is_not_looked_up(ingest, site, answer, jpeg) -> None:
    ingest.number(listed(site, answer, jpeg, [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 20, 21, 22, 23, 24, 25]))
    ingest.run("block_00")
    for split in SPLITS:
        ingest.store.delete(f"pics/{split}/_ledger/images/block_00.parquet")  # its checks failed
    ingest.run("block_01")
    assert firsts(ingest.rows()) == {}
    ingest.run("block_00")
    assert copies_elsewhere(ingest.store, "pics", ingest.layout, "block_00") == {"block_01": 2}


def test_a_block_without_an_index_is_given_one(ingest, site, answer, jpeg) -> None:
    ingest.number(listed(site, answer, jpeg, [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 20, 21, 22, 23, 24, 25]))
    ingest.run("block_00")
    indexes = [index_path("pics", split, "block_00") for split in SPLITS]
    before = [ingest.store.read(path) for path in indexes]
    for path in indexes:
        ingest.store.delete(path)
    ingest.run("block_01")
    assert has_index(ingest.store, "pics", "block_00") and [ingest.store.read(path) for path in indexes] == before
    assert firsts(ingest.rows()) == {8: 0, 9: 1}


def test_a_tar_without_an_image_that_its_rows_name_is_said(ingest, site, answer, jpeg) -> None:
    ingest.val_fraction = 0.0
    ingest.number(listed(site, answer, jpeg, [0, 1, 2, 3, 4, 5, 6, 7]))
    ingest.run("block_00")
    place = ShardPlace("pics", "train", "images", 1)
    site.put("/u2", answer(jpeg(4)))
    for path in (ShardPlace("pics", "train", "images", 0).rows, ShardPlace("pics", "train", "images", 0).receipt):
        ingest.store.delete(path)
    ingest.store.write(place.tar, ingest.store.read(place.tar)[:1024])
    with pytest.raises(TarError, match=r"does not hold the image of 000000005.*only that image"):
        ingest.run("block_00")
    ingest.store.delete(place.receipt)
    assert ingest.run("block_00").counts == {"duplicate": 1, "ok": 7}
    assert len(dict(read_members(ingest.store, place))) == 3


def test_an_index_is_what_its_description_says(ingest, site, answer, jpeg) -> None:
    ingest.number(listed(site, answer, jpeg, [0, 1, 0, 2, 3, 4, 5, 6]))
    ingest.run("block_00")
    rows = {row: found for row, found in ingest.rows().items() if found["status"] == "ok"}
    seen = 0
    for split in SPLITS:
        data = ingest.store.read(index_path("pics", split, "block_00"))
        counts = np.frombuffer(data, "<u8", 256, 16)
        images = [(data[2064 + 40 * i :][:32], int.from_bytes(data[2064 + 40 * i + 32 :][:8], "little")) for i in
                  range(int(counts.sum()))]  # fmt: skip
        assert data[:16] == b"fourmill sha256\n" and len(data) == 2064 + 40 * len(images)
        assert images == sorted(images)
        assert images == sorted((bytes.fromhex(r["sha256"]), n) for n, r in rows.items() if r["split"] == split)
        for bucket in buckets(ingest.store, "pics", split, "block_00"):
            first = {record["sha256"][0] for record in bucket}
            assert len(first) == 1 and counts[first.pop()] == len(bucket)
            seen += len(bucket)
    assert seen == len(rows) == 7


@pytest.mark.parametrize("damage", [b"", b"something else entirely" * 200, None])
def test_a_damaged_index_is_said(ingest, site, answer, jpeg, damage: bytes | None) -> None:
    ingest.val_fraction = 0.0
    ingest.number(listed(site, answer, jpeg, [0, 1]))
    ingest.run("block_00")
    path = index_path("pics", "train", "block_00")
    ingest.store.write(path, ingest.store.read(path)[:-1] if damage is None else damage)
    with pytest.raises(ValueError, match=r"block_00.digests .*delete it"):
        list(buckets(ingest.store, "pics", "train", "block_00"))


def test_digests_that_end_in_zeros_are_told_apart() -> None:
    digests = [b"\1" * 31 + b"\0", b"\1" * 30 + b"\0\0", b"\0" * 32, b"\xff" * 32]
    records = sort_records(np.array([(digest, row) for row, digest in enumerate(digests)], RECORD))
    assert records["row"].tolist() == [2, 1, 0, 3]
    at, there = find(records["sha256"], records)
    assert at.tolist() == [0, 1, 2, 3] and there.all()
    assert not find(records["sha256"][:0], records)[1].any()
    assert not find(records["sha256"], np.array([(b"\2" * 32, 0)], RECORD))[1].any()
