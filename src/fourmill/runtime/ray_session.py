"""One Ray session a process: a local one, or an existing cluster by address. They differ by one setting.

Ray Client (`ray://`) is not used: a dropped connection would lose the driver's state. `address` is a GCS address
(`host:6379`) that this machine can reach, or "auto" for the cluster this node belongs to.
"""

import logging
import os
import secrets
import socket
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

_log = logging.getLogger(__name__)
_INIT_TRIES = 6  # Ray gives a node 30 s; on a busy machine two of eight local starts were seen to time out


class RayUnreachableError(ValueError):
    """No Ray where the config says there is one."""


class RayConfig(BaseModel):
    """Where shards are worked on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str | None = Field(
        default=None, description="host:port of an existing cluster's GCS, or auto; none starts a local one."
    )
    num_workers: Annotated[int, Field(gt=0)] = Field(default=2, description="Actors that take shards.")
    cpus_per_worker: Annotated[float, Field(gt=0)] = Field(default=1.0, description="CPUs reserved for each actor.")
    gpus_per_worker: Annotated[float, Field(ge=0)] = Field(default=0.0, description="Share of a GPU for each actor.")
    object_store_mb: Annotated[int, Field(ge=100)] = Field(
        default=128, description="Local Ray's object store; only paths and receipts pass through it."
    )


def check_reachable(config: RayConfig, timeout_s: float = 5.0) -> None:
    """Prove that the configured cluster answers, before any work starts.

    Raises:
        RayUnreachableError: nobody listens there.
    """
    if config.address in (None, "auto", "local"):
        return
    host, _, port = str(config.address).rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=timeout_s).close()
    except (OSError, ValueError) as error:
        raise RayUnreachableError(
            f"no Ray cluster answers at {config.address!r} ({error}); start one with `ray start --head --port=6379`, "
            "give its host:port, or leave the address out for a local Ray"
        ) from error


def ensure_ray(config: RayConfig) -> None:
    """Connect this process to Ray once; later calls return at once.

    Raises:
        RayUnreachableError: the cluster does not answer.
    """
    _prepare_environment(config)
    import ray

    if ray.is_initialized():
        return
    check_reachable(config)
    if config.address not in (None, "local"):
        ray.init(address=config.address, namespace="fourmill", log_to_driver=False, logging_level=logging.WARNING)
        return
    for attempt in range(1, _INIT_TRIES + 1):
        try:
            ray.init(
                address="local",  # never a cluster that RAY_ADDRESS happens to name
                namespace="fourmill",
                num_cpus=max(1, round(config.num_workers * config.cpus_per_worker)),
                object_store_memory=config.object_store_mb * 1024**2,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
            return
        except Exception as error:  # a bare one when the node is slow to start, which a busy machine makes it
            ray.shutdown()
            if attempt == _INIT_TRIES or isinstance(error, ValueError):
                raise
            _log.warning("local Ray did not start (%s); try %d of %d", error, attempt + 1, _INIT_TRIES)


def _prepare_environment(config: RayConfig) -> None:
    """Settings that Ray reads when it is first imported; the caller's own win."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of shards given up because another one failed first
    os.environ.setdefault("RAY_worker_niceness", "0")  # the shards are the work; by default they yield to all else
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # `ray start` turns it on for clusters; drivers have to ask for it
    if config.address in (None, "local") and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # of this session, never written to disk


def stop_ray() -> None:
    """End this process's Ray session, if it has one."""
    import sys

    if "ray" in sys.modules:
        import ray

        ray.shutdown()
