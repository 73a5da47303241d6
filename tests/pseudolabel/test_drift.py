"""The rule for drift: a change that matters and that chance does not make, on enough images."""

import numpy as np
import pytest

from fourmill.core.ledger import ledger_path
from fourmill.core.names import SPLITS, Layout
from fourmill.core.store import Store
from fourmill.pseudolabel.drift import drifts, published_statistics
from fourmill.pseudolabel.statistics import Statistics, read_statistics, write_statistics


def block(seed: int, mean: float, images: int = 400, rejected: int = 0, rare: int = 0) -> Statistics:
    """Depths around a mean with a deviation of 0.1, and a class that is seen in every `rare`-th image."""
    rng = np.random.default_rng(seed)
    found = Statistics()
    depths = rng.normal(mean, 0.1, images)
    rows = [
        {"status": "ok", "figures": [("mean", d), *([("class_007", 0.3)] if rare and i % rare == 0 else [])]}
        for i, d in enumerate(depths)
    ]
    rows += [{"status": "rejected", "reason": "constant", "figures": None}] * rejected
    found.add(rows)
    return found


def test_blocks_of_the_same_kind_have_not_drifted() -> None:
    for seed in range(20):
        assert drifts(block(seed, 0.5, rare=200), block(100 + seed, 0.5)) == []


def test_a_shift_of_half_a_deviation_is_seen_and_named() -> None:
    (found,) = drifts(block(0, 0.55), block(1, 0.5))
    assert found.figure == "mean" and found.deviations == pytest.approx(0.5, abs=0.1)
    assert (found.block, found.published) == (pytest.approx(0.55, abs=0.02), pytest.approx(0.5, abs=0.02))


def test_a_shift_that_is_certain_and_small_is_nobodys_concern() -> None:
    assert drifts(block(0, 0.51, images=100_000), block(1, 0.5, images=100_000)) == []


def test_a_large_shift_of_few_images_may_be_chance() -> None:
    assert drifts(block(0, 0.9, images=99), block(1, 0.5)) == []


def test_many_rejected_images_are_a_drift_of_their_own() -> None:
    assert [one.figure for one in drifts(block(0, 0.5, rejected=100), block(1, 0.5))] == ["rejected"]


def test_a_class_that_vanishes_is_seen() -> None:
    found = drifts(block(0, 0.5), block(1, 0.5, rare=2))
    assert [one.figure for one in found] == ["class_007"] and found[0].block == 0


def test_statistics_of_two_blocks_are_those_of_all_their_rows() -> None:
    one, other, both = block(0, 0.2, 50, 3), block(1, 0.7, 70, 2), Statistics()
    both.merge(one)
    both.merge(other)
    assert (both.rows, both.labelled, both.rejected) == (125, 120, {"constant": 5})
    assert both.mean("mean") == pytest.approx((50 * one.mean("mean") + 70 * other.mean("mean")) / 120)
    assert Statistics.model_validate_json(both.model_dump_json()) == both


def test_only_published_blocks_are_compared_with(store: Store) -> None:
    layout = Layout(rows_per_shard=1, shards_per_block=1, num_blocks=4)
    for number, key in enumerate(layout.block_keys()):
        write_statistics(store, "tiny", "depth", key, block(number, 0.5, images=10 + number))
    for key in ("block_00", "block_03"):
        for split in SPLITS:
            store.write(ledger_path("tiny", split, "depth", key), b"")
    found, used = published_statistics(store, "tiny", layout, "block_02", "depth")
    assert used == ["block_00", "block_03"] and found.labelled == 10 + 13
    assert published_statistics(store, "tiny", layout, "block_00", "depth")[1] == ["block_03"]
    assert read_statistics(store, "tiny", "depth", "block_09") is None
