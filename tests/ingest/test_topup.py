"""Another try for what may have passed: only those rows are fetched, and only shards that gain are written."""

import pytest

from fourmill.core.names import SPLITS, Layout
from fourmill.core.shards import ShardPlace, read_members, read_receipt
from fourmill.ingest.statuses import MAY_PASS, STATUSES, may_pass


def flaky_block(ingest, site, answer, jpeg) -> None:
    """Shard 0: images, one behind a 503 and one behind a 429; shard 1: images, and failures that stay."""
    answers = {
        "/0": answer(jpeg(0)), "/1": answer(status=503), "/2": answer(jpeg(2)), "/3": answer(status=429),
        "/4": answer(jpeg(4)), "/5": answer(status=404), "/6": answer(b"<html>"), "/7": answer(status=403),
    }  # fmt: skip
    ingest.val_fraction = 0.0
    ingest.number([f"{site.put(path, one)}\tpicture" for path, one in answers.items()])


def mend(site, answer, jpeg) -> None:
    for number in range(8):
        site.put(f"/{number}", answer(jpeg(number)))


def test_only_what_may_pass_is_fetched_again(ingest, site, answer, jpeg, quick_config) -> None:
    ingest.config = quick_config(retries=0)
    flaky_block(ingest, site, answer, jpeg)
    before = ingest.run("block_00")
    mend(site, answer, jpeg)
    site.asked.clear()
    after = ingest.run("block_00", "again", retry_failed=True)
    assert dict(site.counts) == {"/1": 1, "/3": 1}
    assert before.counts == {"http_404": 1, "http_4xx": 2, "http_5xx": 1, "not_an_image": 1, "ok": 3}
    assert after.counts == {"http_404": 1, "http_4xx": 1, "not_an_image": 1, "ok": 5}
    place = ShardPlace("pics", "train", "images", 0)
    assert dict(read_members(ingest.store, place)) == {f"{row:09d}": jpeg(row) for row in range(4)}
    assert ingest.rows()[1]["http_status"] == 200 and ingest.rows()[1]["reason"] is None


def test_a_shard_that_gains_a_sample_gets_a_new_digest_and_others_keep_their_files(
    ingest, site, answer, jpeg, quick_config
) -> None:
    ingest.config = quick_config(retries=0)
    flaky_block(ingest, site, answer, jpeg)
    site.put("/7", answer(status=500))
    before = ingest.run("block_00")
    gains, stays = (ShardPlace("pics", "train", "images", shard) for shard in (0, 1))
    receipts = [read_receipt(ingest.store, place) for place in (gains, stays)]
    times = {path: ingest.store.path(path).stat().st_mtime_ns for path in (stays.tar, stays.rows, stays.receipt)}
    mend(site, answer, jpeg)
    site.put("/7", answer(status=502))  # tried again, in vain
    after = ingest.run("block_00", "again", retry_failed=True)
    assert after.digest != before.digest and after.shards_done == 1
    gained, stayed = (read_receipt(ingest.store, place) for place in (gains, stays))
    assert gained and receipts[0] and gained.content != receipts[0].content and gained.run_id == "again"
    assert gained.recipe == receipts[0].recipe
    assert stayed == receipts[1]
    assert times == {path: ingest.store.path(path).stat().st_mtime_ns for path in times}
    assert site.counts["/7"] == 2


def test_a_top_up_in_vain_changes_nothing(ingest, site, answer, jpeg, quick_config) -> None:
    ingest.config = quick_config(retries=0)
    flaky_block(ingest, site, answer, jpeg)
    before = ingest.run("block_00")
    files = ingest.files()
    after = ingest.run("block_00", "again", retry_failed=True)
    assert (after.digest, after.shards_done) == (before.digest, 0)
    assert ingest.files() == files


def test_what_is_gained_may_be_a_duplicate(ingest, site, answer, jpeg, quick_config) -> None:
    ingest.config = quick_config(retries=0)
    flaky_block(ingest, site, answer, jpeg)
    ingest.run("block_00")
    site.put("/3", answer(jpeg(0)))
    ingest.run("block_00", "again", retry_failed=True)
    assert (ingest.rows()[3]["status"], ingest.rows()[3]["duplicate_of"]) == ("duplicate", "000000000")


