"""One shard of one stage: published whole, done by receipt, redone when its recipe changes."""

from pathlib import Path

import pytest

from fourmill.core.ledger import read_ledger, write_ledger
from fourmill.core.names import SPLITS, sample_key
from fourmill.core.shards import (
    Item,
    MissingShardError,
    Recipe,
    ShardPlace,
    finished,
    need,
    read_members,
    read_receipt,
    read_remembered,
    read_rows,
    write_shard,
)
from fourmill.core.store import LocalStore
from fourmill.core.tar import TarError

RECIPE = Recipe(stage="depth", code_version="1", inputs={"images": "abc"})
PLACE = ShardPlace("cc12m", "train", "depth", 0)


def items() -> list[Item]:
    return [
        Item(sample_key(1), ext="png", data=b"one"),
        Item(sample_key(2), status="rejected", reason="too small"),
        Item(sample_key(4), ext="png", data=b"four"),
    ]


def test_a_shard_holds_the_ok_samples_and_a_row_for_each(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    receipt = write_shard(store, PLACE, RECIPE, items(), "run")
    assert list(read_members(store, PLACE)) == [("000000001", b"one"), ("000000004", b"four")]
    assert read_rows(store, PLACE)["status"].to_pylist() == ["ok", "rejected", "ok"]
    assert receipt.counts == {"ok": 2, "rejected": 1}
    assert finished(store, PLACE, RECIPE) == receipt


def test_another_recipe_is_not_done(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    write_shard(store, PLACE, RECIPE, items(), "run")
    assert finished(store, PLACE, RECIPE.model_copy(update={"weights": "other"})) is None


@pytest.mark.parametrize("lost", [PLACE.tar, PLACE.rows, PLACE.receipt])
def test_a_lost_file_makes_it_undone(tmp_path: Path, lost: str) -> None:
    store = LocalStore(tmp_path)
    write_shard(store, PLACE, RECIPE, items(), "run")
    store.delete(lost)
    assert finished(store, PLACE, RECIPE) is None


def test_content_does_not_depend_on_who_made_it(tmp_path: Path) -> None:
    first = write_shard(LocalStore(tmp_path / "a"), PLACE, RECIPE, items(), "run-1")
    second = write_shard(LocalStore(tmp_path / "b"), PLACE, RECIPE, items(), "run-2")
    assert first.content == second.content
    assert first.tar_sha256 == second.tar_sha256


def test_a_failing_worker_leaves_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)

    def broken():
        yield items()[0]
        raise RuntimeError("the network is wrong")

    with pytest.raises(RuntimeError, match="network"):
        write_shard(store, PLACE, RECIPE, broken(), "run")
    assert store.list("") == []
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_rewrite_that_fails_leaves_the_shard_as_it_was(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    receipt = write_shard(store, PLACE, RECIPE, items(), "run")
    with pytest.raises(ValueError, match="keys must ascend"):
        write_shard(store, PLACE, RECIPE, items()[::-1], "run")
    assert read_receipt(store, PLACE) == receipt
    assert [member for _, member in read_members(store, PLACE)] == [b"one", b"four"]


def test_a_status_outside_the_closed_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"000000002 has status 'rejected'; depth knows only bad, ok"):
        write_shard(LocalStore(tmp_path), PLACE, RECIPE, items(), "run", statuses={"ok", "bad"})


def test_rows_remember_the_recipe_they_were_made_by(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert read_remembered(store, PLACE) is None
    write_shard(store, PLACE, RECIPE, items(), "run")
    store.delete(PLACE.receipt)
    recipe, rows = read_remembered(store, PLACE) or (None, None)
    assert recipe == RECIPE and rows == read_rows(store, PLACE)


def test_a_digest_that_is_known_is_not_computed_again(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    known = Item(sample_key(1), ext="png", data=b"one", digest="0" * 64)
    write_shard(store, PLACE, RECIPE, [known], "run")
    assert read_rows(store, PLACE)["digest"].to_pylist() == ["0" * 64]


def test_tampered_bytes_are_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    write_shard(store, PLACE, RECIPE, items(), "run")
    store.write(PLACE.tar, store.read(PLACE.tar).replace(b"four", b"five"))
    with pytest.raises(TarError, match="digest"):
        list(read_members(store, PLACE))


def test_a_missing_input_names_the_asset_to_materialize(tmp_path: Path) -> None:
    with pytest.raises(MissingShardError, match=r"materialize labels/depth"):
        need(LocalStore(tmp_path), PLACE, "labels/depth")


def test_a_ledger_gathers_shards_and_its_digest_is_of_content(tmp_path: Path) -> None:
    digests = []
    for name, run in (("a", "run-1"), ("b", "run-2")):
        store = LocalStore(tmp_path / name)
        for shard in range(2):
            for split in SPLITS:
                write_shard(store, ShardPlace("cc12m", split, "depth", shard), RECIPE, items(), run)
        report = write_ledger(store, "cc12m", "depth", "block_00", range(2), "labels/depth", shards_done=4)
        digests.append(report.digest)
        assert report.counts == {"ok": 8, "rejected": 4}
        assert read_ledger(store, "cc12m", "val", "depth", "block_00").num_rows == 6
    assert digests[0] == digests[1]
