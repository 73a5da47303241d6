"""A driver for tests: two blocks of images by real workers on two Ray nodes of this machine, two actors on each.

python two_nodes_driver.py PROJECT.json CONNECT_TO.json HOST PORT

The first block is made with the cluster's limit per host, the second with a limit per worker. Once all workers hold or want
a turn at HOST, /all-here is asked for at PORT. Prints {"node_of": {pid: node}, "counts": [{status: rows}, ...]}.
"""

import http.client
import json
import os
import secrets
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from fourmill.ingest.host_leases import Claims, Grants
from fourmill.runtime.actors import crew_of
from fourmill.runtime.host_limits import _NAME, _NAMESPACE, HostLimitKeeper
from fourmill.runtime.project import Project, read_project
from fourmill.runtime.ray_session import ensure_ray, stop_ray
from fourmill.runtime.session import Session
from fourmill.runtime.stages import images_stage, publish_ledger, run_block

NUM_WORKERS = 4
CPUS_PER_NODE = 2
_STARTS = 5  # Ray gives a node half a minute, which is short on a busy machine


class TellingKeeper(HostLimitKeeper):
    """The keeper, which also says when all workers are at a host or wait for it."""

    def __init__(self, host: str, num_workers: int, port: int) -> None:
        super().__init__()
        self._host, self._num_workers, self._port = host, num_workers, port
        self._at_host: set[str] = set()

    def sync(self, worker: str, limit: int, claims: Claims) -> Grants:
        grants = super().sync(worker, limit, claims)
        if self._host in claims and worker not in self._at_host:
            self._at_host.add(worker)
            if len(self._at_host) == self._num_workers:
                self._tell()
        return grants

    def _tell(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=180)
        connection.request("GET", "/all-here")
        connection.getresponse().read()
        connection.close()


def two_nodes() -> Any:
    """A cluster of this machine alone."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    from ray.cluster_utils import Cluster

    head = {"num_cpus": CPUS_PER_NODE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for attempt in range(1, _STARTS + 1):
        try:
            cluster.add_node(num_cpus=CPUS_PER_NODE)
            break
        except Exception:
            if attempt == _STARTS:
                raise
    return cluster


def make_blocks(project: Project, connect_to: dict[str, str], host: str, port: int) -> dict[str, Any]:
    """Run the stage as its asset does; then, in the second block, without the cluster's limit."""
    import ray

    ensure_ray(project.ray)
    options: dict[str, Any] = {"name": _NAME, "namespace": _NAMESPACE, "num_cpus": 0, "lifetime": "detached"}
    ray.remote(TellingKeeper).options(**options).remote(host, NUM_WORKERS, port)
    session, counts = Session(project, connect_to=connect_to), []
    for block, factory in (("block_00", None), ("block_01", "images_alone:images")):
        stage = images_stage(session)
        stage = replace(stage, factory=factory or stage.factory)
        counts.append(publish_ledger(session, stage, block, run_block(session, stage, block)).counts)
    told = ray.get([actor.hello.remote() for actor in crew_of(project.ray).free([])], timeout=180)
    return {"node_of": {pid: node for node, pid in told}, "counts": counts}


if __name__ == "__main__":
    given, cluster = read_project(Path(sys.argv[1])), two_nodes()
    try:
        here = given.ray.model_copy(update={"address": cluster.address, "num_workers": NUM_WORKERS})
        routes = json.loads(Path(sys.argv[2]).read_text())
        done = make_blocks(given.model_copy(update={"ray": here}), routes, sys.argv[3], int(sys.argv[4]))
        print(json.dumps(done), flush=True)
    finally:
        stop_ray()
        cluster.shutdown()
