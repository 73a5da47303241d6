"""How any network is asked: alone for the first batch of a size, with weights that are made smaller once."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from fourmill.pseudolabel.config import ClipConfig
from fourmill.pseudolabel.network import Forward, Standardise

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def test_the_first_batch_of_a_size_is_asked_alone_and_later_ones_are_not() -> None:
    """What the network keeps for that size is there before another stream may read it."""
    others, together = threading.Event(), threading.Barrier(2)
    asked: list[int] = []

    def function(pixels_BCHW: Tensor) -> tuple[Tensor, ...]:
        asked.append(len(pixels_BCHW))
        if len(asked) == 1:
            second.append(threads.submit(forward, torch.zeros(2, 3, 4, 4)))
            others.wait(0.2)
            assert asked == [1]
        elif len(asked) > 2:
            together.wait(60)
        return (pixels_BCHW,)

    second = []
    forward = Forward(ClipConfig(weights="seeded:0"), CPU, nn.Identity(), function)
    with ThreadPoolExecutor(2) as threads:
        forward(torch.zeros(1, 3, 4, 4))
        second[0].result()
        for made in [threads.submit(forward, torch.zeros(3, 3, 4, 4)) for _ in range(2)]:
            made.result()
    assert asked == [1, 2, 3, 3]


class Weighted(nn.Conv2d):
    """A convolution that does something to its weights first, in float32."""


def test_layers_that_compute_in_half_precision_keep_their_weights_in_it_from_the_first_batch_on() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), Weighted(4, 4, 3), nn.GroupNorm(2, 4)).requires_grad_(False)
    network = network.to(memory_format=torch.channels_last)
    forward = Forward(ClipConfig(weights="seeded:0", precision="bf16"), CPU, network, lambda x: (network(x),))
    with torch.inference_mode():
        (output,) = forward(torch.zeros(1, 3, 8, 8))
    assert output.dtype == torch.float32
    weights = [parameter for name, parameter in network.named_parameters() if name.endswith("weight")]
    assert [weight.dtype for weight in weights] == [torch.bfloat16, torch.float32, torch.float32]
    assert weights[0].is_contiguous(memory_format=torch.channels_last)


def test_pixels_are_standardised_channel_by_channel() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    rgb_BCHW = torch.rand(2, 3, 4, 5)
    found = Standardise(mean, std, CPU)(rgb_BCHW)
    for channel in range(3):
        expected = (rgb_BCHW[:, channel] - mean[channel]) / std[channel]
        assert torch.allclose(found[:, channel], expected)
