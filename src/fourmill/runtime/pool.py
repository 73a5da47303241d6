"""Shards over Ray actors: a path goes in, a tar comes out, no image passes through the object store (ADR 0003).

A shard whose actor or node is lost goes back to the others; shards are published whole, so that is exactly once in effect.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fourmill.core.digest import Json
from fourmill.core.shards import Receipt
from fourmill.core.work import Progress, ShardJob
from fourmill.runtime.actors import ActorsError, Crew, Made, crew_of
from fourmill.runtime.interrupts import interruptible
from fourmill.runtime.pace import Pace
from fourmill.runtime.ray_session import RayConfig, check_room, dashboard_url, ensure_ray
from fourmill.runtime.waiting import Wait

_log = logging.getLogger(__name__)
_MOST_LOSSES = 3  # a shard whose actor dies more often is at fault itself
_GONE_WITHIN_S = 30.0  # an actor that was killed; its node may be lost
_LOOK_EVERY_S = 1.0  # an interrupt from the UI waits no longer than this


class ShardError(RuntimeError):
    """A shard that could not be made; the message is the worker's own."""


def run_shards(
    factory: str,
    arguments: Mapping[str, Json],
    jobs: Sequence[ShardJob],
    config: RayConfig,
    progress: Progress,
    pace: Pace | None = None,
    together: int = 1,
) -> list[Receipt]:
    """Make every shard and return the receipts in the order of the jobs.

    There are at most `num_workers` actors, as far as the cluster has room, and no more than there is work for; those that
    have nothing left to do go, down to `min_workers`. However this ends, no actor goes on with a shard.

    Args:
        factory: `module:callable` of the worker.
        arguments: its keyword arguments, JSON only (they cross to other machines).
        progress: is told about each finished shard.
        pace: which counts the shards, and can tell afterwards how it went; by default one of rows.
        together: most shards that an actor takes at a time; fewer where others would be idle.

    Raises:
        ShardError: a worker raised, or a shard's actors died again and again; shards already finished stay finished.
        ActorsError: no actor has come up within `start_timeout_s`, or none can; where some are up, the work goes on with those.
        RayUnreachableError: there is no Ray, or a local one without room for an actor.
    """
    if not jobs:
        return []
    ensure_ray(config)
    check_room(config)
    crew = crew_of(config)
    size = max(1, min(together, len(jobs) // config.num_workers))
    groups = [jobs[i : i + size] for i in range(0, len(jobs), size)]
    work = _Work(factory, json.dumps(arguments, sort_keys=True), groups, progress, pace or Pace(len(jobs)))
    try:
        with interruptible():
            work.finish(crew, config)
    except ActorsError as error:
        work.stop(crew)
        raise ActorsError(f"{jobs[0].recipe.stage}: {error}") from error
    except BaseException:  # an interrupt too: whoever cancels a run wants its machines back
        work.stop(crew)
        raise
    finally:
        crew.shrink(config.kept_workers, work.busy())
    return [made.receipt for index in range(len(groups)) for made in work.made[index]]


class _Work:
    """Which groups of shards wait, who works on which, and what is done."""

    def __init__(
        self, factory: str, arguments: str, groups: Sequence[Sequence[ShardJob]], progress: Progress, pace: Pace
    ) -> None:
        self._factory, self._arguments, self._groups = factory, arguments, groups
        self._progress, self._pace = progress, pace
        self._num_jobs = sum(map(len, groups))
        self._waiting = list(range(len(groups)))[::-1]
        self._running: dict[Any, tuple[int, Any]] = {}
        self._losses: Counter[int] = Counter()
        self.made: dict[int, list[Made]] = {}

    def busy(self) -> list[Any]:
        """Actors with a shard in their hands."""
        return [actor for _, actor in self._running.values()]

    def stop(self, crew: Crew) -> None:
        """End those who are at work, and wait until they are gone: then nobody writes any more. Those not up are not awaited."""
        import ray

        for actor in crew.coming:
            crew.dismiss(actor)
        crew.stop(self.busy(), _GONE_WITHIN_S)
        if self._running:
            ray.wait(list(self._running), num_returns=len(self._running), timeout=_GONE_WITHIN_S)

    def finish(self, crew: Crew, config: RayConfig) -> None:
        import ray

        crew.shrink(config.num_workers, [])
        wait = Wait(self._groups[0][0].recipe.stage, config)
        wait.begin(crew)
        where = dashboard_url(config)
        self._progress(0, self._num_jobs, f"Ray dashboard {where}" if where else "")
        while len(self.made) < len(self._groups):
            unfinished = len(self._waiting) + len(self._running)
            crew.grow(min(config.num_workers, unfinished))
            for actor in crew.free(self.busy()):
                self._hand_out(actor)
            if not self._waiting:
                crew.shrink(config.kept_workers, self.busy())
            hoped = crew.answers if self._waiting else []
            if remark := wait.look(crew, bool(self._waiting)):
                self._progress(self._num_done(), self._num_jobs, remark)
            done, _ = ray.wait([*self._running, *hoped], num_returns=1, timeout=_LOOK_EVERY_S)
            for reference in done:
                if reference in self._running:
                    self._take(reference, crew)
                else:
                    crew.welcome(reference)

    def _hand_out(self, actor: Any) -> None:
        if self._waiting:
            index = self._waiting.pop()
            self._running[actor.run.remote(self._factory, self._arguments, self._groups[index])] = (index, actor)

    def _take(self, reference: Any, crew: Crew) -> None:
        import ray
        from ray.exceptions import RayError, RayTaskError

        index, actor = self._running.pop(reference)
        try:
            self.made[index] = ray.get(reference)
        except RayTaskError as error:
            crew.stop([actor], _GONE_WITHIN_S)  # an error of CUDA lasts, and its memory is held
            cause = error.cause if isinstance(error.cause, Exception) else error
            raise ShardError(f"{self._name(index)}: {cause}") from cause
        except RayError as error:  # the actor, its node, or the way to it
            crew.dismiss(actor)
            crew.doubt(self.busy())
            self._lost(index, error)
            return
        note = ""
        for made in self.made[index]:
            note = self._pace.note(made.receipt, made.shares, crew.num_ready)
        self._progress(self._num_done(), self._num_jobs, note)

    def _num_done(self) -> int:
        return sum(map(len, self.made.values()))

    def _lost(self, index: int, error: Exception) -> None:
        self._losses[index] += 1
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        if self._losses[index] > _MOST_LOSSES:
            raise ShardError(
                f"{self._name(index)}: its worker died {self._losses[index]} times ({first_line}); look for the kernel's "
                "out-of-memory killer, or make smaller batches"
            ) from error
        _log.warning("%s lost its worker (%s); another one does it again", self._name(index), first_line)
        self._waiting.insert(0, index)  # the last in turn: what killed this worker should not kill the next one first

    def _name(self, index: int) -> str:
        job, *others = self._groups[index]
        more = f" and {len(others)} more" if others else ""
        return f"{job.recipe.stage} {job.split} shard {job.shard:05d}{more}"
