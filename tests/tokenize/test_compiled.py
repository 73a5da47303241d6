"""Compiled training steps: blocks by torch's compiler, launched as graphs where there is a GPU, are those of the plain ones."""

import shutil

import pytest

from fourmill.core.ranks import ALONE
from fourmill.tokenize.batches import Batches
from fourmill.tokenize.state import start
from fourmill.tokenize.train import train_step
from fourmill.tokenize.train_set import read_label


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor wants a C++ compiler (apt-get install g++)")
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor"
)  # the compiler looks at that of what flows between blocks
def test_compiled_steps_are_the_plain_ones(spec, store):
    losses = []
    for compiles in (False, True):
        one = spec("clip", precision="fp32", compile=compiles, cuda_graphs=compiles)
        labels = read_label(store, one.train_set, one.train_set_digest, "clip")
        state, batches = start(one.config, labels, ALONE.device), Batches(labels, one.config)
        losses.append([train_step(state, batches(state.draw), one.config).loss for _ in range(4)])
        names = set(state.model.state_dict())
        assert not [name for name in names if "_orig_mod" in name]  # weights keep their public names
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
