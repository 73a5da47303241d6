"""Transformer blocks with the public parameter names: pre-norm, no biases, SwiGLU (4M, section 2.2 and Table 5).

B samples, N queries, C keys, D channels, H heads, d channels of a head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fourmill.train.config import ModelConfig


class Norm(nn.Module):
    """LayerNorm whose bias is a stored zero, not a parameter: public files hold it."""

    bias: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.register_buffer("bias", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-6)


class SelfAttention(nn.Module):
    """Queries, keys and values from one projection, in this order, each head by head."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x_BND: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = _heads(self.qkv(x_BND), 3, self.heads)
        return self.proj(attention(q, k, v, bias))


class CrossAttention(nn.Module):
    """Queries from the decoder, keys and values from the encoder's output."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x_BND: Tensor, context_BCD: Tensor, bias: Tensor | None) -> Tensor:
        (q,) = _heads(self.q(x_BND), 1, self.heads)
        k, v = _heads(self.kv(context_BCD), 2, self.heads)
        return self.proj(attention(q, k, v, bias))


class SwiGLU(nn.Module):
    """fc2(SiLU(fc1(x)) * fc3(x))."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)
        self.fc3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


class EncoderBlock(nn.Module):
    """Self-attention, then the MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = Norm(config.dim)
        self.attn = SelfAttention(config.dim, config.num_heads)
        self.norm2 = Norm(config.dim)
        self.mlp = SwiGLU(config.dim, config.hidden)

    def forward(self, x_BND: Tensor, bias: Tensor | None) -> Tensor:
        x_BND = x_BND + self.attn(self.norm1(x_BND), bias)
        return x_BND + self.mlp(self.norm2(x_BND))


class DecoderBlock(nn.Module):
    """Self-attention among targets, cross-attention to the encoder's output, then the MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = Norm(config.dim)
        self.self_attn = SelfAttention(config.dim, config.num_heads)
        self.query_norm = Norm(config.dim)
        self.context_norm = Norm(config.dim)
        self.cross_attn = CrossAttention(config.dim, config.num_heads)
        self.norm2 = Norm(config.dim)
        self.mlp = SwiGLU(config.dim, config.hidden)

    def forward(self, y_BND: Tensor, context_BCD: Tensor, self_bias: Tensor | None, bias: Tensor | None) -> Tensor:
        y_BND = y_BND + self.self_attn(self.norm1(y_BND), self_bias)
        y_BND = y_BND + self.cross_attn(self.query_norm(y_BND), self.context_norm(context_BCD), bias)
        return y_BND + self.mlp(self.norm2(y_BND))


def attention(q_BHNd: Tensor, k_BHCd: Tensor, v_BHCd: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax attention.

    Args:
        bias: added to the scores, broadcast to (B, H, N, C): 0 or the least finite value, so that a query that may see
            nothing averages over everything instead of being no number.

    Returns:
        (B, N, H * d).
    """
    if q_BHNd.is_cuda or q_BHNd.dtype == torch.float32:
        out = F.scaled_dot_product_attention(q_BHNd, k_BHCd, v_BHCd, None if bias is None else bias.to(q_BHNd.dtype))
    else:  # the fused kernel's backward pass in bf16 is four times slower on a CPU
        scores = (q_BHNd * q_BHNd.shape[-1] ** -0.5) @ k_BHCd.transpose(-1, -2)
        out = (scores if bias is None else scores + bias).softmax(-1) @ v_BHCd
    return out.transpose(1, 2).flatten(2)


def hidden_bias(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive form of a mask, True where a key is hidden."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, torch.finfo(dtype).min)


def start_trunk(module: nn.Module, keys_from_queries: float | None) -> None:
    """Xavier-uniform weights, each part of a fused projection by its own size, biases 0 (as public).

    Args:
        keys_from_queries: start keys as queries times this; None leaves them independent.
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            parts = {"qkv": 3, "kv": 2}.get(name.rsplit(".", 1)[-1], 1)
            out, into = part.weight.shape
            bound = (6 / (out / parts + into)) ** 0.5
            nn.init.uniform_(part.weight, -bound, bound)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    if keys_from_queries is None:
        return
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, SelfAttention):
                q, k, _ = part.qkv.weight.chunk(3)
                k.copy_(q * keys_from_queries)
            elif isinstance(part, CrossAttention):
                part.kv.weight.chunk(2)[0].copy_(part.q.weight * keys_from_queries)


def _heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
