"""Two processes over gloo against one: equal weights within what the order of sums changes."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fourmill.core.checkpoint import save_checkpoint
from fourmill.core.ranks import Ranks, RanksError, join_ranks
from fourmill.core.store import LocalStore
from fourmill.core.work import no_progress
from fourmill.runtime.launch import ProgramError, run_program
from fourmill.tokenize.batches import Batches
from fourmill.tokenize.config import TrainSetConfig
from fourmill.tokenize.load import load_image_tokenizer
from fourmill.tokenize.spec import TokenizerSpec
from fourmill.tokenize.state import start
from fourmill.tokenize.train import train_tokenizer
from fourmill.tokenize.train_set import build_train_set, read_label


@pytest.mark.parametrize("label", ["depth", "semseg"])
def test_two_processes_train_the_tokenizer_that_one_does(spec, store, read_report, tmp_path, label):
    values = {"precision": "fp32", "steps": 4, "ema_decay": 0.9}
    alone = read_report(train_tokenizer(spec(label, folder="one", **values), no_progress))
    shared = spec(label, folder="two", **values).model_copy(update={"processes": 2})
    report = read_report(run_program("fourmill.tokenize", shared, tmp_path / "log", 1, no_progress, 2))
    assert report["digest"] != alone["digest"]  # sums in another order
    assert np.allclose(np.array(report["curve"]), np.array(alone["curve"]), rtol=1e-3)
    one, two = (load_image_tokenizer(store, found["path"]).state_dict() for found in (alone, report))
    for key, value in one.items():
        close = torch.isclose(value, two[key], atol=2e-3)
        # A latent between two codewords may fall to either.
        assert close.float().mean() > 0.95 if key.startswith("quantize") else close.all(), key
    assert report["figures"].keys() == alone["figures"].keys()


@pytest.fixture
def drawn(spec: Any, store: LocalStore, tiny: Any) -> Callable[..., TokenizerSpec]:
    """The smallest training of a label on crops drawn at several sides."""
    squeezed = TrainSetConfig(num_samples=20, num_eval=4, blocks=("block_00", "block_01"), side_px=96)
    made = build_train_set(store, tiny.dataset, tiny.layout, squeezed, 64, tiny.features)

    def make(label: str, folder: str, **values: Any) -> TokenizerSpec:
        one = spec(label, folder=folder, sides_px=(32, 64, 96), crop_scale=(0.3, 1.0), precision="fp32", **values)
        return one.model_copy(update={"train_set": made.path, "train_set_digest": made.digest})

    return make


def test_processes_draw_one_side_for_every_batch(drawn, store):
    one = drawn("rgb", "sides", batch_size=2)
    labels = read_label(store, one.train_set, one.train_set_digest, "rgb")
    shares = [Batches(labels, one.config, Ranks(rank, 2)) for rank in (0, 1)]
    sides = [tuple(share(draw).shape[-1] for share in shares) for draw in range(30)]
    assert set(sides) == {(32, 32), (64, 64), (96, 96)}


def test_two_processes_train_at_several_sides_as_one_does_and_resume_after_kill_9(
    drawn, kill_at, store, read_report, tmp_path
):
    values = {"steps": 20, "checkpoint_every": 2}
    alone = read_report(train_tokenizer(drawn("rgb", "one", **values), no_progress))
    shared = drawn("rgb", "two", **values).model_copy(update={"processes": 2})
    whole = read_report(run_program("fourmill.tokenize", shared, tmp_path / "log", 1, no_progress, 2))
    assert np.allclose(np.array(whole["curve"][:6]), np.array(alone["curve"][:6]), rtol=1e-2)
    store.delete(f"models/{shared.name}/trained/{shared.input_digest}/report.json")
    again = shared.model_copy(update={"run_folder": str(tmp_path / "again")})
    kill = kill_at(f"{again.run_folder}/checkpoint.pt", 4)
    with pytest.raises(ProgramError, match="ended with code -9"):
        run_program("fourmill.tokenize", again, tmp_path / "log", 1, kill, 2)
    resumed = read_report(run_program("fourmill.tokenize", again, tmp_path / "log", 1, no_progress, 2))
    assert "resumed at step" in (tmp_path / "log" / "log.txt").read_text()
    for name in ("digest", "curve", "figures"):
        assert resumed[name] == whole[name], name


def test_processes_that_do_not_see_one_checkpoint_are_refused(spec, store, tmp_path: Path):
    specs = [spec("clip", folder=f"disk{rank}", steps=4).model_copy(update={"processes": 2}) for rank in (0, 1)]
    labels = read_label(store, specs[0].train_set, specs[0].train_set_digest, "clip")
    state = start(specs[0].config, labels)
    state.step = 2
    save_checkpoint(Path(specs[0].run_folder), specs[0].input_digest, state.snapshot())
    commands = []
    for rank, one in enumerate(specs):
        file = tmp_path / f"spec{rank}.json"
        file.write_text(one.model_dump_json())
        commands.append(["-m", "fourmill.tokenize", "--spec", str(file)])
    for process in _started(*commands):
        said = process.communicate(timeout=300)[0].decode()
        assert process.returncode != 0 and "rank 0 at 2, rank 1 at 0" in said, said
        assert "Use a folder that all machines share" in said


def _started(*commands: list[str]) -> list[subprocess.Popen[bytes]]:
    """Pythons with these arguments, as the processes of one training."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"OMP_NUM_THREADS": 1, "WORLD_SIZE": len(commands), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = []
    for rank, command in enumerate(commands):
        environment = {**os.environ, **{name: str(value) for name, value in {**place, "RANK": rank}.items()}}
        command = [sys.executable, *command]
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    return running


