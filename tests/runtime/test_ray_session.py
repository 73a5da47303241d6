"""Starting a local Ray on a machine that is too busy for it."""

import subprocess
import sys

import pytest

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
