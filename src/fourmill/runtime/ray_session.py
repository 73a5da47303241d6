"""One Ray session a process: a local one, or an existing cluster by address. They differ by one setting.

Ray Client (`ray://`) is not used: a dropped connection would lose the driver's state. `address` is a GCS address
(`host:6379`) that this machine can reach, or "auto" for the cluster this node belongs to.
"""

import logging
import os
import secrets
import shlex
import shutil
import socket
import sys
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import psutil
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fourmill.runtime.interrupts import sigterm_kept, uninterrupted

_log = logging.getLogger(__name__)
_session: dict[str, str | None] = {}  # what Ray said of this process's session when it began
_END_TIMEOUT_S = 30.0  # for processes that were killed to be gone
_INIT_TRIES = 6  # Ray gives a node 30 s; on a busy machine two of eight local starts were seen to time out


class RayUnreachableError(ValueError):
    """No Ray where the config says there is one."""


class PythonMissingError(ValueError):
    """A stage is to run under a Python that is not there."""


NumWorkers = Annotated[int, Field(gt=0)]
Cpus = Annotated[float, Field(gt=0)]
Gpus = Annotated[float, Field(ge=0)]
StartTimeout = Annotated[float, Field(gt=0)]


class StageShare(BaseModel):
    """What one stage asks for in place of `RayConfig`'s own; None: as there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_workers: NumWorkers | None = Field(default=None, description="Most actors of this stage.")
    min_workers: Annotated[int, Field(ge=0)] | None = Field(default=None, description="Actors kept without work.")
    cpus_per_worker: Cpus | None = Field(default=None, description="CPUs reserved for each actor.")
    gpus_per_worker: Gpus | None = Field(default=None, description="GPUs for each actor; 0.25: four share one.")
    start_timeout_s: StartTimeout | None = Field(default=None, description="Seconds that an actor has to come up.")
    runtime_env: dict[str, Any] | None = Field(
        default=None,
        description="Ray runtime environment of the actors: for libraries that must not be in the main one.",
    )


class RayConfig(BaseModel):
    """Where shards are worked on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str | None = Field(
        default=None, description="host:port of an existing cluster's GCS, or auto; none starts a local one."
    )
    num_workers: NumWorkers = Field(
        default=2, description="Most actors that take shards; as many come up as the cluster has room for."
    )
    min_workers: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="Actors that are kept when nothing is left for them; None: all, warm for the next stage.",
    )
    cpus_per_worker: Cpus = Field(default=1.0, description="CPUs reserved for each actor.")
    gpus_per_worker: Gpus = Field(default=0.0, description="GPUs for each actor; 0.25: four share one.")
    start_timeout_s: StartTimeout = Field(
        default=1800.0,
        description="Seconds that a stage waits for its first actor: for an autoscaler's nodes, and for images to be pulled.",
    )
    runtime_env: dict[str, Any] = Field(default={}, description="Ray runtime environment of the actors.")
    stages: dict[str, StageShare] = Field(
        default={}, description="Other shares for some stages, by asset (labels/depth) or its group (labels)."
    )
    dashboard: bool = Field(default=False, description="Start a local Ray's dashboard, on loopback: 350 MB more.")
    dashboard_url: str | None = Field(
        default=None, description="Where people reach the dashboard, if not where Ray says: behind an ingress, say."
    )
    object_store_mb: Annotated[int, Field(ge=100)] = Field(
        default=128, description="Local Ray's object store; only paths and receipts pass through it."
    )

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> "RayConfig":
        for name, share in ("", self), *((name, self.for_stage(name)) for name in self.stages):
            if share.min_workers is not None and share.min_workers > share.num_workers:
                raise ValueError(f"min_workers {share.min_workers} is more than num_workers {share.num_workers} {name}")
        return self

    @property
    def kept_workers(self) -> int:
        """Actors that are kept without work."""
        return self.num_workers if self.min_workers is None else self.min_workers

    def for_stage(self, asset: str) -> "RayConfig":
        """This config with an asset's own share in it."""
        share = self.stages.get(asset) or self.stages.get(asset.partition("/")[0])
        changed = {} if share is None else share.model_dump(exclude_none=True)
        return self.model_copy(update={**changed, "stages": {}}) if changed else self

    def local_cpus(self) -> int:
        """CPUs of a local Ray: room for the largest of its stages."""
        shares = [self, *(self.for_stage(name) for name in self.stages)]
        return max(1, *(round(share.num_workers * share.cpus_per_worker) for share in shares))


def check_reachable(config: RayConfig, timeout_s: float = 5.0) -> None:
    """Prove that the configured cluster answers, before any work starts.

    Raises:
        RayUnreachableError: nobody listens there.
    """
    if config.address in (None, "local"):
        return
    address = _running_here(config) if config.address == "auto" else str(config.address)
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=timeout_s).close()
    except (OSError, ValueError) as error:
        raise RayUnreachableError(
            f"no Ray cluster answers at {address!r}{' (address auto)' if config.address == 'auto' else ''} ({error}); start one "
            "with `ray start --head --port=6379`, give its host:port, or leave the address out for a local Ray"
        ) from error


