"""`tokenizers/*` as Dagster runs them: what stops before it begins, and whether captions come back from their ids."""

from pathlib import Path

import dagster as dg
import pytest

from fourmill.assets import tokenizers
from fourmill.assets.workshop import Workshop
from fourmill.pipelines.profiles import cc12m_4m7, smallest
from fourmill.pseudolabel.config import ClipConfig
from fourmill.pseudolabel.stored import WeightsMissingError
from fourmill.runtime.models import ModelRef
from fourmill.runtime.project import Project

TEXT = dg.AssetKey(["tokenizers", "text"])


@pytest.mark.parametrize(("share", "passes"), [(0.9, True), (0.89, False)])
def test_a_vocabulary_that_loses_captions_fails_its_check_although_it_knows_their_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, passes: bool
) -> None:
    project = smallest(tmp_path)
    report = {"figures": {"known_share": 1.0, "round_trip_share": share}}
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
    (made,) = result.get_asset_materialization_events()
    version = (made.materialization.tags or {})["dagster/data_version"]
    assert version == "0" if passes else version.startswith("failed-")


def versions_of_sets(project: Project) -> set[str | None]:
    """Code versions of a project's training sets."""
    specs = [spec for made in tokenizers.tokenizer_assets(project) for spec in made.specs]
    return {spec.code_version for spec in specs if spec.key.path[-1].startswith("train_set")}


@pytest.mark.parametrize(
    ("clip", "changes"),
    [
        ({"mean": (0.5, 0.5, 0.5)}, True),
        ({"std": (0.5, 0.5, 0.5)}, True),
        ({"precision": "fp32"}, True),
        ({"input_px": 112}, True),
        ({"weights": "seeded:7"}, True),
        ({"batch_size": 3}, False),
    ],
)
def test_training_sets_are_stale_when_clips_features_would_change(
    tmp_path: Path, clip: dict[str, object], changes: bool
) -> None:
    project = cc12m_4m7(tmp_path)
    other = {**project.labellers, "clip": project.labellers["clip"].model_copy(update=clip)}
    before = versions_of_sets(project)
    assert len(before) == 1 + len(project.more_train_sets)
    assert versions_of_sets(project.model_copy(update={"labellers": other})).isdisjoint(before) == changes


def test_training_sets_are_stale_when_the_code_of_clips_features_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = cc12m_4m7(tmp_path)
    before = versions_of_sets(project)
    monkeypatch.setattr(type(project.labellers["clip"]), "version", "next")
    assert versions_of_sets(project).isdisjoint(before)


def test_training_sets_are_stale_when_the_side_of_their_squares_changes(tmp_path: Path) -> None:
    project = cc12m_4m7(tmp_path)
    smaller = {name: config.model_copy(update={"input_px": 192}) for name, config in project.tokenizers.items()}
    other = project.model_copy(update={"tokenizers": smaller})
    assert versions_of_sets(other).isdisjoint(versions_of_sets(project))


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
