"""The U-Net's norms and enlarging spelled out for a compiler: the kernels' numbers, and channels where they were."""

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
