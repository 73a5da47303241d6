"""Actors that are asked for and not up: what they wait for, said now and then, and when there is no more hope.

Ray itself waits for ever: for room, since an autoscaler may add machines, and for a Python that its nodes do not have, which
it starts again every minute. Only an environment whose set-up fails ends an actor, with the reason.
"""

import json
import logging
import shlex
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from fourmill.runtime.actors import ActorsError, Crew
from fourmill.runtime.pace import duration
from fourmill.runtime.ray_session import RayConfig
from fourmill.runtime.stage_python import PythonReport, ask_python

_log = logging.getLogger(__name__)
_SAY_EVERY_S = 60.0
_SAY_TIMES = 5  # before the limit, however short it is
_SHAPES = 3  # of nodes, named in a message


class Wait:
    """How long a stage has been without an actor, and what those that it asked for wait for."""

    def __init__(self, stage: str, config: RayConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the clock.

        Args:
            stage: for messages.
            clock: seconds.
        """
        self._stage, self._config, self._clock = stage, config, clock
        self._shortest_s = min(_SAY_EVERY_S, config.start_timeout_s / _SAY_TIMES)
        self._every_s = self._shortest_s
        self._since = self._said = clock()
        self._pythons = _Pythons(config.runtime_env)

    def begin(self, crew: Crew) -> None:
        """Have the nodes asked about the stage's Python, ahead of the actors.

        A Python that does not start keeps one of as many places as its node has CPUs to start workers in: behind actors, a
        question might never be answered.
        """
        if not crew.num_ready:
            self._pythons.ask(_nodes_with_room(self._config))

    def look(self, crew: Crew, is_work_waiting: bool) -> str:
        """A remark on the actors that are awaited, every minute, and ever more rarely while others are up; mostly empty.

        Raises:
            ActorsError: none is up, and none has come up within the limit or can come up.
        """
        now = self._clock()
        if crew.num_ready or not is_work_waiting:
            self._since = now
        if not (crew.coming and is_work_waiting):
            self._said, self._every_s = now, self._shortest_s
            return ""
        is_over = now - self._since >= self._config.start_timeout_s
        if now - self._said < self._every_s and not is_over:
            return ""
        self._said, self._every_s = now, 2 * self._every_s if crew.num_ready else self._shortest_s
        lacks = self._pythons.lacks()
        said = "; ".join([*_waits(crew.coming, self._config), *lacks.values()])
        if not crew.num_ready:
            self._give_up(crew, said, lacks, is_over)
        self._pythons.ask(_nodes_with_room(self._config))
        return self._remark(crew, said, now - self._since)

    def _give_up(self, crew: Crew, said: str, lacks: Mapping[str, str], is_over: bool) -> None:
        room = _nodes_with_room(self._config)
        if lacks and lacks.keys() >= room.keys():
            raise ActorsError(
                f"its Ray actors cannot come up on any node that has room for them: {'; '.join(lacks.values())}. Mend that "
                "Python there, or name another as py_executable in ray.runtime_env or that of ray.stages"
            )
        if is_over:
            words = f". The last one that died said: {crew.last_words}" if crew.last_words else ""
            raise ActorsError(
                f"none of its Ray actors came up within {duration(self._config.start_timeout_s)} (ray.start_timeout_s): {said}"
                f"{words}. {_NEXT_STEP if room else _NO_ROOM_STEP}"
            )

    def _remark(self, crew: Crew, said: str, waited_s: float) -> str:
        if crew.num_ready:
            remark = f"not up of {len(crew)} actors: {said}"
            _log.info("%s goes on with %d actors; %s", self._stage, crew.num_ready, remark)
        else:
            remark = f"no actor is up after {duration(waited_s)}: {said}"
            _log.warning("%s: %s", self._stage, remark)
        return remark


_NEXT_STEP = (
    "Look at `ray status` for who has the nodes, and on them at raylet.err and runtime_env_setup-*.log in "
    "/tmp/ray/session_latest/logs; or let ray.start_timeout_s be longer"
)
_NO_ROOM_STEP = (
    "Add nodes that have it (`ray status` says what the autoscaler does), or lower ray.cpus_per_worker or "
    "ray.gpus_per_worker (or that of ray.stages)"
)


def _waits(actors: Collection[Any], config: RayConfig) -> Iterator[str]:
    """What Ray says of actors that are not up, in words."""
    from ray._private.state import actors as look_up  # the public way, ray.util.state, needs a dashboard

    where: Counter[tuple[str, str]] = Counter()  # address of a node, state
    for actor in actors:
        record: Mapping[str, Any] = look_up(actor._actor_id.hex())
        state = str(record.get("State", "not registered")).lower().replace("_", " ")
        where[record.get("Address", {}).get("IPAddress", ""), state] += 1
    environment = f" in {json.dumps(dict(config.runtime_env))}" if config.runtime_env else ""
    for (node, state), number in where.items():
        if node:
            yield f"{number} on node {node} ({state}), where its process has not started{environment}"
        elif _nodes_with_room(config):  # Ray names no node while the first one that it asked still tries
            busy = f"nodes that have as much are in use, or its process has not started{environment}"
            yield f"{number} without a node ({state}), for each wants {_share(config)}: {busy}"
        else:
            yield f"{number} without a node ({state}), for each wants {_share(config)}: no node has as much ({_shapes()})"


class _Pythons:
    """Nodes asked, by a task under Ray's own Python there, about the stage's Python."""

    def __init__(self, runtime_env: Mapping[str, Any]) -> None:
        self._command = shlex.split(runtime_env.get("py_executable") or "")
        self._rest = {name: value for name, value in runtime_env.items() if name != "py_executable"}
        self._asked: dict[Any, tuple[str, str]] = {}  # answer that is awaited -> node, its address
        self._fit: set[str] = set()
        self._lacks: dict[str, str] = {}

    def ask(self, nodes: Mapping[str, str]) -> None:
        """Ask those of these nodes again whose Python is not fit; nothing is asked where the stage has none of its own.

        Args:
            nodes: addresses by id.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if not self._command or "image_uri" in self._rest:
            return
        remote: Any = ray.remote(ask_python)
        for node in nodes.keys() - self._fit - {node for node, _ in self._asked.values()}:
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            probe = remote.options(num_cpus=0, max_retries=0, runtime_env=self._rest, scheduling_strategy=there)
            self._asked[probe.remote(self._command)] = node, nodes[node]

    def lacks(self) -> dict[str, str]:
        """What the Pythons lack, in words, of the nodes that have answered; nothing of a node whose Python is fit."""
        import ray
        from ray.exceptions import RayError

        done, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0) if self._asked else ([], [])
        for answer in done:
            node, address = self._asked.pop(answer)
            self._lacks.pop(node, None)
            try:
                report: PythonReport = ray.get(answer)
            except RayError as error:
                _log.warning("node %s could not be asked about its Python: %s", address, error)
                continue
            if report.lacks:
                self._lacks[node] = f"on node {address} {shlex.join(self._command)} {', '.join(report.lacks)}"
            else:
                self._fit.add(node)
        return self._lacks


def _share(config: RayConfig) -> str:
    return f"{config.cpus_per_worker:g} CPU and {config.gpus_per_worker:g} GPU"


def _nodes() -> list[tuple[str, str, tuple[float, float]]]:
    """Each node's id, address, and CPUs and GPUs."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    found = [(node["NodeID"], node["NodeManagerAddress"], node["Resources"]) for node in alive]
    return [(node, address, (has.get("CPU", 0.0), has.get("GPU", 0.0))) for node, address, has in found]


def _nodes_with_room(config: RayConfig) -> dict[str, str]:
    """Addresses by id of the nodes that could hold an actor, were they free."""
    wanted = config.cpus_per_worker, config.gpus_per_worker
    return {node: address for node, address, has in _nodes() if has[0] >= wanted[0] and has[1] >= wanted[1]}


def _shapes() -> str:
    shares = sorted({has for _, _, has in _nodes()}, reverse=True)
    more = ", ..." if len(shares) > _SHAPES else ""
    return "they have " + ", ".join(f"{cpus:g} CPU and {gpus:g} GPU" for cpus, gpus in shares[:_SHAPES]) + more
