"""ViTDet's parts beside the same written out: attention with a matrix of all pairs' terms, and stacks computed in half precision."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fourmill.pseudolabel.vitdet_parts import FusedAttention, HeadFacts, InPrecision, fuse_attention

HEADS, DIM = 3, 30  # ten channels a head: fused kernels take multiples of eight, as they do not come here


class Pairwise(nn.Module):
    """Named as detectron2's module; each pair's score is computed on its own."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.num_heads, self.scale = HEADS, (DIM // HEADS) ** -0.5
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.rel_pos_h, self.rel_pos_w = (nn.Parameter(torch.randn(2 * side - 1, DIM // HEADS)) for _ in range(2))

    def forward(self, x_BHWC: Tensor) -> Tensor:
        num, side, _, _ = x_BHWC.shape
        q, k, v = self.qkv(x_BHWC).view(num, side * side, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        row, column = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
        scores = self.scale * q @ k.transpose(2, 3)
        for place, by_distance in ((row, self.rel_pos_h), (column, self.rel_pos_w)):
            scores += torch.einsum("bnqd,qkd->bnqk", q, by_distance[place[:, None] - place[None, :] + side - 1])
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(x_BHWC.shape))


def anything() -> Any:
    return nn.Module()


@pytest.fixture(autouse=True)
def random() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("side", [1, 3, 8, 14])
@torch.inference_mode()
def test_fused_attention_is_that_of_all_pairs(side: int) -> None:
    plain = Pairwise(side)
    x = torch.randn(2, side, side, DIM)
    torch.testing.assert_close(FusedAttention(plain)(x), plain(x), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_in_half_precision_it_is_as_near_to_float32_as_the_matrix() -> None:
    plain, x = Pairwise(14), torch.randn(2, 14, 14, DIM)
    exact = plain(x)
    with torch.autocast("cpu", torch.bfloat16):
        off, off_of_matrix = ((module(x) - exact).norm() / exact.norm() for module in (FusedAttention(plain), plain))
    assert 0 < off < 1.5 * off_of_matrix


@torch.inference_mode()
def test_rows_and_columns_are_told_apart() -> None:
    """Positions of rows alone: turning the square over its diagonal must not turn the output."""
    plain, x = Pairwise(5), torch.randn(1, 5, 5, DIM)
    nn.init.zeros_(plain.rel_pos_w)
    fused = FusedAttention(plain)
    assert not torch.allclose(fused(x.transpose(1, 2)).transpose(1, 2), fused(x), atol=1e-2)


def test_weights_keep_their_names_and_are_not_copied() -> None:
    net, *blocks = (anything() for _ in range(3))
    net.blocks = blocks
    for block in net.blocks:
        block.attn = Pairwise(4)
    weights = [block.attn.qkv.weight for block in net.blocks]
    fuse_attention(net)
    assert [block.attn.qkv.weight for block in net.blocks] == weights
    names = {f"attn.{part}.{what}" for part in ("qkv", "proj") for what in ("weight", "bias")}
    assert set(net.blocks[0].state_dict()) == names


@torch.inference_mode()
def test_a_part_has_its_own_precision_whatever_surrounds_it() -> None:
    part, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(4, 64)
    exact = part(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(InPrecision(part, torch.float32)(x), exact)
    with torch.autocast("cpu", enabled=False):
        less = InPrecision(part, torch.bfloat16)(x)
    assert less.dtype == torch.float32
    assert 0 < (less - exact).norm() / exact.norm() < 0.01


@torch.inference_mode()
def test_what_is_too_large_for_a_precision_is_noted() -> None:
    """65504 is the largest number of float16; a part may compute with larger ones on its way, and give none."""
    facts, x = HeadFacts(), torch.ones(2, 4)
    large, small = nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False)
    nn.init.constant_(large.weight, 60000)
    nn.init.constant_(small.weight, 1e-5)
    parts = {dtype: InPrecision(nn.Sequential(large, small), dtype, facts) for dtype in (torch.float32, torch.float16)}
    with facts.noted() as noted:
        for part in parts.values():
            part(x)
    assert [float(share) for share, _ in noted] == [1.0, 0.0]
    parts[torch.float16](x)
    assert len(noted) == 2


def test_one_value_among_many_is_noted_and_no_values_are_fine() -> None:
    facts = HeadFacts()
    part = InPrecision(nn.Identity(), torch.float32, facts)
    many = torch.zeros(1 << 25, 1)
    many[7] = torch.nan
    with facts.noted() as noted:
        part(many)
        part(torch.zeros(0, 4))
    assert len(noted) == 1 and float(noted[0][0]) < 1


def test_calls_in_two_threads_note_what_is_theirs() -> None:
    facts, both = HeadFacts(), threading.Barrier(2)
    part = InPrecision(nn.Identity(), torch.float32, facts)

    def call(x: Tensor) -> list[float]:
        with facts.noted() as noted:
            both.wait(60)
            part(x)
            both.wait(60)
            return [float(share) for share, _ in noted]

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(call, [torch.tensor([[1.0, torch.inf]]), torch.tensor([[1.0, 2.0]])]))
    assert found == [[0.5], [1.0]]


@pytest.mark.parametrize("num", [7, 8])
def test_a_head_that_says_the_same_of_all_boxes_or_places_is_noted(num: int) -> None:
    facts = HeadFacts()
    head, conv = nn.Linear(4, 3), nn.Conv2d(4, 3, 1)
    dead = [nn.Linear(4, 3), nn.Conv2d(4, 3, 1)]
    for part in dead:
        nn.init.zeros_(part.weight)
    with facts.noted() as noted:
        for part, x in zip((head, conv, *dead), (torch.randn(num, 4), torch.randn(1, 4, 1, num)) * 2, strict=True):
            InPrecision(part, torch.float32, facts)(x)
    assert [float(is_one) for _, is_one in noted] == [0, 0, *[float(num >= 8)] * 2]
