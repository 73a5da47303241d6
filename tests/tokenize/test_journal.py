"""What TensorBoard is given, read back with its own reader."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fourmill.core.metrics import USAGE_WINDOW
from fourmill.core.store import Store
from fourmill.core.work import no_progress
from fourmill.tokenize import journal
from fourmill.tokenize.journal import Journal
from fourmill.tokenize.state import start
from fourmill.tokenize.train import train_tokenizer
from fourmill.tokenize.train_set import read_label


def _values(log: EventAccumulator, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in log.Scalars(name)]


def test_codebook_usage_and_perplexity_are_those_of_each_window_of_tokens(
    spec: Any, store: Store, tmp_path: Path
) -> None:
    one = spec("clip")
    state = start(one.config, read_label(store, one.train_set, one.train_set_digest, "clip"))
    half = torch.arange(USAGE_WINDOW // 2).view(-1, 8, 8)
    with Journal(tmp_path, one.config, True) as opened:
        opened.open(0)
        for tokens in (half % 256, half % 256, half * 0, None, half % 2 * 511, half % 512):
            state.step += 1
            opened.note(state, 1.0, 1.0, tokens)
    log = EventAccumulator(str(tmp_path)).Reload()
    assert _values(log, "train/codebook_usage") == [(2, 0.5), (5, pytest.approx(2 / 512))]
    mixed = 0.75**-0.75 * 0.25**-0.25  # three quarters one codeword, a quarter another
    assert _values(log, "train/codebook_perplexity") == [(2, pytest.approx(256)), (5, pytest.approx(mixed))]


def test_a_training_logs_how_its_codebook_is_used(spec: Any, read_report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "USAGE_WINDOW", 2 * 8 * 64)  # tokens of two steps
    report = read_report(train_tokenizer(spec("semseg", steps=6, score_every=3), no_progress))
    log = EventAccumulator(report["tensorboard"]).Reload()
    usage, perplexity = (_values(log, f"train/codebook_{name}") for name in ("usage", "perplexity"))
    assert [step for step, _ in usage] == [step for step, _ in perplexity] == [2, 4, 6]
    for (_, used), (_, spread) in zip(usage, perplexity, strict=True):
        assert (
            1 < spread < used * 512 + 0.01 <= 512.01
        )  # evenly used codewords have the highest perplexity, their number
    for name, digits in (("usage", 4), ("perplexity", 1)):
        scored = _values(log, f"held_out/{name}")
        assert [step for step, _ in scored] == [3, 6]
        assert scored[-1][1] == pytest.approx(report[name], abs=10**-digits)
