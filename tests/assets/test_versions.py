"""What makes an asset stale: its code version carries what its content depends on."""

from pathlib import Path

import dagster as dg
import pytest

from fourmill.assets.labels import label_assets
from fourmill.assets.tokenizers import _verdicts, tokenizer_assets
from fourmill.assets.tokens import token_assets
from fourmill.pipelines.profiles import smallest
from fourmill.pseudolabel.config import ClipConfig, DptConfig
from fourmill.runtime.models import ModelRef
from fourmill.runtime.project import Project
from fourmill.tokenize.bounds import TokenizerBounds

pytestmark = pytest.mark.filterwarnings("ignore::dagster.BetaWarning")  # backfill_policy, as `build_definitions` does


def versions(project: Project) -> dict[str, str | None]:
    blocks = dg.StaticPartitionsDefinition(project.layout.block_keys())
    assets = [*label_assets(project, blocks), *tokenizer_assets(project), *token_assets(project, blocks)]
    return {key.to_user_string(): one.code_versions_by_key[key] for one in assets for key in one.keys}


def changed(before: Project, after: Project) -> set[str]:
    then, now = versions(before), versions(after)
    return {name for name in then if then[name] != now[name]}


def with_labellers(project: Project, **configs: DptConfig | ClipConfig) -> Project:
    return project.model_copy(update={"labellers": {**project.labellers, **configs}})


def test_other_weights_or_settings_of_a_network_make_its_label_stale_and_no_other(tmp_path: Path) -> None:
    project = smallest(tmp_path)
    stored = DptConfig(weights=f"stored:depth/{'a' * 64}")
    before = with_labellers(project, depth=stored)
    for update in ({"weights": f"stored:depth/{'b' * 64}"}, {"longer_px": 480}, {"precision": "bf16"}):
        assert changed(before, with_labellers(project, depth=stored.model_copy(update=update))) == {"labels/depth"}
    assert changed(before, with_labellers(project, depth=stored.model_copy(update={"batch_size": 99}))) == set()


def test_other_weights_of_clip_make_what_is_made_of_its_features_stale(tmp_path: Path) -> None:
    project = smallest(tmp_path)
    clip = project.labellers["clip"]
    assert isinstance(clip, ClipConfig)
    stale = changed(project, with_labellers(project, clip=clip.model_copy(update={"weights": "seeded:99"})))
    assert stale == {"tokenizers/train_set", "tokens/clip"}


def test_another_training_makes_its_tokenizer_stale_and_another_log_does_not(tmp_path: Path) -> None:
    project = smallest(tmp_path)
    config = project.tokenizers["rgb"]

    def trained(**update: int) -> Project:
        other = config.model_copy(update={"training": config.training.model_copy(update=update)})
        return project.model_copy(update={"tokenizers": {**project.tokenizers, "rgb": other}})

    assert changed(project, trained(steps=7)) == {"tokenizers/rgb"}
    assert changed(project, trained(log_every=1, score_every=1)) == set()


@pytest.mark.parametrize(("usage", "passes"), [(0.79, False), (0.8, True)])
def test_a_codebook_that_is_hardly_used_fails_its_check(usage: float, passes: bool, tmp_path: Path) -> None:
    bounds = {"semseg": TokenizerBounds(headline=0.5, min_usage=0.8)}
    project = smallest(tmp_path).model_copy(update={"tokenizer_bounds": bounds})
    headline = {"name": "miou", "value": 0.9, "baseline": 0.3, "better": "higher"}
    ref = ModelRef(name="semseg", digest="", path="", report={"headline": headline, "usage": usage})
    assert {one.check: one.passed for one in _verdicts(project, "semseg", ref)} == {
        "good_enough": True,
        "codebook_used": passes,
    }
