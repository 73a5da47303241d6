from hypothesis import given, settings
from hypothesis import strategies as st

from fourmill.ingest.host_leases import LeaseBook


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def book(clock: Clock, quiet_s: float = 0.0) -> LeaseBook:
    return LeaseBook(lease_s=10, turn_s=2, clock=clock, quiet_s=quiet_s)


def test_a_lone_worker_gets_what_it_wants_up_to_the_limit() -> None:
    made = book(Clock())
    assert made.sync("w", 8, {"a": (0, 3), "b": (0, 20)}) == {"a": (3, 3), "b": (8, 8)}
    assert made.sync("w", 8, {"a": (3, 0)}) == {"a": (3, 3)}
    assert (made.held("a"), made.held("b")) == (3, 0)


def test_the_sum_never_exceeds_the_limit_and_what_is_given_back_goes_to_who_waits() -> None:
    clock = Clock()
    made = book(clock)
    assert made.sync("v", 2, {"a": (0, 2)})["a"] == (2, 2)
    assert made.sync("w", 2, {"a": (0, 2)})["a"] == (0, 0)
    assert made.sync("v", 2, {"a": (1, 0)})["a"] == (1, 1)
    assert made.sync("w", 2, {"a": (0, 2)})["a"] == (1, 1)
    assert made.held("a") == 2


def test_a_worker_that_falls_silent_loses_its_turns_with_its_lease() -> None:
    clock = Clock()
    made = book(clock)
    made.sync("killed", 2, {"a": (0, 2)})
    clock.now = 9.9
    assert made.sync("w", 2, {"a": (0, 2)})["a"][0] == 0
    clock.now = 10.1
    assert made.sync("w", 2, {"a": (0, 2)})["a"][0] == 2


def test_a_worker_that_has_had_its_turn_shares_evenly() -> None:
    clock = Clock()
    made = book(clock)
    assert made.sync("v", 8, {"a": (0, 500)})["a"] == (8, 8)
    assert made.sync("w", 8, {"a": (0, 500)})["a"] == (0, 0)
    assert made.sync("v", 8, {"a": (8, 492)})["a"] == (8, 8)  # its turn is not over
    clock.now = 2.0
    assert made.sync("v", 8, {"a": (8, 492)})["a"] == (8, 4)
    assert made.sync("v", 8, {"a": (4, 492)})["a"] == (4, 4)
    assert made.sync("w", 8, {"a": (0, 500)})["a"] == (4, 4)


def test_more_workers_than_turns_take_turns() -> None:
    clock = Clock()
    made = book(clock)
    names, used, served = ["u", "v", "w"], {"u": 0, "v": 0, "w": 0}, set()
    for _ in range(60):
        clock.now += 0.5
        for name in names:
            held, share = made.sync(name, 1, {"a": (used[name], 100)})["a"]
            used[name] = min(held, share)
            served |= {name} if used[name] else set()
            assert sum(used.values()) <= 1
    assert served == set(names)


def test_a_book_that_replaces_a_lost_one_listens_first() -> None:
    clock = Clock()
    made = book(clock, quiet_s=10)
    assert made.sync("w", 2, {"a": (0, 2)})["a"][0] == 0
    assert made.sync("v", 2, {"a": (2, 0)})["a"][0] == 2  # held since the lost book's days
    clock.now = 10.0
    assert made.sync("v", 2, {"a": (2, 0)})["a"][0] == 2
    assert made.sync("w", 2, {"a": (0, 2)})["a"][0] == 0
    made.sync("v", 2, {})
    assert made.sync("w", 2, {"a": (0, 2)})["a"][0] == 2


@settings(deadline=None)
@given(
    st.integers(1, 4),
    st.lists(
        st.tuples(st.sampled_from("uvw"), st.integers(0, 6), st.integers(0, 3), st.floats(0, 3)),
        min_size=1,
        max_size=60,
    ),
)
def test_turns_out_never_exceed_the_limit(limit: int, steps: list[tuple[str, int, int, float]]) -> None:
    clock = Clock()
    made = LeaseBook(lease_s=1e9, turn_s=2, clock=clock)
    used = {"u": 0, "v": 0, "w": 0}
    for name, wanted, ended, passed in steps:
        clock.now += passed
        used[name] = max(0, used[name] - ended)
        held, share = made.sync(name, limit, {"a": (used[name], wanted)})["a"]
        assert share <= held <= used[name] + wanted
        used[name] = max(used[name], min(held, share))
        assert sum(used.values()) <= limit
    for name in used:  # and none is lost: all ended, one worker may have them all
        made.sync(name, limit, {})
    assert made.sync("u", limit, {"a": (0, limit)})["a"][0] == limit
