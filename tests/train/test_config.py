import subprocess
import sys

import pytest
from pydantic import ValidationError

from fourmill.train.config import (
    MaskingConfig,
    MixtureComponent,
    ModelConfig,
    fourm_b_cc12m,
    fourm_demo,
    fourm_superres_b,
    fourm_superres_demo,
    fourm_text2im_b,
    fourm_text2im_demo,
)


def test_hidden_channels_are_the_public_sizes():
    sizes = {384: 6, 512: 8, 768: 12, 1024: 16, 2048: 32}
    assert [ModelConfig(dim=d, num_heads=h).hidden for d, h in sizes.items()] == [1024, 1365, 2048, 2730, 5461]


def test_the_papers_learning_rates_follow_from_their_batches():
    assert fourm_b_cc12m().optim.learning_rate == pytest.approx(3.2e-3)
    assert fourm_text2im_b().optim.learning_rate == pytest.approx(1.6e-3)


@pytest.mark.parametrize("steps", [1, 6, 3000])
def test_demos_warm_up_within_their_steps(steps: int):
    for config in (fourm_demo(steps), fourm_text2im_demo(steps), fourm_superres_demo(steps)):
        assert config.steps == steps and config.optim.warmup_steps < max(2, steps)


def test_a_fine_tune_has_the_architecture_that_it_starts_from():
    assert fourm_text2im_demo(5).model == fourm_superres_demo(5).model == fourm_demo(5).model
    assert fourm_text2im_b().model == fourm_superres_b().model == fourm_b_cc12m().model


def test_superres_has_the_papers_budgets_and_length():
    config = fourm_superres_b()
    assert config.masking.num_input_tokens == (64, 1024) and config.masking.num_target_tokens == (1024, 1024)
    samples = config.steps * config.batch_size
    assert samples * 2048 == pytest.approx(100e9, rel=0.03)  # tokens, counted at the largest budgets
    assert config.optim.warmup_steps * config.batch_size * 2048 == pytest.approx(5e9, rel=0.01)
    assert not config.copy_tables and config.resolutions == "both"
    whole = [c for c in config.masking.components if c.keep == "all"]
    assert len(whole) == 1 and len(config.masking.components) == 4 and whole[0].input_alphas["caption"] == 5.0


def test_what_cannot_be_is_refused():
    with pytest.raises(ValidationError, match="multiple of 4"):
        ModelConfig(dim=30, num_heads=3)
    component = MixtureComponent(input_alphas={"*": 1.0}, target_alphas={"*": 1.0})
    with pytest.raises(ValidationError, match="the least first"):
        MaskingConfig(components=(component,), num_input_tokens=(9, 8))


def test_configs_load_without_torch():
    code = "import sys, fourmill.train.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
