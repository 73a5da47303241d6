"""The patched U-Net of the diffusion decoders: denoises an image that is conditioned on codewords.

Small patches of the noised image are its pixels; codewords are upsampled to that grid and concatenated (appendix B.3).
Parameter names are those of the public weights: `input_blocks`, `middle_block`, `output_blocks`, `time_embed`, `out`.
"""

# B batch, C image channels, H W pixels, D channels of a codeword, h w token grid, c channels of a level, N pixels of it

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fourmill.tokenize.config import DiffusionDecoderConfig

_GROUPS = 32
_TIME_CHANNELS = 256

_Layer = TypeVar("_Layer", bound=nn.Module)


class PatchedUNet(nn.Module):
    """Predicts the clean image from a noised one, its step and its codewords."""

    def __init__(self, config: DiffusionDecoderConfig, image_channels: int, latent_dim: int) -> None:
        """A new network; its last layer is zero."""
        super().__init__()
        self.patch_px = config.patch_px
        self.layout = torch.contiguous_format
        patch_channels = image_channels * config.patch_px**2
        first, time_dim = config.channels, 4 * config.channels
        self.time_channels = min(_TIME_CHANNELS, first)
        self.time_embed = nn.Sequential(
            nn.Linear(self.time_channels, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim)
        )

        widths = [first * m for m in config.multipliers]
        self.input_blocks = nn.ModuleList([_Stage(nn.Conv2d(patch_channels + latent_dim, first, 3, padding=1))])
        skips, width = [first], first
        for level, out in enumerate(widths):
            for _ in range(config.res_blocks):
                self.input_blocks.append(_Stage(*_residual(width, out, time_dim, level in config.attention_levels)))
                skips.append(width := out)
            if level + 1 < len(widths):
                self.input_blocks.append(_Stage(_Down(width)))
                skips.append(width)
        self.middle_block = _Stage(
            _Residual(width, width, time_dim), _Attention(width), _Residual(width, width, time_dim)
        )
        self.output_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            for i in range(config.res_blocks + 1):
                layers = _residual(width + skips.pop(), out, time_dim, level in config.attention_levels)
                width = out
                if level and i == config.res_blocks:
                    layers.append(_Up(width))
                self.output_blocks.append(_Stage(*layers))
        self.out = nn.Sequential(_norm(width), nn.SiLU(), _zero(nn.Conv2d(width, patch_channels, 3, padding=1)))

    def choose_layout(self, device: torch.device, half_precision: bool) -> None:
        """Channels last, where convolutions are a quarter faster, but not in half precision on CPUs: group norm is ten times
        slower there.
        """
        plain = device.type == "cpu" and half_precision
        self.layout = torch.contiguous_format if plain else torch.channels_last
        self.to(memory_format=self.layout)

    def suit_compiler(self) -> None:
        """Spell norms out, for a compiler to fuse with what is around them."""
        for module in self.modules():
            if isinstance(module, _Norm):
                module.is_spelled_out = True

    def forward(self, noised_BCHW: Tensor, step_B: Tensor, latent_BDhw: Tensor) -> Tensor:
        """The clean image (B, C, H, W) as far as the network can tell.

        Args:
            step_B: steps of the noise schedule, 0 (clean) .. T-1 (noise).
            latent_BDhw: codewords on the token grid.
        """
        patches = F.pixel_unshuffle(noised_BCHW, self.patch_px)
        latent = _enlarged(latent_BDhw, patches.shape[2] // latent_BDhw.shape[2])
        x = torch.cat([patches, latent.to(patches.dtype)], 1).contiguous(memory_format=self.layout)
        time = self.time_embed(time_features(step_B, self.time_channels))
        skips: list[Tensor] = []
        for stage in self.input_blocks:
            x = stage(x, time)
            skips.append(x)
        x = self.middle_block(x, time)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skips.pop()], 1), time)
        return F.pixel_shuffle(self.out(x), self.patch_px)


def time_features(step_B: Tensor, dim: int) -> Tensor:
    """Cosines, then sines, of the step at dim/2 frequencies from 1 down to 1/10,000: (B, dim) float32."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=step_B.device, dtype=torch.float32) / half)
    angles = step_B.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


class _Stage(nn.Sequential):
    """Layers of which some take the time embedding."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, time) if isinstance(layer, _Residual) else layer(x)
        return x


