"""Which 4M serves after a training: the new one if its loss holds, else the one before it."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fourmill.pipelines.profiles import smallest
from fourmill.runtime import superres, training
from fourmill.runtime.models import ModelMissingError, ModelRef, current, set_current
from fourmill.runtime.session import Session
from fourmill.runtime.superres import train_superres
from fourmill.runtime.training import FourmName, train_fourm

BASE = ModelRef(name="fourm", digest="base", path="models/fourm/base")
SCORES = {
    "psnr_db": {"superres": 19.0, "bicubic": 18.0, "tokenizer": 22.0},
    "psnr_to_tokenizer_db": {"superres": 20.0, "bicubic": 19.0},
}


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    """A project with a pretrained 4M, in which trainings end at once with the loss that `losses` says."""
    session = Session(smallest(tmp_path))
    set_current(session.store, "cc12m", BASE)
    monkeypatch.setattr(training, "make_manifest", lambda session: SimpleNamespace(digest="m"))

    def score(work: Any, session: Session) -> tuple[dict[str, dict[str, float]], int]:
        (scored,) = work.args
        assert scored.digest == "made", "another model is scored than the one that was trained"
        return SCORES, 4

    monkeypatch.setattr(superres, "run_warm", score)
    return session


def train(session: Session, monkeypatch: pytest.MonkeyPatch, name: FourmName, last_loss: float) -> ModelRef:
    def end_at_once(module: str, spec: Any, *_: Any) -> str:
        made = {"digest": "made", "path": f"models/{spec.name}/made", "figures": {}, "baseline": {}}
        report = {**made, "loss_curve": [[0, 2.0], [9, last_loss]]}
        session.store.write("report.json", json.dumps(report).encode())
        return "report.json"

    monkeypatch.setattr(training, "run_program", end_at_once)
    return train_superres(session) if name == "superres" else train_fourm(session, name)


@pytest.mark.parametrize("name", ["fourm", "text2im", "superres"])
def test_a_model_whose_loss_holds_serves(session: Session, monkeypatch: pytest.MonkeyPatch, name: FourmName) -> None:
    made = train(session, monkeypatch, name, last_loss=1.0)
    assert current(session.store, "cc12m", name, f"fourm/{name}") == made
    if name == "superres":
        assert made.report["figures"]["psnr_db"] == 19.0 and made.report["scored"]["samples"] == 4


@pytest.mark.parametrize("last_loss", [9.0, math.nan])
@pytest.mark.parametrize("name", ["fourm", "text2im", "superres"])
def test_one_whose_loss_does_not_leaves_the_place_to_the_one_before(
    session: Session, monkeypatch: pytest.MonkeyPatch, name: FourmName, last_loss: float
) -> None:
    made = train(session, monkeypatch, name, last_loss)
    assert made.digest == "made"
    if name == "fourm":
        assert current(session.store, "cc12m", "fourm", "fourm/pretrain") == BASE
    else:
        with pytest.raises(ModelMissingError, match=f"fourm/{name} first"):
            current(session.store, "cc12m", name, f"fourm/{name}")
