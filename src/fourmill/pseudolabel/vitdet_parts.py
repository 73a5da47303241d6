"""Parts of ViTDet that stand in for detectron2's: the same function of the same weights, at less time and memory.

B images (or windows of images), N = H x W patches, D channels of one of the heads, K rows (or columns) of patches, rounded up.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fourmill.core.precision import fast_products
from fourmill.pseudolabel.watch import finite_share

_ALIGNED = 8  # channels: fused kernels in half precision take multiples of it
_SEVERAL = 8  # boxes or places of which a head that works does not say the same


class FusedAttention(nn.Module):
    """Attention over a square of patches, with a term for each pair's distance in rows, and one in columns (MViTv2, 4.1).

    detectron2 adds both terms to a matrix of all pairs, N x N for each head of each image: 4 GB for a batch of 8 images in
    half precision, read and written seven times. A pair's term depends on the query and on the key's row (column) alone, so it
    is a product itself: of the query's terms for all rows, and of the key's row as one of K. Appended to queries and keys they
    come out of the same product, and torch's fused attention, which keeps no matrix, does it all.
    """

    places_NK: Tensor
    rows_HKD: Tensor
    columns_WKD: Tensor

    def __init__(self, attention: Any) -> None:
        """From detectron2's module with its weights in place; its positions are for one size, which is that of all inputs."""
        super().__init__()
        self.qkv, self.proj = attention.qkv, attention.proj
        self.num_heads, self.scale = attention.num_heads, attention.scale
        side = (len(attention.rel_pos_h) + 1) // 2
        self.register_buffer("rows_HKD", _by_pair(attention.rel_pos_h), persistent=False)
        self.register_buffer("columns_WKD", _by_pair(attention.rel_pos_w), persistent=False)
        one_of = _padded(torch.eye(side, device=self.rows_HKD.device), 1)
        row_NK, column_NK = one_of.repeat_interleave(side, 0), one_of.repeat(side, 1)
        self.register_buffer("places_NK", torch.cat([row_NK, column_NK], 1), persistent=False)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """As detectron2's, (B, H, W, channels)."""
        num, height, width, channels = x_BHWC.shape
        qkv = self.qkv(x_BHWC).view(num, height * width, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q_BHND, k_BHND, v_BHND = qkv.unbind(0)
        by_place = q_BHND.unflatten(2, (height, width))
        row_terms = torch.einsum("bnhwd,hkd->bnhwk", by_place, self.rows_HKD.to(q_BHND.dtype)).flatten(2, 3)
        column_terms = torch.einsum("bnhwd,wkd->bnhwk", by_place, self.columns_WKD.to(q_BHND.dtype)).flatten(2, 3)
        places = self.places_NK.to(k_BHND.dtype).expand(*k_BHND.shape[:2], -1, -1)
        queries = torch.cat([q_BHND * self.scale, row_terms, column_terms], 3)
        keys = torch.cat([k_BHND, places], 3)
        # Values are filled up with zeros, since the fastest kernels want three sizes that are equal.
        values = F.pad(v_BHND, (0, places.shape[3]))
        seen = F.scaled_dot_product_attention(queries, keys, values, scale=1.0)[..., : v_BHND.shape[3]]
        return self.proj(seen.transpose(1, 2).reshape(num, height, width, channels))


def _by_pair(by_distance_XD: Tensor) -> Tensor:
    """Positions by distance, -(K-1) to K-1, as (query, key, channel); filled up with zeros."""
    side = (len(by_distance_XD) + 1) // 2
    at = torch.arange(side, device=by_distance_XD.device)
    return _padded(by_distance_XD.detach()[at[:, None] - at[None, :] + side - 1], 1)


def _padded(x: Tensor, dim: int) -> Tensor:
    missing = -x.shape[dim] % _ALIGNED
    return torch.cat([x, x.new_zeros(*x.shape[:dim], missing, *x.shape[dim + 1 :])], dim)


class HeadFacts:
    """What tells broken heads by their outputs, kept by the call that asked them: threads ask the same parts at a time."""

    def __init__(self) -> None:
        self._mine = threading.local()

    @contextmanager
    def noted(self) -> Iterator[list[Tensor]]:
        """Facts of each output that this thread gets of the parts in the block, (2,) float32, left on the device.

        Share of finite values; 1 where each channel is one number for all boxes or places, else 0.
        """
        facts: list[Tensor] = []
        self._mine.facts = facts
        try:
            yield facts
        finally:
            self._mine.facts = None

    def note(self, output: Tensor) -> None:
        """Keep the facts of an output (boxes, channels) or (B, channels, H, W) that has values, where somebody wants them."""
        facts: list[Tensor] | None = getattr(self._mine, "facts", None)
        if facts is None or not output.numel():
            return
        places_CN = output.movedim(1, 0).flatten(1)
        is_one = (places_CN.amin(1) == places_CN.amax(1)).all() & (places_CN.shape[1] >= _SEVERAL)
        facts.append(torch.stack([finite_share(output[None])[0], is_one.float()]))


class InPrecision(nn.Module):
    """A part that is computed in a precision of its own, whatever surrounds it; takes and gives float32."""

    def __init__(self, part: nn.Module, dtype: torch.dtype, facts: HeadFacts | None = None) -> None:
        """A part as it is.

        Args:
            facts: told of each output.
        """
        super().__init__()
        self.part, self._dtype, self._facts = part, dtype, facts

    def forward(self, x: Tensor) -> Tensor:
        """The part's output."""
        is_half = self._dtype != torch.float32
        with fast_products(is_half), torch.autocast(x.device.type, self._dtype, enabled=is_half):
            output = self.part(x).float()
        if self._facts is not None:
            self._facts.note(output)
        return output


def fuse_attention(net: Any) -> None:
    """Replace the attention of each block of detectron2's ViT, loaded and on its device, by `FusedAttention`."""
    for block in net.blocks:
        block.attn = FusedAttention(block.attn)


def heads_in(model: Any, dtype: torch.dtype) -> HeadFacts:
    """Compute the heads' stacks of convolutions, a seventh of the network's work, in a precision; scores and boxes in float32.

    Returns:
        Facts of the heads' last layers, where it shows when anything before is broken, and values are few.
    """
    rpn, boxes, facts = model.proposal_generator.rpn_head, model.roi_heads.box_head, HeadFacts()
    rpn.conv = InPrecision(rpn.conv, dtype)
    rpn.objectness_logits = InPrecision(rpn.objectness_logits, torch.float32, facts)
    rpn.anchor_deltas = InPrecision(rpn.anchor_deltas, torch.float32, facts)
    for stage, head in enumerate(boxes):
        boxes[stage] = InPrecision(head, dtype)
    for predictor in model.roi_heads.box_predictor:
        predictor.cls_score = InPrecision(predictor.cls_score, torch.float32, facts)
        predictor.bbox_pred = InPrecision(predictor.bbox_pred, torch.float32, facts)
    return facts
