"""What an actor keeps from stage to stage, and what it lets go of."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from fourmill.core.shards import Receipt, Recipe
from fourmill.core.work import ShardJob
from fourmill.runtime import actors
from fourmill.runtime.actors import ShardRunner


class Cyclic:
    """A worker that holds itself, as labellers hold a network by a method of their own."""

    def __init__(self) -> None:
        self._forward = self.run

    def run(self, job: ShardJob) -> Receipt:
        return Receipt.model_construct(recipe=job.recipe)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Weak references to all workers that are made, each of them when no earlier one is alive."""
    made: list[Any] = []

    def make(factory: str, arguments: Any) -> Cyclic:
        assert not [one for one in made if one() is not None], "an earlier worker's weights are still there"
        worker = Cyclic()
        made.append(weakref.ref(worker))
        return worker

    monkeypatch.setattr(actors, "make_worker", make)
    thresholds = gc.get_threshold()
    yield made
    gc.unfreeze()
    gc.set_threshold(*thresholds)


def test_a_worker_is_kept_while_it_is_asked_for_and_gone_before_the_next_is_made(made: list[Any]) -> None:
    runner, job = ShardRunner(), ShardJob("train", 0, Recipe(stage="x", code_version="1"), "run")
    for arguments in ("1", "1", "2", "1"):
        runner.run("module:worker", arguments, [job])
    assert len(made) == 3


def test_a_worker_is_bound_to_its_share_of_a_gpu_once_it_is_made(
    made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bound: list[tuple[float, int]] = []
    monkeypatch.setattr(actors, "keep_to_share_of_gpu", lambda share: bound.append((share, len(made))))
    ShardRunner(0.25).run("module:worker", "1", [ShardJob("train", 0, Recipe(stage="x", code_version="1"), "run")])
    assert bound == [(0.25, 1)]
