"""The outside of a training program."""

import subprocess
import sys
from pathlib import Path

import pytest

_AMID_OTHERS = """
import atexit, sys
import torch.distributed as dist
from pydantic import BaseModel
from fourmill.core.program import run_spec_program

class Spec(BaseModel):
    pass

def work(spec, progress):
    atexit.register(print, "an orderly end")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    raise {error}("no room")

with open(sys.argv[1], "w") as file:
    file.write("{{}}")
run_spec_program("module", "", Spec, work, ["--spec", sys.argv[1]])
"""


@pytest.mark.parametrize("error", ["ValueError", "KeyError"])
def test_a_program_that_fails_amid_others_tells_why_and_ends_at_once(tmp_path: Path, error: str) -> None:
    """An orderly end of nccl's would wait for the others, and they for it."""
    command = [sys.executable, "-c", _AMID_OTHERS.format(error=error), str(tmp_path / "spec.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "no room" in done.stderr and "orderly" not in done.stdout