_K_MEANS = """
import torch
from fourmill.core.ranks import join_ranks
from fourmill.tokenize.config import QuantizerConfig
from fourmill.tokenize.quantizer import Quantizer

class GpuLike(Quantizer):
    def _averages(self, unit_ND, tokens_N, ranks):
        counts_K, directions_KD = super()._averages(unit_ND, tokens_N, ranks)
        if ranks.size == 1:  # what is summed over all processes is equal on all, in whatever order each did its part
            directions_KD += 1e-3 * torch.randn(directions_KD.shape, generator=torch.Generator().manual_seed(rank))
        return counts_K, directions_KD

with join_ranks(2, "a codebook", "fourmill.tokenize") as ranks:
    rank = ranks.rank
    assert ranks.from_first(torch.full((3,), float(rank))).tolist() == [0, 0, 0]
    torch.manual_seed(0)
    config = QuantizerConfig(codebook_size=16, latent_dim=4, kmeans_init=True)
    quantizer = GpuLike(config, 1.0).train()
    latents = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(1))[rank::2]
    for step in range(2):
        quantizer(latents, torch.Generator().manual_seed(step), ranks)
    codebook = torch.cat([quantizer.codewords_KD, quantizer._codebook.cluster_size[:, None]], 1)
    print("codebook", codebook.numpy().tobytes().hex())
"""


def test_processes_start_from_one_codebook_however_each_adds_up():
    running = _started(["-c", _K_MEANS], ["-c", _K_MEANS])
    said = [process.communicate(timeout=300)[0].decode() for process in running]
    found = [line for one in said for line in one.splitlines() if line.startswith("codebook")]
    assert len(found) == 2 and len(set(found)) == 1, said


_LATE = """
import os, sys
from pathlib import Path
told, come, is_late = *map(Path, sys.argv[1:]), os.environ["RANK"] == "1"
if is_late:
    told.read_text()
import torch.distributed as dist
from fourmill.core.ranks import join_ranks

connect = dist.init_process_group

def see(*arguments, **values):
    print("all are there:", come.exists(), flush=True)
    connect(*arguments, **values)

dist.init_process_group = see
come.touch() if is_late else told.write_text("")
with join_ranks(2, "a codebook", "fourmill.tokenize") as ranks:
    ranks.check_alike(0, "a codebook", "nowhere")
"""


def test_processes_connect_when_the_last_has_come_however_late(tmp_path: Path):
    """From there on they wait for each other ten minutes, which may be too little for a disk that is slower than the others."""
    told, come = tmp_path / "told", tmp_path / "come"
    os.mkfifo(told)
    running = _started(*[["-c", _LATE, str(told), str(come)] for _ in range(2)])
    for process in running:
        said = process.communicate(timeout=300)[0].decode()
        assert process.returncode == 0 and "all are there: True" in said, said


@pytest.mark.parametrize("rank", [0, 1])
def test_a_training_whose_other_process_never_comes_says_so(rank: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fourmill.core.ranks._JOINING", timedelta(seconds=1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": 2, "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    with (
        pytest.raises(RanksError, match=rf"not all of its 2 processes came within 0:00:01, says rank {rank}"),
        join_ranks(2, "a codebook", "fourmill.tokenize"),
    ):
        pass


def test_processes_see_the_rows_of_one_batch(spec, store):
    one = spec("depth")
    labels = read_label(store, one.train_set, one.train_set_digest, "depth")
    whole = Batches(labels, one.config)(3)
    parts = [Batches(labels, one.config, Ranks(rank, 2))(3) for rank in (0, 1)]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole)
    with pytest.raises(ValueError, match="a batch of 8 cannot be shared by 3 processes"):
        Batches(labels, one.config, Ranks(0, 3))


def test_a_training_for_two_is_not_started_alone(spec, tmp_path: Path):
    shared = spec("clip").model_copy(update={"processes": 2})
    with pytest.raises(RanksError, match=r"torchrun --standalone --nproc-per-node 2 -m fourmill\.tokenize"):
        train_tokenizer(shared, no_progress)
    assert json.loads(shared.model_dump_json())["processes"] == 2
