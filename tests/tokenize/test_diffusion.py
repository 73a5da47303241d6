import pytest
import torch

from fourmill.tokenize.config import DiffusionDecoderConfig
from fourmill.tokenize.diffusion import add_noise, sample_ddim, signal_levels, trailing_steps
from fourmill.tokenize.unet import PatchedUNet, time_features


def test_signal_levels_of_the_public_schedule():
    levels = signal_levels(1000)
    assert levels[999] == 0
    assert levels[0] == pytest.approx(0.9999, abs=5e-5)
    assert levels[500] == pytest.approx(0.0752, abs=5e-5)
    assert (levels.diff() < 0).all()


@pytest.mark.parametrize("steps", [0, 1])
def test_a_schedule_without_a_first_and_a_last_step_is_refused(steps):
    with pytest.raises(ValueError, match=f"schedule of {steps} steps, expected at least 2"):
        signal_levels(steps)


def test_trailing_steps():
    assert trailing_steps(1000, 50) == list(range(999, 18, -20))
    assert trailing_steps(1000, 1) == [999]
    assert trailing_steps(1000, 3) == [999, 666, 332]
    for wrong in (0, -1, 1001):
        with pytest.raises(ValueError, match=rf"{wrong} sampling steps, expected 1\.\.1000"):
            trailing_steps(1000, wrong)


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_a_perfect_prediction_is_sampled_whatever_the_noise(steps):
    clean = torch.rand(2, 3, 8, 8) * 2 - 1
    levels = signal_levels(1000)
    visited = []

    def predict(x, step):
        visited.append(int(step[0]))
        assert torch.allclose(x, add_noise(clean, noise, levels[step]), atol=1e-4)
        return clean

    noise = torch.randn(2, 3, 8, 8)
    assert torch.allclose(sample_ddim(predict, noise, levels, steps, clamp=True), clean)
    assert visited == trailing_steps(1000, steps)


def test_clamping_is_a_choice():
    predict = lambda x, step: torch.full_like(x, 3.0)  # noqa: E731
    noise = torch.randn(1, 1, 4, 4)
    assert sample_ddim(predict, noise, signal_levels(1000), 2, clamp=True).max() == 1
    assert sample_ddim(predict, noise, signal_levels(1000), 2, clamp=False).max() == 3


def test_time_features():
    features = time_features(torch.tensor([0, 7]), 256)
    assert features.shape == (2, 256)
    assert torch.equal(features[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    assert features[1, 0] == pytest.approx(torch.cos(torch.tensor(7.0)).item())


def _shapes(config, channels):
    with torch.device("meta"):
        network = PatchedUNet(config, channels, 32)
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def test_the_papers_network_has_the_public_names_and_shapes():
    shapes = _shapes(DiffusionDecoderConfig(), 3)
    expected = {
        "time_embed.0.weight": (1024, 256),
        "time_embed.2.weight": (1024, 1024),
        "input_blocks.0.0.weight": (256, 80, 3, 3),
        "input_blocks.4.0.op.weight": (256, 256, 3, 3),
        "input_blocks.5.0.skip_connection.weight": (512, 256, 1, 1),
        "input_blocks.8.0.op.weight": (512, 512, 3, 3),
        "input_blocks.9.1.qkv.weight": (1536, 512, 1),
        "input_blocks.11.1.proj_out.weight": (512, 512, 1),
        "input_blocks.15.0.emb_layers.1.weight": (512, 1024),
        "middle_block.1.norm.weight": (512,),
        "output_blocks.3.2.conv.weight": (512, 512, 3, 3),
        "output_blocks.7.2.conv.weight": (512, 512, 3, 3),
        "output_blocks.8.0.in_layers.2.weight": (512, 1024, 3, 3),
        "output_blocks.11.0.in_layers.0.weight": (768,),
        "output_blocks.11.1.conv.weight": (512, 512, 3, 3),
        "output_blocks.12.0.skip_connection.weight": (256, 768, 1, 1),
        "output_blocks.15.0.out_layers.3.weight": (256, 256, 3, 3),
        "out.0.weight": (256,),
        "out.2.weight": (48, 256, 3, 3),
    }
    assert {key: shapes.get(key) for key in expected} == expected
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == pytest.approx(196.35e6, abs=5e3)
    assert _shapes(DiffusionDecoderConfig(), 1)["input_blocks.0.0.weight"] == (256, 48, 3, 3)


def test_a_new_network_gives_zeros_and_uses_its_latents_once_trained():
    config = DiffusionDecoderConfig(channels=16, multipliers=(1, 2), res_blocks=1, attention_levels=(1,))
    torch.manual_seed(0)
    network = PatchedUNet(config, 3, 8)
    image, steps = torch.randn(2, 3, 16, 16), torch.tensor([3, 900])
    assert not network(image, steps, torch.randn(2, 8, 2, 2)).any()
    torch.nn.init.normal_(network.get_parameter("out.2.weight"))
    first, second = (network(image, steps, torch.randn(2, 8, 2, 2)) for _ in range(2))
    assert first.shape == (2, 3, 16, 16) and not torch.allclose(first, second)


def test_noise_is_of_the_prediction_before_it_is_clamped():
    """One step worked by hand: levels 0 and 0.64, a prediction of 3 that is clamped to 1."""
    levels, noise = torch.tensor([0.64, 0.0]), torch.full((1, 1, 2, 2), 0.5)
    seen: list[torch.Tensor] = []

    def predict(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return torch.full_like(x, 3.0)

    decoded = sample_ddim(predict, noise, levels, 2, clamp=True)
    # Level 0 has no signal, so what is taken for noise is the image as it is: 0.8 * 1 + 0.6 * 0.5.
    assert torch.allclose(seen[1], torch.full_like(noise, 1.1)) and torch.equal(decoded, torch.ones_like(noise))
    levels = torch.tensor([0.64, 0.36, 0.0])
    seen.clear()
    sample_ddim(predict, noise, levels, 3, clamp=True)
    unclamped = (seen[1] - 0.6 * 3) / 0.8
    assert torch.allclose(seen[2], 0.8 * 1 + 0.6 * unclamped)
    assert not torch.allclose(seen[2], 0.8 * 1 + 0.6 * (seen[1] - 0.6) / 0.8)
