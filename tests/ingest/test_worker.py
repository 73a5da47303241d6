import gc
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from fourmill.core.names import SPLITS, Layout, split_of
from fourmill.core.shards import ShardPlace, read_members, read_receipt
from fourmill.core.work import ShardJob
from fourmill.ingest.config import SourceConfig
from fourmill.ingest.source import build_source_index, shard_source_digest
from fourmill.ingest.worker import IMAGE_COLUMNS, ImageWorker, finish_block


def lines(site, answer, jpeg, num: int, first: int = 0) -> list[str]:
    return [f"{site.put(f'/{i}.jpg', answer(jpeg(i)))}\tpicture {i}" for i in range(first, first + num)]


def forget(store, place: ShardPlace) -> None:
    for path in (place.receipt, place.rows):
        store.delete(path)


def test_every_row_ends_in_one_status(ingest, site, answer, jpeg) -> None:
    listed = lines(site, answer, jpeg, 5)
    site.put("/html", answer(b"<html>"))
    site.put("/cut", answer(jpeg(9, 200, 200)[:-2000]))
    listed += [
        "http://pictures.test/dead\tdead",
        "no tab",
        "ftp://pictures.test/x\tftp",
        "http://pictures.test/html\th",
    ]
    listed += ["http://pictures.test/cut\tcut", "http://127.0.0.1:1/x\tinside", "http://pictures.test/0.jpg\tagain"]
    index = ingest.number(listed)
    reports = [ingest.run(block) for block in ingest.layout.block_keys()]
    rows = ingest.rows()
    assert [rows[row]["status"] for row in range(12)] == [
        *["ok"] * 5, "http_404", "bad_row", "bad_row", "not_an_image", "truncated", "refused_address", "duplicate",
    ]  # fmt: skip
    assert sum(report.num_rows for report in reports) == index.num_rows == len(rows)
    assert [rows[row]["duplicate_of"] for row in (0, 11)] == [None, "000000000"]
    good = rows[1]
    assert (good["url"], good["caption"], good["http_status"]) == ("http://pictures.test/1.jpg", "picture 1", 200)
    assert (good["width"], good["height"], good["original_width"], good["original_height"]) == (24, 16, 24, 16)
    assert good["bytes"] == len(jpeg(1)) and good["sha256"] == good["digest"] and good["attempts"] == 1
    assert good["seconds"] > 0 and good["reason"] is None
    assert all(row["reason"] for row in rows.values() if row["status"] != "ok")
    assert all(row["split"] == split_of(row["url"], ingest.val_fraction) for row in rows.values())
    assert set(IMAGE_COLUMNS.names) < set(good)


