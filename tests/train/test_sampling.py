import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fourmill.train.sampling import draw_tokens, filter_scores, step_sizes


def test_schedules_are_the_public_lists():
    assert step_sizes(784, 8, "cosine") == [30, 85, 127, 150, 150, 127, 85, 30]
    assert step_sizes(196, 25, "linear") == [8] * 21 + [7] * 4
    many = step_sizes(196, 49, "cosine")
    assert many[0] == many[-1] == 0 and sum(many) == 196


@given(st.integers(1, 300), st.integers(1, 60), st.sampled_from(["cosine", "linear"]))
def test_steps_add_up_to_all_tokens(tokens: int, steps: int, schedule: str):
    sizes = step_sizes(tokens, steps, schedule)  # type: ignore[arg-type]
    assert sum(sizes) == tokens and min(sizes) >= 0 and len(sizes) <= steps


def test_linear_steps_beyond_the_tokens_collapse():
    assert step_sizes(3, 10, "linear") == [1, 1, 1]


def test_no_step_is_refused():
    with pytest.raises(ValueError, match="0 steps for 4 tokens"):
        step_sizes(4, 0, "cosine")


def test_filters_keep_the_likeliest():
    scores = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    assert filter_scores(scores, top_k=2).isfinite().tolist() == [[False, True, True, False]]
    assert filter_scores(scores, top_k=0.25).isfinite().tolist() == [[False, True, False, False]]
    assert filter_scores(scores, top_p=0.1).isfinite().tolist() == [[False, True, False, False]]
    assert filter_scores(scores, top_p=0.85).isfinite().tolist() == [[False, True, True, False]]


def test_draws_follow_the_probabilities():
    scores = torch.tensor([[0.0, math.log(3.0)]]).expand(2000, 2)
    ids, sure = draw_tokens(scores, np.random.default_rng(0).random(2000), 1.0)
    assert 0.70 < ids.mean() < 0.80
    assert sure[ids == 1] == pytest.approx(0.75) and sure[ids == 0] == pytest.approx(0.25)


def test_without_temperature_the_likeliest_is_taken_and_says_how_sure_it_is():
    ids, sure = draw_tokens(torch.tensor([[0.0, 9.0], [1.0, 0.9]]), np.zeros(2), 0.0)
    assert ids.tolist() == [1, 0] and sure[0] > sure[1]
