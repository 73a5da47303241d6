"""The limit per host over a whole Ray cluster: one named actor keeps the book, workers lease from it in batches."""

import asyncio
import os
import sys
from typing import Any

from fourmill.ingest.host_leases import LEASE_S, Claims, Grants, LeaseBook
from fourmill.ingest.hosts import HostLimits
from fourmill.ingest.leased_hosts import LeasedHostLimits

_NAME = "host-limits"
_NAMESPACE = "fourmill"  # one for all sessions on a cluster: hosts do not care which of them asks
_AHEAD = 4  # turns leased, for each request in flight


class HostLimitKeeper:
    """The actor: a `LeaseBook`. Restarted after a crash, it grants nothing until all holders have reported."""

    def __init__(self) -> None:
        import ray

        was_lost = ray.get_runtime_context().was_current_actor_reconstructed
        self._book = LeaseBook(quiet_s=LEASE_S if was_lost else 0.0)

    def sync(self, worker: str, limit: int, claims: Claims) -> Grants:
        """See `LeaseBook.sync`."""
        return self._book.sync(worker, limit, claims)

    def held(self, host: str) -> int:
        """See `LeaseBook.held`."""
        return self._book.held(host)

    def pid(self) -> int:
        """The actor's process."""
        return os.getpid()


def keeper() -> Any:
    """The handle of the cluster's keeper, started if there is none.

    It reserves no CPU and outlives the session that started it, for another may be using it by then; a local Ray takes
    it along when it ends.
    """
    import ray

    options = {"name": _NAME, "namespace": _NAMESPACE, "get_if_exists": True, "lifetime": "detached"}
    return ray.remote(HostLimitKeeper).options(num_cpus=0, max_restarts=-1, **options).remote()


def cluster_host_limits(limit: int, concurrency: int) -> HostLimits | None:
    """Limits shared with all workers of this Ray cluster; None in a process that is in none.

    Args:
        limit: requests to one host at once.
        concurrency: requests that this worker has in flight at most.
    """
    if "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
        return None
    return LeasedHostLimits(_KeeperLink().sync, limit, most=_AHEAD * concurrency)


class _KeeperLink:
    def __init__(self) -> None:
        self._handle: Any = None

    async def sync(self, worker: str, limit: int, claims: Claims) -> Grants:
        import ray
        from ray.exceptions import ActorDiedError

        if not ray.is_initialized():  # a remote call would start a Ray of its own, as the program ends
            raise ConnectionError("the Ray that kept the limits of hosts has ended")
        if self._handle is None:
            self._handle = await asyncio.to_thread(keeper)
        try:
            return await self._handle.sync.remote(worker, limit, claims)
        except ActorDiedError:
            self._handle = None  # somebody ended it for good: the next report starts another
            raise
