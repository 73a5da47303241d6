"""The environment of a deployment: the one place where fourmill's own variables are read.

Those of others are read where they are used: torchrun's in `core.ranks`, gloo's in `runtime.launch`, Ray's in
`runtime.ray_session` and `runtime.stage_python`; boto3 finds its own.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

PROJECT = "FOURMILL_PROJECT"  # path of project.json
CONNECT_TO = "FOURMILL_CONNECT_TO"  # "host:port=ip:port,..."


def calm_threads() -> None:
    """Let threads of numeric libraries sleep while they wait, see `runtime.launch`; the caller's own setting wins."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def fast_precision() -> Literal["bf16", "fp32"]:
    """What this machine's CPU trains fastest in: bfloat16 where it computes in it; emulated it takes twice float32's time."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return "fp32"
    return "bf16" if {"avx512_bf16", "amx_bf16", "bf16"} & set(flags) else "fp32"


def project_file() -> Path | None:
    """The project that this process serves, if one is named."""
    value = os.environ.get(PROJECT)
    return Path(value) if value else None


def connect_to() -> dict[str, str]:
    """Where to connect instead of asking DNS, as curl's --connect-to: the demo's scenes, a mirror, a proxy.

    Raises:
        ValueError: the variable is not `host:port=ip:port,...`.
    """
    pairs = [part for part in os.environ.get(CONNECT_TO, "").split(",") if part]
    if any("=" not in pair for pair in pairs):
        raise ValueError(f"{CONNECT_TO} is {os.environ[CONNECT_TO]!r}; write host:port=ip:port, separated by commas")
    return dict(pair.split("=", 1) for pair in pairs)


def child_environment(home: Path, project: Path, routes: Mapping[str, str]) -> dict[str, str]:
    """The environment for Dagster's own processes."""
    return {
        **os.environ,
        "DAGSTER_HOME": str(home),
        "DAGSTER_DISABLE_TELEMETRY": "1",
        PROJECT: str(project),
        CONNECT_TO: ",".join(f"{k}={v}" for k, v in routes.items()),
    }
