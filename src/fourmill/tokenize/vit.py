"""ViT encoder and decoder of the image tokenizers, on timm's blocks; parameter names are those of the public weights.

No norm after the blocks: the last thing is a residual MLP with tanh, in float32 in the encoder, since bfloat16 there
would blur which codeword is nearest.
"""

# B batch, C channels, H W pixels, h w token grid, D channels of a token, N = h*w

from functools import partial

import torch
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from fourmill.tokenize.config import EncoderConfig, VitDecoderConfig
from fourmill.tokenize.positions import fit_positions, stored_positions

_norm = partial(nn.LayerNorm, eps=1e-6)


class VitEncoder(nn.Module):
    """Patches to features: `encoder.*` of a tokenizer's weights."""

    def __init__(self, config: EncoderConfig, in_channels: int, patch_px: int, grid: int) -> None:
        """A new encoder.

        Args:
            patch_px: side of a patch in the input's pixels; 1 for feature maps.
            grid: tokens along a side that positions are stored for.
        """
        super().__init__()
        self.pos_emb = nn.Parameter(stored_positions(config.width, grid), requires_grad=False)
        self.proj = nn.Conv2d(in_channels, config.width, patch_px, patch_px)
        self.blocks = nn.ModuleList(_block(config.width, config.heads) for _ in range(config.depth))
        self.norm_mlp = _norm(config.width)
        self.post_mlp = Mlp(config.width, 4 * config.width, act_layer=nn.Tanh)

    def forward(self, x_BCHW: Tensor, last_kind: torch.dtype = torch.float32) -> Tensor:
        """Features (B, D, h, w) float32 of an input of any size that is a multiple of the patch.

        Args:
            last_kind: what the last layer multiplies in, whatever autocast is on; its sums are float32.
        """
        x_BDhw = self.proj(x_BCHW)
        x_BDhw = x_BDhw + fit_positions(self.pos_emb, *x_BDhw.shape[2:])
        x_BND = _by_token(x_BDhw)
        for block in self.blocks:
            x_BND = block(x_BND)
        x_BND = _last_layer(x_BND, self.norm_mlp, self.post_mlp, last_kind)
        return x_BND.transpose(1, 2).unflatten(2, x_BDhw.shape[2:])


class PatchEncoder(nn.Module):
    """A ViT without attention and positions: each token tells of its own patch only. A demo option."""

    def __init__(self, config: EncoderConfig, in_channels: int, patch_px: int) -> None:
        """A new encoder; see `VitEncoder`."""
        super().__init__()
        self.proj = nn.Conv2d(in_channels, config.width, patch_px, patch_px)
        self.blocks = nn.ModuleList(_MlpBlock(config.width) for _ in range(config.depth))
        self.norm_mlp = _norm(config.width)
        self.post_mlp = Mlp(config.width, 4 * config.width, act_layer=nn.Tanh)

    def forward(self, x_BCHW: Tensor, last_kind: torch.dtype = torch.float32) -> Tensor:
        """Features (B, D, h, w) float32; see `VitEncoder`."""
        x_BDhw = self.proj(x_BCHW)
        x_BND = _by_token(x_BDhw)
        for block in self.blocks:
            x_BND = block(x_BND)
        x_BND = _last_layer(x_BND, self.norm_mlp, self.post_mlp, last_kind)
        return x_BND.transpose(1, 2).unflatten(2, x_BDhw.shape[2:])


class VitDecoder(nn.Module):
    """Codewords to values per pixel or per token: `decoder.*` of the plain tokenizers' weights."""

    def __init__(self, config: VitDecoderConfig, out_channels: int, patch_px: int, grid: int) -> None:
        """A new decoder; see `VitEncoder`."""
        super().__init__()
        self.out_channels = out_channels
        self.patch_px = patch_px
        self.pos_emb = nn.Parameter(stored_positions(config.width, grid), requires_grad=False)
        self.blocks = nn.ModuleList(_block(config.width, config.heads) for _ in range(config.depth))
        self.norm_mlp = _norm(config.width)
        self.post_mlp = Mlp(config.width, 4 * config.width, act_layer=nn.Tanh)
        self.out_proj = nn.Linear(config.width, out_channels * patch_px**2)

    def features(self, x_BDhw: Tensor) -> Tensor:
        """What the output layer reads: (B, N, D)."""
        x_BDhw = x_BDhw + fit_positions(self.pos_emb, *x_BDhw.shape[2:])
        x_BND = _by_token(x_BDhw)
        for block in self.blocks:
            x_BND = block(x_BND)
        return x_BND + self.post_mlp(self.norm_mlp(x_BND))

    def pixel_values(self, features_BND: Tensor) -> Tensor:
        """Values of some tokens' pixels, channels last: (B, N, patch pixels in raster order, C)."""
        channels, pixels = self.out_channels, self.patch_px**2
        # The weights' rows are ordered channel, row, column; turning them is cheaper than turning their products.
        weight = self.out_proj.weight.unflatten(0, (channels, pixels)).transpose(0, 1).flatten(0, 1)
        bias = self.out_proj.bias.unflatten(0, (channels, pixels)).T.flatten()
        return F.linear(features_BND, weight, bias).unflatten(2, (pixels, channels))

    def forward(self, x_BDhw: Tensor) -> Tensor:
        """Values (B, C, H, W)."""
        height, width = x_BDhw.shape[2:]
        values = self.pixel_values(self.features(x_BDhw)).unflatten(2, (self.patch_px, self.patch_px))
        return values.unflatten(1, (height, width)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class _MlpBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm2 = _norm(width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x_BND: Tensor) -> Tensor:
        return x_BND + self.mlp(self.norm2(x_BND))


def _block(width: int, heads: int) -> Block:
    return Block(width, heads, mlp_ratio=4, qkv_bias=True, norm_layer=_norm)  # type: ignore[arg-type]


def _last_layer(x_BND: Tensor, norm: nn.Module, mlp: nn.Module, kind: torch.dtype) -> Tensor:
    x_BND = x_BND.float()
    with torch.autocast(x_BND.device.type, kind, enabled=kind != torch.float32):
        return x_BND + mlp(norm(x_BND))


def _by_token(x_BDhw: Tensor) -> Tensor:
    """(B, N, D) with a token's channels side by side; else every sum of all blocks would be laid out channels first."""
    return x_BDhw.flatten(2).transpose(1, 2).contiguous()


def choose_attention(model: nn.Module, device: torch.device) -> None:
    """Use the fused attention kernel except on CPUs, where its bfloat16 backward pass is several times slower."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = device.type != "cpu"  # type: ignore[assignment]
