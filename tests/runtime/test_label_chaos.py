"""`kill -9` of an actor, a Ray node and the driver while a block is labelled: once each here, ten times in `make chaos`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.ray
def test_whatever_is_killed_the_labels_are_those_of_a_plain_loop() -> None:
    command = [sys.executable, "-m", "bench.chaos_labels", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])["figures"]
    assert figures == {"kills_actor": 1, "kills_node": 1, "kills_driver": 1, "shards_that_differ": 0}
