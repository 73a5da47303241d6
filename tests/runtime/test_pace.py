"""What the note beside a progress bar says."""

from fourmill.core.shards import Receipt, Recipe
from fourmill.runtime.pace import Pace


def receipt(**counts: int) -> Receipt:
    recipe = Recipe(stage="images", code_version="1")
    return Receipt(
        recipe=recipe, tar_sha256=None, rows_sha256="", tar_bytes=0, counts=counts, seconds=1.0, run_id="run"
    )


def test_rate_shares_and_time_left() -> None:
    times = iter([0.0, 10.0, 20.0, 30.0])
    pace = Pace(3, lambda: next(times))
    assert pace.note(receipt(ok=70, http_404=20, timeout=10)) == (
        "10 rows/s, 70.0 % ok, http_404 20.0 %, timeout 10.0 %, 20 s left"
    )
    assert pace.note(receipt(ok=50, dns=30, connect=10, http_5xx=10)) == (
        "10 rows/s, 60.0 % ok, dns 15.0 %, http_404 10.0 %, connect 5.0 %, 10 s left"
    )
    assert pace.note(receipt()) == "6.67 rows/s, 60.0 % ok, dns 15.0 %, http_404 10.0 %, connect 5.0 %"


def test_shards_without_rows_have_no_shares() -> None:
    times = iter([0.0, 3600.0])
    assert Pace(3, lambda: next(times)).note(receipt()) == "0 rows/s, 2 h 0 min left"


def test_no_time_passed_is_no_division_by_zero() -> None:
    assert "rows/s" in Pace(1, lambda: 5.0).note(receipt(ok=3))


def test_effort_is_weighted_by_time_and_named_beside_the_rate() -> None:
    times = iter([0.0, 4.0, 8.0])
    pace = Pace(2, lambda: next(times), unit="images")
    assert pace.facts() == {}
    pace.note(receipt(ok=4), {"network": 0.5}, 2)
    other = receipt(ok=4).model_copy(update={"seconds": 3.0})
    assert pace.note(other, {"network": 0.9}, 1) == "1 images/s, network 80.0 %, 100.0 % ok, 1 worker"
    assert pace.facts() == {"images_per_second": 1.0, "network_share": 0.8}