class _Residual(nn.Module):
    """Two convolutions around a skip; the time embedding is added between them."""

    def __init__(self, width: int, out: int, time_dim: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(_norm(width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, out))
        # The identity stands where the public network has its (zero) dropout, so that names match.
        last = _zero(nn.Conv2d(out, out, 3, padding=1))
        self.out_layers = nn.Sequential(_norm(out), nn.SiLU(), nn.Identity(), last)
        self.skip_connection = nn.Identity() if width == out else nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        inner = self.in_layers(x) + self.emb_layers(time)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(inner)


class _Attention(nn.Module):
    """Self-attention with one head over the pixels of a level."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = _zero(nn.Conv1d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        # Channels side by side: else a compiler lays out what is around channels first, and convolutions turn it round again.
        x_BNc, normed_BNc = (one.flatten(2).transpose(1, 2) for one in (x, self.norm(x)))
        q, k, v = _of_places(self.qkv, normed_BNc).chunk(3, 2)
        scale = q.shape[2] ** -0.25  # on both sides, so that half precision does not overflow
        weights_BNN = ((q * scale) @ (k * scale).transpose(1, 2)).float().softmax(-1).to(v.dtype)
        seen_BNc = x_BNc + _of_places(self.proj_out, weights_BNN @ v)
        return seen_BNc.transpose(1, 2).unflatten(2, x.shape[2:])


def _of_places(layer: nn.Conv1d, x_BNc: Tensor) -> Tensor:
    """A convolution of width 1; to a compiler the matrix product that it is, on channels that lie side by side."""
    if not torch.compiler.is_compiling():
        return layer(x_BNc.transpose(1, 2)).transpose(1, 2)
    return F.linear(x_BNc, layer.weight[..., 0], layer.bias)


class _Down(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class _Up(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(_enlarged(x, 2))


def _enlarged(x_BCHW: Tensor, times: int) -> Tensor:
    """Every pixel as a square of so many: nearest interpolation.

    A compiler makes of its way back additions to places that it has to look up, one by one, channels first; of copies' a sum.
    """
    if not torch.compiler.is_compiling():
        return F.interpolate(x_BCHW, scale_factor=times, mode="nearest")
    return copied(x_BCHW, times)


def copied(x_BCHW: Tensor, times: int) -> Tensor:
    """`_enlarged` by copies, channels last."""
    x_BHWC = x_BCHW.movedim(1, -1)
    num, height, width, channels = x_BHWC.shape
    many = x_BHWC[:, :, None, :, None].expand(-1, -1, times, -1, times, -1)
    return many.reshape(num, height * times, width * times, channels).movedim(-1, 1)


def _residual(width: int, out: int, time_dim: int, attend: bool) -> list[nn.Module]:
    layers: list[nn.Module] = [_Residual(width, out, time_dim)]
    return [*layers, _Attention(out)] if attend else layers


class _Norm(nn.GroupNorm):
    """Group norm in float32, by the kernel or spelled out: the same numbers but for rounding.

    A compiler takes the kernel apart with gradients laid out channels first, which convolutions then turn round again, one by
    one: 8 of 75 ms of a step on an H100. Spelled out, all sums are over the pixels of a channel, side by side with the others.
    """

    is_spelled_out = False

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (its name in torch)
        return self._spelled_out(input) if self.is_spelled_out else super().forward(input)

    def _spelled_out(self, x: Tensor) -> Tensor:
        x_BNc = x.movedim(1, -1).flatten(1, -2).float()
        variance_Bc, mean_Bc = torch.var_mean(x_BNc, 1, correction=0)
        variance_BGc, mean_BGc = (one.unflatten(1, (self.num_groups, -1)) for one in (variance_Bc, mean_Bc))
        mean_BG1 = mean_BGc.mean(2, keepdim=True)
        variance_BG1 = (variance_BGc + (mean_BGc - mean_BG1) ** 2).mean(2, keepdim=True)
        scale_BGc = (variance_BG1 + self.eps).rsqrt() * self.weight.view(self.num_groups, -1)
        shift_BGc = self.bias.view(self.num_groups, -1) - mean_BG1 * scale_BGc
        scaled_BNc = x_BNc * scale_BGc.flatten(1)[:, None] + shift_BGc.flatten(1)[:, None]
        return scaled_BNc.unflatten(1, x.shape[2:]).movedim(-1, 1)


def _norm(width: int) -> _Norm:
    return _Norm(math.gcd(_GROUPS, width), width)


def _zero(layer: _Layer) -> _Layer:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
