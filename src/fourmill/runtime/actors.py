"""The Ray actors of this process: what each of them is, and the crew that they make.

An actor keeps the worker it made last, so weights are loaded once a stage, and lives as long as the crew, so libraries are
imported once. The crew is kept from stage to stage while these ask for the same share of a machine.
"""

import importlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

from fourmill.core.program import collect_rarely
from fourmill.core.shards import Receipt
from fourmill.core.work import GroupWorker, ShardJob, ShardWorker
from fourmill.runtime.ray_session import RayConfig

_log = logging.getLogger(__name__)
_MOST_STILLBORN = 8  # actors in a row that never come up: not bad luck any more


class ActorsError(RuntimeError):
    """Actors that do not come up."""


@dataclass(frozen=True)
class Made:
    """A finished shard, and what its worker says of the effort: shares of the shard's time, by name."""

    receipt: Receipt
    shares: dict[str, float] = field(default_factory=dict)


def make_worker(factory: str, arguments: Mapping[str, Any]) -> ShardWorker:
    """A worker from `module:callable` and JSON-like arguments."""
    module, _, name = factory.partition(":")
    return getattr(importlib.import_module(module), name)(**arguments)


class ShardRunner:
    """What each actor is: makes the worker that a job asks for and keeps it for the next one."""

    def __init__(self) -> None:
        self._made: tuple[str, ShardWorker] | None = None

    def hello(self) -> tuple[str, int]:
        """Answer once the actor is up: its node and its process there."""
        import ray

        return ray.get_runtime_context().get_node_id(), os.getpid()

    def run(self, factory: str, arguments: str, jobs: Sequence[ShardJob]) -> list[Made]:
        """Make some shards. `arguments` is JSON, so that equal arguments are seen to be equal."""
        wanted = f"{factory} {arguments}"
        if self._made is None or self._made[0] != wanted:
            close = getattr(self._made[1], "close", None) if self._made else None
            if close:
                close()
            self._made = None  # frees the last worker's weights before the next one's are loaded
            self._made = (wanted, make_worker(factory, json.loads(arguments)))
            collect_rarely()
        worker = self._made[1]
        if len(jobs) > 1 and isinstance(worker, GroupWorker):
            return [Made(receipt) for receipt in worker.run_together(jobs)]
        return [Made(worker.run(job), dict(getattr(worker, "shares", {}))) for job in jobs]


class Crew:
    """Actors of one shape. They come up when the cluster has room for them, and go when they are not wanted any more.

    None of them is restarted by Ray: a restarted actor would wait for room on its own, with a shard in its hands that
    another could do. The crew replaces it, and the shard goes back to the others.
    """

    def __init__(self, config: RayConfig) -> None:
        self._config = config
        self._coming: dict[Any, Any] = {}  # answer that is awaited -> actor
        self._known: set[Any] = set()  # of these answers: those of actors that were up before
        self._ready: list[Any] = []
        self._here: dict[Any, psutil.Process] = {}  # actor -> its process, of those on this machine
        self._stillborn = 0

    def __len__(self) -> int:
        return len(self._coming) + len(self._ready)

    @property
    def num_ready(self) -> int:
        """Actors that are up."""
        return len(self._ready)

    @property
    def answers(self) -> list[Any]:
        """References that resolve when an actor comes up, or never will; `welcome` takes them."""
        return list(self._coming)

    def free(self, busy: list[Any]) -> list[Any]:
        """Actors that are up and not among these."""
        return [actor for actor in self._ready if not any(actor is other for other in busy)]

    def grow(self, number: int) -> None:
        """Ask for actors until there are so many; those without room wait, and make an autoscaler add machines."""
        import ray

        remote: Any = ray.remote(ShardRunner)
        options: dict[str, Any] = {"num_cpus": self._config.cpus_per_worker, "num_gpus": self._config.gpus_per_worker}
        if self._config.runtime_env:
            options["runtime_env"] = dict(self._config.runtime_env)
        while len(self) < number:
            actor = remote.options(max_restarts=0, **options).remote()
            self._coming[actor.hello.remote()] = actor

    def welcome(self, answer: Any) -> None:
        """Take an awaited answer: the actor is up, or it is gone.

        Raises:
            ActorsError: too many in a row died before they answered.
        """
        import ray
        from ray.exceptions import RayError

        actor, was_up = self._coming.pop(answer), answer in self._known
        self._known.discard(answer)
        try:
            node, pid = ray.get(answer)
        except RayError as error:
            if was_up:
                return
            self._stillborn += 1
            _log.warning("an actor died before it came up: %s", error)
            if self._stillborn >= _MOST_STILLBORN:
                raise ActorsError(
                    f"{self._stillborn} Ray actors in a row died before they came up, the last one so: {error}. Look at the "
                    "session's logs (/tmp/ray/session_latest/logs), at memory, and at the runtime environment"
                ) from error
            return
        self._stillborn = 0
        self._ready.append(actor)
        if node == ray.get_runtime_context().get_node_id():
            with suppress(psutil.NoSuchProcess):
                self._here[actor] = psutil.Process(pid)

    def doubt(self, busy: list[Any]) -> None:
        """One actor was lost: have those without work answer again before they get any, lest its node took them along."""
        for actor in self.free(busy):
            self._ready.remove(actor)
            answer = actor.hello.remote()
            self._coming[answer] = actor
            self._known.add(answer)

    def stop(self, actors: Sequence[Any], within_s: float) -> None:
        """Dismiss actors, and return when their processes on this machine are gone: then they write no more.

        Ray calls an actor dead when it has sent the signal; the process may live, and begin a file, a little longer.
        """
        processes = [self._here[actor] for actor in actors if actor in self._here]
        for actor in actors:
            self.dismiss(actor)
        psutil.wait_procs(processes, timeout=within_s)

    def dismiss(self, actor: Any) -> None:
        """End an actor at once, whatever it does; nothing happens to one that is dead."""
        import ray

        self._ready = [other for other in self._ready if other is not actor]
        self._coming = {answer: other for answer, other in self._coming.items() if other is not actor}
        self._here.pop(actor, None)
        ray.kill(actor, no_restart=True)

    def shrink(self, number: int, busy: list[Any]) -> None:
        """Give room back: dismiss actors that have nothing to do until there are `number`, those not yet up first."""
        for actor in [*self._coming.values(), *self.free(busy)]:
            if len(self) <= max(number, len(busy)):
                break
            self.dismiss(actor)


_crews: dict[tuple[Any, ...], Crew] = {}  # of this process's Ray session: one at most


def crew_of(config: RayConfig) -> Crew:
    """The crew for a stage: the last stage's, or a new one where it asks for another share of a machine."""
    import ray

    context = ray.get_runtime_context()
    shape = (context.get_node_id(), context.get_job_id(), config.cpus_per_worker, config.gpus_per_worker)
    key = (*shape, json.dumps(dict(config.runtime_env), sort_keys=True))
    if key not in _crews:
        for (node, job, *_), crew in list(_crews.items()):
            if (node, job) == shape[:2]:
                crew.shrink(0, [])  # they hold the room that the new ones need
        _crews.clear()
        _crews[key] = Crew(config)
    return _crews[key]
