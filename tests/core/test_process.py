"""What the settings of a whole process do to it."""

import json
import subprocess
import sys

import pytest

from fourmill.core.process import keep_to_share_of_gpu

# A step's life: blocks as large as gradients are filled and freed, over and over.
_STEPS = """
import json, resource, sys
import torch
from fourmill.core.process import prepare_torch
if sys.argv[1] == "prepared":
    prepare_torch(2, False)

def step():
    blocks = [torch.ones(2**21) for _ in range(16)]
    return sum(float(block[0]) for block in blocks)

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

# Of several, since the first ones still spread out in memory.
faults = min(faults_of_a_step() for _ in range(12))
tiny = torch.full((2**20,), 1e-38) * 1e-3
print(json.dumps({"faults": faults, "tiny": int((tiny != 0).sum())}))
"""


def seen(how: str) -> dict[str, int]:
    ended = subprocess.run([sys.executable, "-c", _STEPS, how], check=True, capture_output=True, text=True)
    return json.loads(ended.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_a_step_gets_its_memory_from_the_step_before() -> None:
    plain, prepared = seen("plain"), seen("prepared")
    if plain["faults"] < 10_000:
        pytest.skip("128 MB are not given by pages of 4 kB here, so there is nothing to see")
    assert prepared["faults"] < plain["faults"] / 10


def test_numbers_too_small_to_be_normal_are_zero_in_every_thread() -> None:
    assert seen("plain")["tiny"] == 2**20
    assert seen("prepared")["tiny"] == 0


_GARBAGE = """
import gc, weakref
from fourmill.core.process import collect_rarely

class Worker:
    pass

def cycle():
    worker = Worker()
    worker.me = worker
    return worker

first = cycle()
gone = weakref.ref(first)
collect_rarely()
assert gc.get_freeze_count() > 1000
del first
assert gone()
collect_rarely()
assert gone() is None

later = weakref.ref(cycle())
assert later()
kept = [[] for _ in range(100_000)]
assert later() is None
"""


def test_a_worker_that_is_gone_is_freed_when_the_next_is_there_and_later_garbage_soon() -> None:
    subprocess.run([sys.executable, "-c", _GARBAGE], check=True)


@pytest.mark.parametrize(("share", "bound"), [(0.25, [0.25]), (1.0, []), (2.0, []), (0.0, [])])
def test_a_process_with_a_part_of_a_gpu_keeps_to_that_part_of_its_memory(
    share: float, bound: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    asked: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", asked.append)
    keep_to_share_of_gpu(share)
    assert asked == bound