def test_shards_hold_the_images_in_key_order(ingest, site, answer, jpeg) -> None:
    ingest.number(lines(site, answer, jpeg, 7))
    ingest.run("block_00")
    found = {}
    for shard in ingest.layout.shards_of("block_00"):
        for split in SPLITS:
            members = dict(read_members(ingest.store, ShardPlace("pics", split, "images", shard)))
            assert list(members) == sorted(members)
            assert all(int(key) // ingest.layout.rows_per_shard == shard for key in members)
            found |= members
    assert found == {f"{row:09d}": jpeg(row) for row in range(7)}


def test_shards_past_the_end_are_done_and_empty(ingest, site, answer, jpeg) -> None:
    ingest.number(lines(site, answer, jpeg, 3))
    report = ingest.run("block_01")
    assert (report.num_rows, report.tar_bytes, report.shards_done) == (0, 0, 4)
    place = ShardPlace("pics", "train", "images", 3)
    receipt = read_receipt(ingest.store, place)
    assert receipt and receipt.counts == {} and receipt.tar_sha256 is None and not ingest.store.exists(place.tar)
    assert ingest.run("block_01").shards_done == 0 and not site.asked


def test_two_runs_give_equal_bytes(ingest, site, answer, jpeg) -> None:
    listed = [*lines(site, answer, jpeg, 6), "http://pictures.test/0.jpg\tagain", "nothing"]
    site.put("/3.jpg", answer(jpeg(3), status=200), answer(status=500), answer(jpeg(3)))
    ingest.number(listed)
    first = ingest.run("block_00", "one")
    tars = {path: data for path, data in ingest.files().items() if path.endswith(".tar")}
    for path in ingest.store.list("pics"):
        ingest.store.delete(path)
    second = ingest.run("block_00", "two")
    assert first.digest == second.digest and first.counts == second.counts
    assert tars == {path: data for path, data in ingest.files().items() if path.endswith(".tar")}


def test_a_resumed_block_fetches_only_what_is_missing(ingest, site, answer, jpeg) -> None:
    ingest.number(lines(site, answer, jpeg, 8))
    done = ingest.run("block_00")
    assert sum(site.counts.values()) == 8
    assert ingest.run("block_00").shards_done == 0 and sum(site.counts.values()) == 8
    lost = ShardPlace("pics", "train", "images", 1)
    ingest.store.delete(lost.receipt)
    ingest.store.delete(lost.rows)  # as a run that was killed in this shard leaves it
    again = ingest.run("block_00")
    assert again.shards_done == 1 and again.digest == done.digest
    asked_twice = {path for path, times in site.counts.items() if times == 2}
    assert asked_twice == {
        f"/{row}.jpg" for row, found in ingest.rows().items() if row >= 4 and found["split"] == "train"
    }


@pytest.mark.parametrize("lost", ["receipt", "tar", "cut tar"])
def test_images_that_prove_themselves_are_not_fetched_again(ingest, site, answer, jpeg, lost) -> None:
    ingest.val_fraction = 0.0
    ingest.number(lines(site, answer, jpeg, 4))
    done = ingest.run("block_00")
    place = ShardPlace("pics", "train", "images", 0)
    if lost == "cut tar":
        ingest.store.write(place.tar, ingest.store.read(place.tar)[:3000])
        ingest.store.delete(place.receipt)
    else:
        ingest.store.delete(place.tar if lost == "tar" else place.receipt)
    assert ingest.run("block_00").digest == done.digest
    asked_twice = {path for path, times in site.counts.items() if times == 2}
    assert len(asked_twice) == {"receipt": 0, "tar": 4, "cut tar": 2}[lost]
    assert dict(read_members(ingest.store, place)) == {f"{row:09d}": jpeg(row) for row in range(4)}


def test_an_edited_list_fetches_only_rows_with_another_url(ingest, site, answer, jpeg) -> None:
    listed = lines(site, answer, jpeg, 8)
    ingest.number(listed)
    ingest.run("block_00")
    listed[2], listed[3] = listed[2] + " in other words", lines(site, answer, jpeg, 1, first=50)[0]
    ingest.number(listed)
    ingest.run("block_00")
    rows = ingest.rows()
    assert sum(site.counts.values()) == 9 and site.counts["/50.jpg"] == 1
    assert rows[2]["caption"] == "picture 2 in other words" and rows[2]["status"] == "ok"
    assert rows[3]["url"].endswith("/50.jpg") and rows[3]["status"] == "ok"


def test_the_recipe_knows_what_matters(ingest, site, answer, jpeg, quick_config) -> None:
    ingest.number(lines(site, answer, jpeg, 8))
    before = ingest.recipe("train", 1)
    assert before.inputs == {"source": shard_source_digest(ingest.store, "pics", 1)} and before.stage == "images"
    ingest.config = quick_config(concurrency=2, per_host=1, retries=0, total_timeout_s=1, connect_timeout_s=1)
    assert ingest.recipe("train", 1) == before
    ingest.config = quick_config(max_side_px=99)
    assert ingest.recipe("train", 1) != before


def test_a_list_numbered_for_another_layout_is_refused(ingest, site, answer, jpeg) -> None:
    ingest.number(lines(site, answer, jpeg, 8))
    other = Layout(rows_per_shard=3, shards_per_block=2, num_blocks=2)
    worker = ImageWorker(ingest.store.root, "pics", other, ingest.config, site.connect_to)
    with pytest.raises(ValueError, match="materialize pics/source_index again"):
        worker.run(ShardJob("train", 1, ingest.recipe("train", 1), "run"))


def test_downloads_of_a_shard_run_at_once_within_bounds(ingest, site, answer, jpeg, quick_config) -> None:
    ingest.layout = Layout(rows_per_shard=30, shards_per_block=1, num_blocks=1)
    ingest.config = quick_config(concurrency=4, per_host=30)
    ingest.number(lines(site, answer, jpeg, 30))
    assert ingest.run("block_00").counts == {"ok": 30}
    assert site.most_at_once <= 4


def begun_since(before: set[threading.Thread]) -> list[str]:
    """Threads of workers; what an earlier test's failure still holds is none of them."""
    return [t.name for t in set(threading.enumerate()) - before if t.name.startswith(("decode", "downloads"))]


def test_a_worker_may_run_in_any_thread(ingest, site, answer, jpeg) -> None:
    before = set(threading.enumerate())
    ingest.number(lines(site, answer, jpeg, 4))
    worker = ImageWorker(ingest.store.root, "pics", ingest.layout, ingest.config, site.connect_to)
    with ThreadPoolExecutor(2) as pool:
        jobs = [ShardJob(split, 0, ingest.recipe(split, 0), "run") for split in SPLITS]
        receipts = list(pool.map(worker.run, jobs))
    assert sum(receipt.num_ok for receipt in receipts) == 4
    worker.close()
    worker.close()
    assert begun_since(before) == []
    with pytest.raises(RuntimeError, match="was closed"):
        ingest.store.delete(ShardPlace("pics", "train", "images", 0).rows)
        worker.run(jobs[0])


def test_a_worker_that_is_forgotten_closes_what_it_opened(ingest, site, answer, jpeg) -> None:
    before = set(threading.enumerate())
    ingest.number(lines(site, answer, jpeg, 4))
    worker = ingest.worker()
    worker.run(ShardJob("train", 0, ingest.recipe("train", 0), "run"))
    assert "downloads" in begun_since(before)
    del worker
    gc.collect()
    assert begun_since(before) == []


def test_connections_live_on_over_shards(ingest, site, answer, jpeg, quick_config) -> None:
    ingest.config = quick_config(concurrency=1)
    ingest.number(lines(site, answer, jpeg, 16))
    for block in ingest.layout.block_keys():
        ingest.run(block)
    assert sum(site.counts.values()) == 16 and site.connections == 2  # a worker each block


def test_duplicates_within_and_across_shards_blocks_and_splits(ingest, site, answer, jpeg) -> None:
    # rows: 0=A 1=B 2=A | 3.. fillers | other shards and blocks repeat A and B under URLs of their own
    same = {0: 100, 1: 101, 2: 100, 5: 101, 7: 100, 8: 100, 13: 101, 15: 100}
    listed = [f"{site.put(f'/u{row}', answer(jpeg(same.get(row, row))))}\tc{row}" for row in range(16)]
    ingest.number(listed)
    for block in ingest.layout.block_keys():
        ingest.run(block)
    rows = ingest.rows()
    marked = {row: int(found["duplicate_of"]) for row, found in rows.items() if found["status"] == "duplicate"}
    assert marked == {2: 0, 5: 1, 7: 0, 8: 0, 13: 1, 15: 0}
    assert {rows[row]["split"] for row in (0, *marked)} == {"train", "val"}  # one key space for both
    for row in marked:
        place = ShardPlace("pics", rows[row]["split"], "images", row // 4)
        assert f"{row:09d}" not in dict(read_members(ingest.store, place))
        assert rows[row]["sha256"] and rows[row]["digest"] is None and rows[row]["seconds"] > 0
    for shard in range(4):
        for split in SPLITS:
            receipt = read_receipt(ingest.store, ShardPlace("pics", split, "images", shard))
            assert receipt and receipt.run_id == "run" and receipt.recipe == ingest.recipe(split, shard)


def test_marking_again_changes_no_byte(ingest, site, answer, jpeg) -> None:
    listed = [f"{site.put(f'/u{row}', answer(jpeg(row % 3)))}\tc" for row in range(16)]
    ingest.number(listed)
    for block in ingest.layout.block_keys():
        ingest.run(block)
    before = ingest.files()
    for block in reversed(ingest.layout.block_keys()):
        finish_block(ingest.store, "pics", ingest.layout, block)
    assert ingest.files() == before


def test_a_mark_stays_when_its_first_is_gone_and_moves_to_an_earlier_one(ingest, site, answer, jpeg) -> None:
    listed = [f"{site.put(f'/u{row}', answer(jpeg(1 if row in (6, 12) else row + 50)))}\tc" for row in range(16)]
    ingest.number(listed)
    for block in ingest.layout.block_keys():
        ingest.run(block)
    assert ingest.rows()[12]["duplicate_of"] == "000000006"
    for change, first in ((jpeg(77), "000000006"), (jpeg(1), "000000006")):
        site.put("/u6", answer(change))
        place = ShardPlace("pics", ingest.rows()[6]["split"], "images", 1)
        forget(ingest.store, place)
        for block in ingest.layout.block_keys():
            ingest.run(block)
        assert (ingest.rows()[12]["status"], ingest.rows()[12]["duplicate_of"]) == ("duplicate", first)
    site.put("/u2", answer(jpeg(1)))
    forget(ingest.store, ShardPlace("pics", ingest.rows()[2]["split"], "images", 0))
    for block in ingest.layout.block_keys():
        ingest.run(block)
    assert [ingest.rows()[row]["duplicate_of"] for row in (2, 6, 12)] == [None, "000000002", "000000002"]


def test_pictures_at_hand_take_the_same_way(ingest, site, jpeg, quick_config) -> None:
    root = ingest.folder / "tree"
    for row in range(6):
        (root / "n01").mkdir(parents=True, exist_ok=True)
        (root / "n01" / f"{row}.jpg").write_bytes(jpeg(row % 5))
    (root / "n01" / "6.jpg").write_bytes(b"<html>")
    source = SourceConfig(kind="folder", root=str(root), val_fraction=0.4)
    build_source_index(ingest.store, "pics", source, ingest.layout)
    (root / "n01" / "1.jpg").unlink()

    def run(retry_failed: bool) -> dict[str, int]:
        where = (ingest.store.root, "pics", ingest.layout, quick_config())
        with ImageWorker(*where, source=source, retry_failed=retry_failed) as worker:
            for shard in ingest.layout.shards_of("block_00"):
                for split in SPLITS:
                    worker.run(ShardJob(split, shard, ingest.recipe(split, shard), "run"))
        finish_block(ingest.store, "pics", ingest.layout, "block_00")
        return dict(Counter(row["status"] for row in ingest.rows().values()))

    assert run(False) == {"duplicate": 1, "missing": 1, "not_an_image": 1, "ok": 4}
    assert ingest.rows()[1]["url"] == "file:n01/1.jpg" and ingest.rows()[0]["bytes"] == len(jpeg(0))
    (root / "n01" / "1.jpg").write_bytes(jpeg(60))
    assert run(True) == {"duplicate": 1, "not_an_image": 1, "ok": 5}
    assert not site.asked


def test_a_worker_that_does_not_know_where_they_lie_says_so(ingest, jpeg) -> None:
    root = ingest.folder / "tree"
    (root / "n01").mkdir(parents=True)
    (root / "n01" / "0.jpg").write_bytes(jpeg(0))
    ingest.val_fraction = 0.0
    source = SourceConfig(kind="folder", root=str(root), val_fraction=0.0)
    build_source_index(ingest.store, "pics", source, ingest.layout)
    with pytest.raises(ValueError, match=r"file:n01/0\.jpg is a picture at hand"):
        ingest.run("block_00")


def test_a_worker_on_a_machine_without_them_makes_no_shard(ingest, jpeg, quick_config) -> None:
    root = ingest.folder / "tree"
    (root / "n01").mkdir(parents=True)
    (root / "n01" / "0.jpg").write_bytes(jpeg(0))
    source = SourceConfig(kind="folder", root=str(root), val_fraction=0.0)
    build_source_index(ingest.store, "pics", source, ingest.layout)
    root.rename(ingest.folder / "elsewhere")
    with ImageWorker(ingest.store.root, "pics", ingest.layout, quick_config(), source=source) as worker:
        with pytest.raises(ValueError, match="mount it, then run again"):
            worker.run(ShardJob("train", 0, ingest.recipe("train", 0), "run"))
    assert not ingest.files()
