"""The U-Net: its channels are where the public weights have them, and so they are when it is spelled out for a compiler."""

import pytest
import torch
from torch.nn import functional as F

from fourmill.tokenize.config import DiffusionDecoderConfig
from fourmill.tokenize.unet import PatchedUNet, _norm, copied

SHAPES = [(2, 64, 8, 8), (3, 96, 49), (1, 32, 4, 6)]


def _unet() -> PatchedUNet:
    torch.manual_seed(0)
    config = DiffusionDecoderConfig(channels=32, multipliers=(1, 2), res_blocks=1, attention_levels=(1,))
    unet = PatchedUNet(config, image_channels=3, latent_dim=8)
    for parameter in unet.parameters():  # the last layers are zero in a new one
        torch.nn.init.normal_(parameter, std=0.1)
    return unet


@pytest.mark.parametrize("is_half", [False, True])
def test_a_network_for_a_compiler_gives_the_same_images_and_gradients(is_half: bool):
    unet = _unet()
    noised = torch.randn(2, 3, 32, 32)
    step, latent = torch.tensor([3, 700]), torch.randn(2, 8, 2, 2)
    found = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            image = unet(noised, step, latent).float()
        gradients = torch.autograd.grad(image.square().sum(), list(unet.parameters()))
        # Together: those of biases that a norm takes away again are rounding alone.
        found.append((image.detach(), torch.cat([one.flatten() for one in gradients])))
        unet.suit_compiler()
    bound = 0.05 if is_half else 1e-4
    for kernel, spelled in zip(*found, strict=True):
        assert (kernel - spelled).norm() <= bound * kernel.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_norm_spelled_out_is_the_kernel_and_keeps_the_layout(shape: tuple[int, ...]):
    norm = _norm(shape[1])
    x = torch.randn(shape) * 3 + 5
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    kernel = norm(x)
    norm.is_spelled_out = True
    spelled = norm(x)
    assert torch.allclose(spelled, kernel, atol=1e-5)
    (back,) = torch.autograd.grad((spelled**3).sum(), x)
    (of_kernel,) = torch.autograd.grad((kernel**3).sum(), x)
    assert torch.allclose(back, of_kernel, atol=1e-4 * of_kernel.abs().max().item())
    assert spelled.stride() == back.stride() == x.stride()


@pytest.mark.parametrize("times", [2, 4])
def test_pixels_enlarged_by_copies_are_the_nearest_ones_with_channels_last(times: int):
    x = torch.randn(2, 8, 3, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    large, nearest = copied(x, times), F.interpolate(x, scale_factor=times, mode="nearest")
    assert torch.equal(large, nearest) and large.is_contiguous(memory_format=torch.channels_last)
    weights = torch.randn(large.shape)
    (back,) = torch.autograd.grad((large * weights).sum(), x)
    (of_kernel,) = torch.autograd.grad((nearest * weights).sum(), x)
    assert torch.allclose(back, of_kernel, atol=1e-5) and back.is_contiguous(memory_format=torch.channels_last)


def test_a_compiler_sees_no_interpolation_and_the_same_image():
    unet, seen = _unet(), list[str]()

    def note(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    given = torch.randn(2, 3, 32, 32), torch.tensor([3, 700]), torch.randn(2, 8, 2, 2)
    with torch.no_grad():
        compiled = torch.compile(unet, backend=note)(*given)
        assert torch.allclose(compiled, unet(*given), atol=1e-5)
    assert seen and not any("interpolate" in target for target in seen)


def _silent() -> PatchedUNet:
    """Two levels of 32 channels in which every product is zero: what is in the image comes from what a test sets."""
    torch.manual_seed(0)
    config = DiffusionDecoderConfig(channels=32, multipliers=(1, 1), res_blocks=1, attention_levels=())
    unet = PatchedUNet(config, image_channels=3, latent_dim=8)
    for module in unet.modules():
        if isinstance(module, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Linear)):
            for parameter in module.parameters():
                torch.nn.init.zeros_(parameter)
    return unet


@torch.no_grad()
def test_the_last_layer_gives_a_patch_as_channels_of_rows_of_pixels():
    """As the public network takes it apart: (c, py, px), c slowest."""
    unet = _silent()
    unet.get_parameter("out.2.bias").copy_(torch.arange(48))
    image = unet(torch.randn(1, 3, 16, 16), torch.tensor([3]), torch.randn(1, 8, 2, 2))
    for y, x in ((0, 0), (8, 4)):  # of every patch
        assert image[0, 0, y, x : x + 4].tolist() == [0, 1, 2, 3]
        assert image[0, 0, y : y + 4, x].tolist() == [0, 4, 8, 12]
        assert image[0, :, y + 3, x + 3].tolist() == [15, 31, 47]


@torch.no_grad()
def test_the_first_layer_takes_a_patch_in_the_same_order_and_a_skips_channels_follow_those_from_below():
    """A pattern of 1 and -1 goes over the upper skip: from below and over the other skip come zeros in its place."""
    unet = _silent()
    pattern = torch.tensor([1.0, -1.0]).repeat(8).view(4, 4)
    noised = torch.zeros(1, 3, 16, 16)
    noised[0, 2, 1::4, 3::4] = pattern  # blue, second row, last column of every patch
    unet.get_parameter("input_blocks.0.0.weight")[0, 2 * 16 + 1 * 4 + 3, 1, 1] = 1
    unet.get_parameter("output_blocks.2.0.skip_connection.weight")[1, 32 + 0] = 1  # after 32 channels from below
    unet.get_parameter("output_blocks.3.0.skip_connection.weight")[2, 1] = 1
    unet.get_parameter("out.2.weight")[0, 2, 1, 1] = 1
    image = unet(noised, torch.tensor([3]), torch.randn(1, 8, 2, 2))
    expected = torch.zeros(1, 3, 16, 16)
    expected[0, 0, ::4, ::4] = torch.where(pattern > 0, 0.731059, -0.268941)  # SiLU of 1 and -1, their own norm
    assert torch.allclose(image, expected, atol=1e-4)