def _running_here(config: RayConfig) -> str:
    """What `auto` means, as Ray finds it: RAY_ADDRESS, a cluster that runs on this machine, or the last one started here."""
    _prepare_environment(config)
    from ray._private.services import get_ray_address_from_environment

    try:
        return get_ray_address_from_environment("auto", None)
    except ConnectionError as error:
        raise RayUnreachableError(
            "no Ray runs on this machine, where address auto looks for one, and RAY_ADDRESS is not set; start one with "
            "`ray start --head`, give a cluster's host:port, or leave the address out for a local Ray"
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
    with sigterm_kept():
        _connect(config)


def _connect(config: RayConfig) -> None:
    import ray

    if config.address not in (None, "local"):
        context = ray.init(
            address=config.address, namespace="fourmill", log_to_driver=False, logging_level=logging.WARNING
        )
        _session["dashboard_url"] = context.dashboard_url
        return
    for attempt in range(1, _INIT_TRIES + 1):
        before = {child.pid for child in psutil.Process().children(recursive=True)}
        try:
            context = ray.init(
                address="local",  # never a cluster that RAY_ADDRESS happens to name
                namespace="fourmill",
                num_cpus=config.local_cpus(),
                object_store_memory=config.object_store_mb * 1024**2,
                include_dashboard=config.dashboard,
                dashboard_host="127.0.0.1",
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
            _session["dashboard_url"] = context.dashboard_url
            return
        except Exception as error:  # a bare one when the node is slow to start, which a busy machine makes it
            ray.shutdown()
            _end_half_started(before)
            if attempt == _INIT_TRIES or isinstance(error, ValueError):
                raise
            _log.warning("local Ray did not start (%s); try %d of %d", error, attempt + 1, _INIT_TRIES)


def _end_half_started(before: Collection[int]) -> None:
    """End what a failed start has left: Ray forgets its processes then, and they would slow the next try down."""
    import ray

    folder, ended = str(Path(ray.__file__).parent), []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if child.pid not in before and any(part.startswith(folder) for part in child.cmdline()):
                child.kill()
                ended.append(child)
    psutil.wait_procs(ended, timeout=_END_TIMEOUT_S)


def check_room(config: RayConfig) -> None:
    """Prove that an actor can live somewhere, where no autoscaler may add machines: on a local Ray.

    Raises:
        RayUnreachableError: this machine has less than one actor asks for.
    """
    if config.address not in (None, "local"):
        return
    import ray

    there: Mapping[str, float] = ray.cluster_resources()
    for name, wanted in (("CPU", config.cpus_per_worker), ("GPU", config.gpus_per_worker)):
        if wanted > there.get(name, 0):
            raise RayUnreachableError(
                f"each worker asks for {wanted:g} {name} and this machine's Ray has {there.get(name, 0):g}: lower "
                f"ray.{name.lower()}s_per_worker (or that of ray.stages), or give ray.address of a cluster that has it"
            )


def check_python(config: RayConfig, asset: str) -> None:
    """Prove that a stage's own Python is there, before any work starts: without it Ray would try to start actors for ever.

    A cluster's nodes are asked when actors do not come up on them (`waiting.py`).

    Raises:
        PythonMissingError: it is not on this machine, where a local Ray's actors are to be.
    """
    command = shlex.split(config.runtime_env.get("py_executable") or "")
    if command and config.address in (None, "local") and shutil.which(command[0]) is None:
        raise PythonMissingError(
            f"{asset}: there is no {command[0]} on this machine, and the project has the stage's actors run under it "
            "(py_executable in ray.runtime_env, or that of ray.stages): build that environment, or name another. detectron2's is "
            "in infra/detectron2"
        )


def dashboard_url(config: RayConfig) -> str | None:
    """Where to look at this session's Ray; None when it has no dashboard."""
    if config.dashboard_url:
        return config.dashboard_url
    found = _session.get("dashboard_url")
    return f"http://{found}" if found else None


def no_dashboard(config: RayConfig) -> str:
    """How to have a dashboard, where `dashboard_url` finds none."""
    if config.address in (None, "local"):
        return "off; `ray.dashboard: true` in the project file starts it with the next run, on loopback (350 MB more)"
    return "Ray names none; start its head with `--include-dashboard=true`, or say where it is in `ray.dashboard_url`"


def _prepare_environment(config: RayConfig) -> None:
    """Settings that Ray reads when it is first imported; the caller's own win."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of shards given up because another one failed first
    os.environ.setdefault("RAY_worker_niceness", "0")  # the shards are the work; by default they yield to all else
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # `ray start` turns it on for clusters; drivers have to ask for it
    if config.address in (None, "local") and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # of this session, never written to disk
    _read_environment_again()


def _read_environment_again() -> None:
    """Where somebody else imported Ray first, it has read the settings already, and this driver would send no token."""
    if "ray" not in sys.modules:
        return
    import ray

    if not ray.is_initialized():
        raylet: Any = ray._raylet  # pyright: ignore[reportAttributeAccessIssue]  (compiled, without types)
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


def stop_ray() -> None:
    """End this process's Ray session, if it has one; whoever interrupts twice must not leave its processes behind."""
    if "ray" in sys.modules:
        import ray

        with uninterrupted():
            ray.shutdown()
