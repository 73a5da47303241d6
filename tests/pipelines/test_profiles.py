"""What the profiles ask of their tokenizers, beside what the paper reports of its own."""

from pathlib import Path

import pytest

from fourmill.core.modality import IMAGE_TOKENS
from fourmill.pipelines.profiles import cc12m_4m7, demo
from fourmill.tokenize.presets import MULTI_RESOLUTION

TABLE_31 = {"normal": ("mean_angle", 4.0), "depth": ("std_l1", 0.06), "semseg": ("miou", 0.905)}


def reaches(label: str, value: float, folder: Path) -> bool:
    """Whether a tokenizer of `cc12m_4m7` with this figure serves; baselines are those that are far off."""
    name = TABLE_31[label][0]
    far, better = (0.1, "higher") if name == "miou" else (100.0, "lower")
    return cc12m_4m7(folder).bounds_of(label).reaches({"name": name, "value": value, "baseline": far, "better": better})


@pytest.mark.parametrize("label", TABLE_31)
def test_a_tokenizer_as_good_as_the_papers_serves_and_one_twice_as_far_off_does_not(label: str, tmp_path: Path) -> None:
    paper = TABLE_31[label][1]
    assert reaches(label, paper, tmp_path)
    assert not reaches(label, 1 - 2 * (1 - paper) if label == "semseg" else 2 * paper, tmp_path)


def test_the_demos_tokenizers_use_their_codebooks(tmp_path: Path) -> None:
    assert all(demo(tmp_path).bounds_of(label).min_usage == 0.8 for label in IMAGE_TOKENS)


def test_clip_sees_as_many_crops_at_every_side_as_in_the_stages_before(tmp_path: Path) -> None:
    project = cc12m_4m7(tmp_path)
    sets = [project.train_set, *project.more_train_sets.values()]
    assert {one.clip_crops for one in sets} == {4}
    assert project.more_train_sets["multi_resolution"].clip_sides(224) == MULTI_RESOLUTION
