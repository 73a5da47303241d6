"""Shards over Ray actors: a path goes in, a tar comes out, no image passes through the object store (ADR 0003).

An actor keeps the worker it made last, so weights are loaded once a stage, and it lives as long as the Ray session, so
libraries are imported once. A killed actor is restarted and its shard done again; shards are published whole, so that
is exactly once in effect.
"""

import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fourmill.core.digest import Json
from fourmill.core.shards import Receipt
from fourmill.core.work import Progress, ShardJob, ShardWorker
from fourmill.runtime.pace import Pace
from fourmill.runtime.ray_session import RayConfig, ensure_ray

_log = logging.getLogger(__name__)
_TASK_RETRIES = 3  # a shard whose actor dies this often is at fault itself


class ShardError(RuntimeError):
    """A shard that could not be made; the message is the worker's own."""


def make_worker(factory: str, arguments: Mapping[str, Any]) -> ShardWorker:
    """A worker from `module:callable` and JSON-like arguments."""
    module, _, name = factory.partition(":")
    return getattr(importlib.import_module(module), name)(**arguments)


class ShardRunner:
    """What each actor is: makes the worker that a job asks for and keeps it for the next one."""

    def __init__(self) -> None:
        self._made: tuple[str, ShardWorker] | None = None

    def run(self, factory: str, arguments: str, job: ShardJob) -> Receipt:
        """Make one shard. `arguments` is JSON, so that equal arguments are seen to be equal."""
        wanted = f"{factory} {arguments}"
        if self._made is None or self._made[0] != wanted:
            close = getattr(self._made[1], "close", None) if self._made else None
            if close:
                close()
            self._made = None  # frees the last worker's weights before the next one's are loaded
            self._made = (wanted, make_worker(factory, json.loads(arguments)))
        return self._made[1].run(job)


def run_shards(
    factory: str, arguments: Mapping[str, Json], jobs: Sequence[ShardJob], config: RayConfig, progress: Progress
) -> list[Receipt]:
    """Make every shard and return the receipts in the order of the jobs.

    Args:
        factory: `module:callable` of the worker.
        arguments: its keyword arguments, JSON only (they cross to other machines).

    Raises:
        ShardError: a worker raised; shards already finished stay finished.
    """
    if not jobs:
        return []
    ensure_ray(config)
    import ray
    from ray.exceptions import RayTaskError

    text = json.dumps(arguments, sort_keys=True)
    actors = _actors(config, min(config.num_workers, len(jobs)))
    waiting = list(enumerate(jobs))[::-1]
    running: dict[Any, tuple[int, Any]] = {}
    receipts: dict[int, Receipt] = {}
    pace = Pace(len(jobs))
    for actor in actors:
        _hand_out(actor, waiting, running, factory, text)
    while running:
        done, _ = ray.wait(list(running), num_returns=1)
        index, actor = running.pop(done[0])
        try:
            receipts[index] = ray.get(done[0])
        except RayTaskError as error:
            for left in running:
                ray.cancel(left)
            cause = error.cause if isinstance(error.cause, Exception) else error
            job = jobs[index]
            raise ShardError(f"{job.recipe.stage} {job.split} shard {job.shard:05d}: {cause}") from cause
        _hand_out(actor, waiting, running, factory, text)
        progress(len(receipts), len(jobs), pace.note(receipts[index]))
    return [receipts[i] for i in range(len(jobs))]


def _hand_out(
    actor: Any, waiting: list[tuple[int, ShardJob]], running: dict[Any, Any], factory: str, text: str
) -> None:
    if waiting:
        index, job = waiting.pop()
        running[actor.run.remote(factory, text, job)] = (index, actor)


# Handles of this process's Ray sessions: an actor ends with its last handle, and the next stage wants it warm.
_handles: dict[tuple[str, str, float, float, int], Any] = {}


def _actors(config: RayConfig, number: int) -> list[Any]:
    """Actors of this session; the ones that an earlier stage used, where there are any."""
    import ray

    context = ray.get_runtime_context()
    remote = ray.remote(ShardRunner)
    actors: list[Any] = []
    for i in range(number):
        name = (context.get_node_id(), context.get_job_id(), config.cpus_per_worker, config.gpus_per_worker, i)
        if name not in _handles:
            _handles[name] = remote.options(
                num_cpus=config.cpus_per_worker,
                num_gpus=config.gpus_per_worker,
                max_restarts=-1,
                max_task_retries=_TASK_RETRIES,
            ).remote()
        actors.append(_handles[name])
    return actors
