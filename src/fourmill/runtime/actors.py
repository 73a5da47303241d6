"""The Ray actors of this process: what each of them is, and the crew that they make.

An actor keeps the worker it made last, so weights are loaded once a stage, and lives as long as the crew, so libraries are
imported once. The crew is kept from stage to stage while these ask for the same share of a machine.
"""

import importlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

from fourmill.core.process import collect_rarely, free_worker, keep_to_share_of_gpu
from fourmill.core.shards import Receipt
from fourmill.core.work import GroupWorker, ShardJob, ShardWorker
from fourmill.runtime.ray_session import RayConfig

_log = logging.getLogger(__name__)
_MOST_STILLBORN = 8  # actors in a row that never come up: not bad luck any more
_TRIES = 3  # in a row, after which those that are up are left to work, and another is asked for now and then
_TRY_AGAIN_AFTER_S = 60.0
_LAST_WORDS = 800  # characters of a reason, its end


class ActorsError(RuntimeError):
    """Actors that do not come up; the message says why and what to do."""


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

    def __init__(self, gpus: float = 0.0) -> None:
        """Make an actor that was given so many GPUs."""
        self._gpus = gpus
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
            self._made = close = None
            free_worker()  # its weights, before the next one's are loaded
            self._made = (wanted, make_worker(factory, json.loads(arguments)))
            keep_to_share_of_gpu(self._gpus)  # not before: torch may be imported by the worker
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

    def __init__(self, config: RayConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._coming: dict[Any, Any] = {}  # answer that is awaited -> actor
        self._known: set[Any] = set()  # of these answers: those of actors that were up before
        self._ready: list[Any] = []
        self._here: dict[Any, psutil.Process] = {}  # actor -> its process, of those on this machine
        self._stillborn = 0
        self._again_at = 0.0  # when another is asked for, after several that died
        self._is_environment_bad = False
        self.last_words = ""  # of an actor that died before it came up; none once one has come up

    def __len__(self) -> int:
        return len(self._coming) + len(self._ready)

    @property
    def num_ready(self) -> int:
        """Actors that are up."""
        return len(self._ready)

    @property
    def coming(self) -> list[Any]:
        """Actors that were asked for and are not up."""
        return [actor for answer, actor in self._coming.items() if answer not in self._known]

    @property
    def answers(self) -> list[Any]:
        """References that resolve when an actor comes up, or never will; `welcome` takes them."""
        return list(self._coming)

    def free(self, busy: list[Any]) -> list[Any]:
        """Actors that are up and not among these."""
        return [actor for actor in self._ready if not any(actor is other for other in busy)]

    def grow(self, number: int) -> None:
        """Ask for actors until there are so many; those without room wait, and make an autoscaler add machines.

        After several that died only now and then, while others are up; and where their environment could not be set up, not
        before it is known of all that were asked for.
        """
        import ray

        if self._stillborn >= _TRIES and self._ready and self._clock() < self._again_at:
            return
        if self._is_environment_bad and self._coming and not self._ready:
            return
        remote: Any = ray.remote(ShardRunner)
        options: dict[str, Any] = {"num_cpus": self._config.cpus_per_worker, "num_gpus": self._config.gpus_per_worker}
        if self._config.runtime_env:
            options["runtime_env"] = dict(self._config.runtime_env)
        while len(self) < number:
            actor = remote.options(max_restarts=0, **options).remote(self._config.gpus_per_worker)
            self._coming[actor.hello.remote()] = actor

    def welcome(self, answer: Any) -> None:
        """Take an awaited answer: the actor is up, or it is gone.

        Raises:
            ActorsError: none is up, and too many in a row died before they answered, or all by their environment.
        """
        import ray
        from ray.exceptions import RayError

        actor, was_up = self._coming.pop(answer), answer in self._known
        self._known.discard(answer)
        try:
            node, pid = ray.get(answer)
        except RayError as error:
            if not was_up:
                self._mourn(error)
            return
        self._stillborn, self._is_environment_bad, self.last_words = 0, False, ""
        self._ready.append(actor)
        if node == ray.get_runtime_context().get_node_id():
            with suppress(psutil.NoSuchProcess):
                self._here[actor] = psutil.Process(pid)

    def _mourn(self, error: Exception) -> None:
        from ray.exceptions import RuntimeEnvSetupError

        is_environment = isinstance(error, RuntimeEnvSetupError)
        self._stillborn += 1
        self._again_at = self._clock() + _TRY_AGAIN_AFTER_S
        self._is_environment_bad |= is_environment
        self.last_words = words = _environment_words(error) if is_environment else str(error)[-_LAST_WORDS:].strip()
        _log.warning("an actor died before it came up: %s", words)
        if self._ready:
            return
        number = self._stillborn
        if is_environment and not self._coming:
            self._stillborn, self._is_environment_bad = 0, False  # of the next stage nothing is known
            raise ActorsError(
                f"Ray could not set up the environment of its actors, {json.dumps(dict(self._config.runtime_env))}: {words}. "
                "Mend it on the cluster's nodes, or set ray.runtime_env or that of ray.stages; the node has more in "
                "/tmp/ray/session_latest/logs/runtime_env_setup-*.log"
            ) from error
        if number >= _MOST_STILLBORN:
            self._stillborn = 0
            raise ActorsError(
                f"{number} Ray actors in a row died before they came up, the last one so: {words}. Look at the "
                "session's logs (/tmp/ray/session_latest/logs), at memory, and at the runtime environment"
            ) from error

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


def _environment_words(error: Exception) -> str:
    """The reason at the end of a traceback, and the node: `on node 10.0.0.7: FileNotFoundError: ... 'podman'`."""
    said = str(error).strip()
    node = re.search(r"\[Node ([^\]]+)\]", said)
    last = next(iter(said.splitlines()[::-1]), type(error).__name__).strip()
    return f"{f'on node {node[1]}: ' if node else ''}{last[-_LAST_WORDS:]}"


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
