"""Tokenizers on a GPU: tokens of a CPU, half precision within its bound, and training steps that lower the loss."""

import copy

import numpy as np
import pytest
import torch

from fourmill.tokenize.config import MOST_DIFFERENT, ImageTokenizerConfig
from fourmill.tokenize.conversions import to_network
from fourmill.tokenize.image_tokenizer import ImageTokenizer
from fourmill.tokenize.presets import smallest_tokenizers
from fourmill.tokenize.state import start
from fourmill.tokenize.train import train_step
from fourmill.tokenize.train_set import LabelArrays

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SMALL = smallest_tokenizers(feature_dim=12)


def _labels(label: str, number: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    if label == "rgb":
        return rng.integers(0, 256, (number, 64, 64, 3), dtype=np.uint8)
    if label == "depth":
        return rng.random((number, 64, 64), dtype=np.float32)
    if label == "semseg":
        return rng.choice(np.array([0, 28, 132, 255], np.uint8), (number, 64, 64))
    shape = (number, 8, 8, 12) if label == "clip" else (number, 64, 64, 3)
    return rng.uniform(-1, 1, shape).astype(np.float32)


def _vit(label: str) -> ImageTokenizer:
    torch.manual_seed(0)
    values = SMALL[label].model_dump()
    values["encoder"] |= {"kind": "vit"}
    return ImageTokenizer(ImageTokenizerConfig.model_validate(values)).eval()


@pytest.mark.parametrize("label", SMALL)
def test_tokens_are_those_of_a_cpu(label: str):
    tokenizer, batch = _vit(label), _labels(label, 40)
    here = tokenizer.tokenize(batch)
    there = tokenizer.to_device(torch.device("cuda"))
    assert (there.tokenize(batch) == here).mean() > 0.99  # nearly tied codewords
    full = there.tokenize(batch)
    for precision in ("bf16", "fp16"):
        assert (there.tokenize(batch, precision) != full).mean() <= MOST_DIFFERENT[precision], precision
    assert there.tokenize(batch[:3], "bf16").tolist() == there.tokenize(batch, "bf16")[:3].tolist()
    assert torch.get_float32_matmul_precision() == "highest"


def test_tokens_are_of_the_weights_that_the_last_step_leaves():
    tokenizer, batch = _vit("clip").to_device(torch.device("cuda")), _labels("clip", 4)
    before = tokenizer.tokenize(batch)  # from now on this thread has a stream of its own
    busy = torch.rand(8192, 8192, device="cuda")
    with torch.no_grad():
        for _ in range(20):  # the GPU is far behind when tokens are asked for
            busy = busy @ busy / 8192
        tokenizer.quant_proj.weight.neg_()
    after = tokenizer.tokenize(batch)
    assert not np.array_equal(after, before)
    torch.cuda.synchronize()
    assert np.array_equal(after, tokenizer.tokenize(batch))


@pytest.mark.parametrize("update", [{"cuda_graphs": True}, {"sides_px": (48, 64)}], ids=["graphs", "sides"])
@pytest.mark.parametrize("label", ["rgb", "semseg"])
def test_compiled_steps_are_the_plain_ones_over_a_skipped_step_and_a_way_back(label: str, update: dict[str, object]):
    one = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 8, 8)
    labels = LabelArrays((one * 65535).astype(np.uint16), one, one.astype(np.uint8), len(one))
    losses: list[list[float]] = []
    for compiles in (False, True):
        plain = {"precision": "fp32", "ema_decay": 0.9, "steps": 60}
        training = SMALL[label].training.model_copy(
            update={**plain, **(update if compiles else {}), "compile": compiles}
        )
        config = SMALL[label].model_copy(update={"training": training})
        state = start(config, labels, "cuda")
        kept, seen = state.snapshot(), list[float]()
        for step in range(8):
            side = 48 if step % 2 and "sides_px" in update else 64
            batch = _labels(label, 8)[:, :side, :side]
            x = to_network(np.ascontiguousarray(batch), label, "cuda")
            if step == 3 and label == "rgb":
                x[0, 0, 0, 0] = torch.nan
            figures = train_step(state, x, config)
            assert figures.are_finite == (step != 3 or label != "rgb")
            seen += [figures.loss] if figures.are_finite else []
            if step == 4:
                kept = {key: copy.deepcopy(value) for key, value in state.snapshot().items()}
            if step == 6:
                state = start(config, labels, "cuda")
                state.restore(kept)
        losses.append(seen)
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


@pytest.mark.parametrize("label", SMALL)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_training_steps_lower_the_loss(label: str, precision: str):
    training = SMALL[label].training.model_copy(update={"precision": precision, "steps": 60, "ema_decay": 0.9})
    config = SMALL[label].model_copy(update={"training": training})
    one = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 8, 8)
    state = start(config, LabelArrays((one * 65535).astype(np.uint16), one, one.astype(np.uint8), len(one)), "cuda")
    batch = _labels(label, 8)
    if label != "clip":
        batch = np.ascontiguousarray(batch[:, :2, :2]).repeat(32, 1).repeat(32, 2)  # four patches: soon learnt
    x = to_network(batch, label, "cuda")

    def loss() -> float:
        """With the same noise each time."""
        with torch.no_grad():
            return state.model.eval().loss(x, torch.Generator().manual_seed(0))[0].item()

    before = loss()
    state.model.train()
    assert all(train_step(state, x, config).are_finite for _ in range(30))
    assert loss() < before
    decoded = state.published.eval().detokenize(state.published.tokenize(batch[:2]))
    assert decoded.shape == batch[:2].shape