def test_a_cut_body_is_tried_again_and_a_cut_picture_is_not(ingest, site, answer, jpeg, quick_config) -> None:
    ingest.config = quick_config(retries=0)
    whole = jpeg(1, 200, 200)
    site.put("/body", answer(whole[:-2000], announce=len(whole)))
    site.put("/picture", answer(whole[:-2000]))
    ingest.number([f"http://pictures.test/{name}\tc" for name in ("body", "picture")])
    assert ingest.run("block_00").counts == {"truncated": 2}
    for name in ("body", "picture"):
        site.put(f"/{name}", answer(whole))
    asked = site.counts
    assert ingest.run("block_00", retry_failed=True).counts == {"ok": 1, "truncated": 1}
    assert site.counts - asked == {"/body": 1}


def test_a_top_up_that_dies_loses_nothing(ingest, site, answer, jpeg, quick_config, die_at_every_change) -> None:
    ingest.config = quick_config(retries=0)

    def prepare() -> None:
        flaky_block(ingest, site, answer, jpeg)
        ingest.run("block_00")
        mend(site, answer, jpeg)
        site.asked.clear()

    prepare()
    whole = ingest.run("block_00", retry_failed=True)
    expected = {path: data for path, data in ingest.files().items() if path.endswith(".tar")}
    deaths = 0
    for _ in die_at_every_change(ingest, prepare, lambda: ingest.run("block_00", retry_failed=True)):
        deaths += 1
        after = ingest.run("block_00", retry_failed=True)
        assert after.digest == whole.digest
        assert {path: data for path, data in ingest.files().items() if path.endswith(".tar")} == expected
        assert set(site.counts) == {"/1", "/3"}  # nothing that was there was asked for again
    assert deaths > 8


def test_after_a_death_the_next_plain_run_has_what_there_was(
    ingest, site, answer, jpeg, quick_config, die_at_every_change
) -> None:
    ingest.config = quick_config(retries=0)

    def prepare() -> None:
        flaky_block(ingest, site, answer, jpeg)
        ingest.run("block_00")
        mend(site, answer, jpeg)
        site.asked.clear()

    for _ in die_at_every_change(ingest, prepare, lambda: ingest.run("block_00", retry_failed=True)):
        assert ingest.run("block_00").num_ok in (3, 5)
        assert set(site.counts) <= {"/1", "/3"}


def test_a_top_up_that_fails_leaves_the_shard_done(ingest, site, answer, jpeg, quick_config, monkeypatch) -> None:
    ingest.config = quick_config(retries=0)
    flaky_block(ingest, site, answer, jpeg)
    ingest.run("block_00")
    before = ingest.files()
    mend(site, answer, jpeg)

    def broken(data, config):
        raise OSError("the decoder is gone")

    with monkeypatch.context() as patch:
        patch.setattr("fourmill.ingest.gather.normalise", broken)
        with pytest.raises(OSError, match="the decoder is gone"):
            ingest.run("block_00", retry_failed=True)
    ledgers = {path for path in before if "/block_" in path}
    assert {path: data for path, data in before.items() if path not in ledgers} == {
        path: data for path, data in ingest.files().items() if path not in ledgers
    }


def test_a_shard_of_nothing_but_failures_may_gain_them_all(ingest, site, answer, jpeg, quick_config) -> None:
    ingest.layout = Layout(rows_per_shard=40, shards_per_block=1, num_blocks=1)
    ingest.config = quick_config(retries=0)
    ingest.number([f"{site.put(f'/{row}', answer(status=503))}\tc" for row in range(40)])
    assert ingest.run("block_00").counts == {"http_5xx": 40}
    for row in range(40):
        site.put(f"/{row}", answer(jpeg(row)))
    assert ingest.run("block_00", retry_failed=True).counts == {"ok": 40}
    assert sum(len(dict(read_members(ingest.store, ShardPlace("pics", s, "images", 0)))) for s in SPLITS) == 40


@pytest.mark.parametrize("status", sorted(STATUSES))
def test_what_may_pass(status: str) -> None:
    outcomes = {may_pass(status, code, arrived) for code in (None, 403, 404, 410, 500) for arrived in (False, True)}
    if status in ("http_4xx", "truncated"):
        return
    assert outcomes == {status in MAY_PASS}


def test_too_many_requests_may_pass_and_forbidden_does_not() -> None:
    assert [may_pass("http_4xx", code, False) for code in (403, 410, 451, 408, 425, 429)] == [False] * 3 + [True] * 3
    assert not {"ok", "duplicate", "opted_out", "bad_row", "http_404", "robots", "refused_address"} & MAY_PASS
    assert MAY_PASS <= STATUSES
