"""What happens in Dagster to a tokenizer that does not reach its bounds: the one before serves, and nothing is made with it."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from fourmill.assets.tokenizers import tokenizer_assets
from fourmill.assets.tokens import token_assets
from fourmill.assets.workshop import Workshop
from fourmill.core.ledger import write_ledger
from fourmill.core.shards import ShardPlace, read_receipt
from fourmill.core.store import Store
from fourmill.pipelines.profiles import smallest
from fourmill.runtime import training
from fourmill.runtime.models import ModelRef, current, set_current
from fourmill.runtime.project import Project
from fourmill.tokenize.bounds import TokenizerBounds
from fourmill.tokenize.train import train_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::dagster.BetaWarning")  # backfill_policy, as `build_definitions` does

TOKENIZER, TOKENS = dg.AssetKey(["tokenizers", "semseg"]), dg.AssetKey(["tokens", "semseg"])
BLOCK = "block_00"


@pytest.fixture
def project(store: Store, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards_here: Any) -> Project:
    """Labels and a training set that are there; trainings and shards are made in this process."""
    for folder in ("images", "semseg"):
        write_ledger(store, tiny.dataset, folder, BLOCK, tiny.layout.shards_of(BLOCK), folder, 1)
    set_current(store, tiny.dataset, ModelRef(name="train_set", digest=tiny.train_set.digest, path=tiny.train_set.path))
    monkeypatch.setattr(
        training,
        "run_program",
        lambda module, spec, folder, threads, progress, processes: train_tokenizer(spec, progress),
    )
    return smallest(tmp_path).model_copy(update={"dataset": tiny.dataset, "layout": tiny.layout, "threads": 1})


def trained_in(project: Project, steps: int, bounds: TokenizerBounds) -> Project:
    config = project.tokenizers["semseg"]
    shorter = config.model_copy(update={"training": config.training.model_copy(update={"steps": steps})})
    changed = {"tokenizers": {**project.tokenizers, "semseg": shorter}, "tokenizer_bounds": {"semseg": bounds}}
    return project.model_copy(update=changed)


def materialize(project: Project) -> dg.ExecuteInProcessResult:
    blocks = dg.StaticPartitionsDefinition(project.layout.block_keys())
    with dg.DagsterInstance.ephemeral() as instance:
        return dg.materialize(
            [*tokenizer_assets(project), *token_assets(project, blocks)],
            selection=[TOKENIZER, TOKENS],
            partition_key=BLOCK,
            resources={"workshop": Workshop(project)},
            instance=instance,
            raise_on_error=False,
        )


def made(result: dg.ExecuteInProcessResult) -> set[dg.AssetKey]:
    return {event.asset_key for event in result.get_asset_materialization_events() if event.asset_key}


def test_a_tokenizer_below_its_bounds_fails_its_run_and_does_not_serve(project: Project, store: Store) -> None:
    any_will_do = TokenizerBounds(error_share=None, min_usage=0)
    place = ShardPlace(project.dataset, "train", "_tokens/tok_semseg@64", 0)
    good = materialize(trained_in(project, 2, any_will_do))
    assert good.success and made(good) == {TOKENIZER, TOKENS}
    before, tokens = current(store, project.dataset, "semseg", ""), read_receipt(store, place)
    assert tokens is not None and tokens.recipe.weights == before.digest

    bad = materialize(trained_in(project, 3, any_will_do.model_copy(update={"headline": 2.0})))  # a mean IoU of 2
    assert not bad.success and TOKENS not in made(bad)
    verdicts = {check.check_name: check.passed for check in bad.get_asset_check_evaluations()}
    assert verdicts == {"good_enough": False, "codebook_used": True}
    assert current(store, project.dataset, "semseg", "") == before
    assert read_receipt(store, place) == tokens


def headline(name: str, value: float, baseline: float, better: str) -> dict[str, Any]:
    return {"name": name, "value": value, "baseline": baseline, "better": better}


@pytest.mark.parametrize(
    ("bounds", "good", "bad"),
    [
        ({"headline": 0.1}, ("l1_standardised", 0.09, 0.4, "lower"), ("l1_standardised", 0.11, 0.4, "lower")),
        ({"headline": 22}, ("psnr_db", 22.1, 16, "higher"), ("psnr_db", 21.9, 16, "higher")),
        ({"error_share": 0.5}, ("degrees", 11, 23, "lower"), ("degrees", 12, 23, "lower")),
        ({"error_share": 0.1}, ("psnr_db", 26.1, 16, "higher"), ("psnr_db", 25.9, 16, "higher")),  # 10 dB: a tenth
        ({"error_share": 0.5}, ("miou", 0.66, 0.3, "higher"), ("miou", 0.64, 0.3, "higher")),
        ({"error_share": 0.5}, ("cosine", 0.81, 0.6, "higher"), ("cosine", 0.79, 0.6, "higher")),
    ],
)
def test_bounds_know_which_way_is_better(bounds: dict[str, float], good: Any, bad: Any) -> None:
    asked = TokenizerBounds.model_validate(bounds)
    assert asked.reaches(headline(*good)) and not asked.reaches(headline(*bad))


@pytest.mark.parametrize(("usage", "serves"), [(0.79, False), (0.8, True)])
def test_a_codebook_that_is_hardly_used_does_not_serve(usage: float, serves: bool, tmp_path: Path) -> None:
    project = smallest(tmp_path)
    asked = project.model_copy(update={"tokenizer_bounds": {"semseg": TokenizerBounds(headline=0.5, min_usage=0.8)}})
    report = {"headline": headline("miou", 0.9, 0.3, "higher"), "usage": usage}
    ref = ModelRef(name="semseg", digest="", path="", report=report)
    assert training.is_good_enough(asked, "semseg", ref) == serves
