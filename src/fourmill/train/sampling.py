"""How many tokens a decoding step fixes, and how one token is drawn from its scores (public schedules and filters).

T tokens, V ids.
"""

import math
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Schedule = Literal["cosine", "linear"]


def step_sizes(num_tokens: int, steps: int, schedule: Schedule) -> list[int]:
    """Tokens that each decoding step fixes; they add up to `num_tokens`.

    Cosine: few at first and last, rounded edges of (1 - cos) / 2; 8 steps of 784 tokens are 30, 85, 127, 150, 150,
    127, 85, 30; steps may be 0. Linear: equal parts, the larger first; never 0, so more steps than tokens are fewer steps.

    Raises:
        ValueError: no token or no step.
    """
    if num_tokens < 1 or steps < 1:
        raise ValueError(f"{steps} steps for {num_tokens} tokens: both must be at least 1")
    if schedule == "linear":
        edges = np.linspace(0, num_tokens, steps + 1).astype(int)
        return [n for n in sorted(np.diff(edges).tolist(), reverse=True) if n]
    edges = [round(0.5 * (1 - math.cos(math.pi * i / steps)) * num_tokens) for i in range(steps + 1)]
    return [end - begin for begin, end in pairwise(edges)]


def filter_scores(scores_TV: Tensor, top_k: int | float = 0, top_p: float = 0.0) -> Tensor:
    """Scores with the unlikely ids at minus infinity; the likeliest id always stays.

    Args:
        top_k: keep this many ids, or this share of them when below 1; 0 keeps all.
        top_p: keep the likeliest ids until their probabilities reach this; 0 keeps all.
    """
    vocab = scores_TV.shape[-1]
    if top_k:
        keep = max(1, min(vocab, int(top_k * vocab) if isinstance(top_k, float) and top_k < 1 else int(top_k)))
        scores_TV = scores_TV.masked_fill(scores_TV < scores_TV.topk(keep).values[:, -1:], -math.inf)
    if top_p:
        ordered, ids = scores_TV.sort(descending=True, stable=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, ids, before >= top_p)
        scores_TV = scores_TV.masked_fill(dropped, -math.inf)
    return scores_TV


def draw_tokens(
    scores_TV: Tensor, uniform_T: NDArray[np.float64], temperature: float, top_k: int | float = 0, top_p: float = 0.0
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Draw a token from each row of scores.

    Args:
        uniform_T: a number in [0, 1) for each, which decides the draw; not looked at with temperature 0.
        temperature: 0 takes the likeliest id.

    Returns:
        Ids, and the probability of each. With temperature 0 that is its probability at temperature 1, so that the surest can be
        told (public: all 1).
    """
    scores_TV = scores_TV.float()
    if temperature < 1e-6:
        probability, ids = scores_TV.softmax(-1).max(-1)
        return ids.cpu().numpy(), probability.cpu().double().numpy()
    odds_TV = (filter_scores(scores_TV, top_k, top_p) / temperature).softmax(-1).double()
    edges_TV = odds_TV.cumsum(-1)
    at = torch.from_numpy(uniform_T).to(edges_TV.device)[:, None] * edges_TV[:, -1:]
    ids_T1 = torch.searchsorted(edges_TV, at, right=True).clamp_(max=odds_TV.shape[-1] - 1)
    return ids_T1[:, 0].cpu().numpy(), odds_TV.gather(1, ids_T1)[:, 0].cpu().numpy()
