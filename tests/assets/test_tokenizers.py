"""`tokenizers/*` as Dagster runs them: what stops before it begins, and whether captions come back from their ids."""

from pathlib import Path

import dagster as dg
import pytest

from fourmill.assets import tokenizers
from fourmill.assets.workshop import Workshop
from fourmill.pipelines.profiles import smallest
from fourmill.pseudolabel.config import ClipConfig, WeightsMissingError
from fourmill.runtime.models import ModelRef

TEXT = dg.AssetKey(["tokenizers", "text"])


@pytest.mark.parametrize(("share", "passes"), [(0.9, True), (0.89, False)])
def test_a_vocabulary_that_loses_captions_fails_its_check_although_it_knows_their_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, passes: bool
) -> None:
    project = smallest(tmp_path)
    report = {"known_share": 1.0, "figures": {"known_share": 1.0, "round_trip_share": share}}
    fitted = ModelRef(name="text", digest="0", path="models/text/0", report=report)
    monkeypatch.setattr(tokenizers, "fit_text", lambda session: fitted)
    assets = tokenizers.tokenizer_assets(project)
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize(
            assets,
            selection=[TEXT],
            resources={"workshop": Workshop(project)},
            instance=instance,
            raise_on_error=False,
        )
    (check,) = result.get_asset_check_evaluations()
    assert (check.check_name, check.passed, result.success) == ("round_trip", passes, passes)
    assert check.metadata["round_trip_share"].value == share


def test_a_training_set_without_clips_weights_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[object] = []
    monkeypatch.setattr(tokenizers, "run_warm", lambda *given: begun.append(given))
    base = smallest(tmp_path)
    project = base.model_copy(update={"labellers": {**base.labellers, "clip": ClipConfig(weights="stored:clip")}})
    with pytest.raises(WeightsMissingError, match="fourmill weights add clip hf:"):
        dg.materialize(
            tokenizers.tokenizer_assets(project),
            selection=[tokenizers.TRAIN_SET],
            resources={"workshop": Workshop(project)},
        )
    assert not begun
