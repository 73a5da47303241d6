"""Starting a local Ray on a machine that is too busy for it, and finding one that is said to run here."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fourmill.runtime.ray_session import RayConfig, RayUnreachableError, check_reachable, no_dashboard

# Ray's own limit, 30 seconds, cannot be set: the question that it asks until then is made to fail at once.
PROGRAM = """
import psutil
from ray._private import services
from fourmill.runtime import ray_session

def too_late(*arguments):
    raise Exception("The current node timed out during startup.")

services.get_node = too_late
ray_session._INIT_TRIES = 2
try:
    ray_session.ensure_ray(ray_session.RayConfig(num_workers=1))
except Exception as error:
    print("failed:", error)
left = [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
print("left:", [" ".join(child.cmdline())[:200] for child in left])
"""


@pytest.mark.ray
def test_a_start_that_times_out_leaves_no_processes_behind() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert "failed:" in done.stdout and "left: []" in done.stdout, done.stdout + done.stderr


IMPORTED_FIRST = """
import ray
from fourmill.runtime import ray_session

ray_session._INIT_TRIES = 1
ray_session.ensure_ray(ray_session.RayConfig(num_workers=1))
print("answered:", ray.get(ray.remote(lambda: 7).remote()))
ray_session.stop_ray()
"""


@pytest.mark.ray
def test_ray_starts_where_somebody_imported_it_first() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    done = subprocess.run([sys.executable, "-c", IMPORTED_FIRST], capture_output=True, text=True, env=environment)
    assert "answered: 7" in done.stdout, done.stdout + done.stderr


@pytest.fixture
def last_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which `ray start` leaves its address, on a machine where no Ray runs."""
    from ray._private import services

    monkeypatch.setattr(services, "find_gcs_addresses", set)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray" / "ray_current_cluster"


def test_auto_without_a_ray_is_said_before_any_work(last_started: Path) -> None:
    with pytest.raises(RayUnreachableError, match=r"no Ray runs on this machine.*`ray start --head`"):
        check_reachable(RayConfig(address="auto"))


def test_auto_is_the_cluster_started_last_or_the_one_of_the_environment(
    last_started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        last_started.write_text(address)
        check_reachable(RayConfig(address="auto"))
        last_started.unlink()
        monkeypatch.setenv("RAY_ADDRESS", address)
        check_reachable(RayConfig(address="auto"))
    with pytest.raises(RayUnreachableError, match=rf"{address}.*address auto.*ray start --head"):
        check_reachable(RayConfig(address="auto"))


def test_without_a_dashboard_it_is_said_how_to_have_one() -> None:
    assert "ray.dashboard: true" in no_dashboard(RayConfig())
    assert "ray.dashboard_url" in no_dashboard(RayConfig(address="auto"))
