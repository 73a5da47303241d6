"""The codebook: nearest codeword by cosine, moved by averages of what it stands for, restarted when nothing does.

4M, appendix B.3: 32-dimensional l2-normalised codes, EMA updates, stale codes replaced at random from the batch.
No gradient reaches the codebook. Everything here is float32, whatever autocast is on around it.

Buffers carry the public names: `_codebook.{initted,cluster_size,embed}`.
"""

# B batch, h w token grid, N = B*h*w latents, K codewords, D channels of a codeword

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fourmill.tokenize.config import QuantizerConfig

_CHUNK = 8192  # latents compared with the codebook at a time: bounds the similarity matrix
_KMEANS_ITERATIONS = 10


@dataclass(frozen=True)
class Quantized:
    """Latents after the codebook."""

    latent_BDhw: Tensor  # codewords; gradients pass straight through to the encoder
    tokens_Bhw: Tensor  # int64 codebook indices
    commitment: Tensor  # scalar: how far the encoder's latents are from their codewords


class _Codebook(nn.Module):
    """Codewords and how often each was used lately."""

    initted: Tensor
    cluster_size: Tensor
    embed: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        start_KD = torch.empty(size, dim)
        nn.init.kaiming_uniform_(start_KD)
        self.register_buffer("initted", torch.zeros(1))
        self.register_buffer("cluster_size", torch.zeros(size))
        self.register_buffer("embed", F.normalize(start_KD, dim=-1))


class Quantizer(nn.Module):
    """Vector quantisation with an l2-normalised codebook."""

    def __init__(self, config: QuantizerConfig, stale_threshold: float) -> None:
        """An untrained codebook.

        Args:
            stale_threshold: EMA count below which a codeword restarts; 0 never restarts.
        """
        super().__init__()
        self.config = config
        self.stale_threshold = stale_threshold
        self._codebook = _Codebook(config.codebook_size, config.latent_dim)

    @property
    def codewords_KD(self) -> Tensor:
        """The codebook as stored: averages of unit vectors, so at most of length 1."""
        return self._codebook.embed

    def forward(self, latent_BDhw: Tensor, generator: torch.Generator | None = None) -> Quantized:
        """Replace each latent by its codeword; in training mode also move the codebook, after the lookup.

        Args:
            generator: draws the restarts and the start; needed in training mode.
        """
        with torch.autocast(latent_BDhw.device.type, enabled=False):
            latent_BDhw = latent_BDhw.float()
            flat_ND = latent_BDhw.detach().permute(0, 2, 3, 1).flatten(0, 2)
            unit_ND = F.normalize(flat_ND, dim=-1)
            if self.training and not bool(self._codebook.initted):
                self._start(unit_ND, generator)
            tokens_N = self._nearest(unit_ND)
            tokens_Bhw = tokens_N.view(latent_BDhw.shape[0], *latent_BDhw.shape[2:])
            codes_BDhw = self.lookup(tokens_Bhw)
            # On the latent as it is, not its unit vector: this also keeps the encoder's scale bounded.
            commitment = F.mse_loss(latent_BDhw, codes_BDhw)
            if self.training:
                self._move(unit_ND, tokens_N, generator)
            straight_BDhw = latent_BDhw + (codes_BDhw - latent_BDhw).detach()
            return Quantized(straight_BDhw, tokens_Bhw, commitment)

    def lookup(self, tokens_Bhw: Tensor) -> Tensor:
        """Codewords (B, D, h, w) of tokens, as stored and not normalised again: the public models decode these."""
        return F.embedding(tokens_Bhw, self.codewords_KD).movedim(-1, 1)

    def _nearest(self, unit_ND: Tensor) -> Tensor:
        directions_DK = F.normalize(self.codewords_KD, dim=-1).T
        return torch.cat([(part @ directions_DK).argmax(-1) for part in unit_ND.split(_CHUNK)])

    @torch.no_grad()
    def _start(self, unit_ND: Tensor, generator: torch.Generator | None) -> None:
        book = self._codebook
        if self.config.kmeans_init:
            book.embed.copy_(_draw(unit_ND, len(book.embed), generator))
            for _ in range(_KMEANS_ITERATIONS):
                book.embed.copy_(_directions(unit_ND, self._nearest(unit_ND), book.embed))
            book.cluster_size.copy_(_counts(self._nearest(unit_ND), len(book.embed)))
        book.initted.fill_(1)

    @torch.no_grad()
    def _move(self, unit_ND: Tensor, tokens_N: Tensor, generator: torch.Generator | None) -> None:
        book, decay = self._codebook, self.config.ema_decay
        book.cluster_size.lerp_(_counts(tokens_N, len(book.embed)), 1 - decay)
        book.embed.lerp_(_directions(unit_ND, tokens_N, book.embed), 1 - decay)
        # The count of a restarted codeword stays low, so it restarts until the encoder really uses it.
        stale_K = book.cluster_size < self.stale_threshold
        fresh_KD = _draw(unit_ND, len(book.embed), generator)
        book.embed.copy_(torch.where(stale_K[:, None], fresh_KD, book.embed))


def _counts(tokens_N: Tensor, size: int) -> Tensor:
    return torch.bincount(tokens_N, minlength=size).float()


def _directions(unit_ND: Tensor, tokens_N: Tensor, embed_KD: Tensor) -> Tensor:
    """Unit vector of the mean of each codeword's latents; its own direction where it has none. (K, D)."""
    sums_KD = torch.zeros_like(embed_KD).index_add_(0, tokens_N, unit_ND)
    used_K = torch.zeros_like(embed_KD[:, 0], dtype=torch.bool).index_fill_(0, tokens_N, True)
    return F.normalize(torch.where(used_K[:, None], sums_KD, embed_KD), dim=-1)


def _draw(unit_ND: Tensor, num: int, generator: torch.Generator | None) -> Tensor:
    """`num` latents of the batch at random, without repeats where there are enough."""
    if len(unit_ND) >= num:
        picks = torch.randperm(len(unit_ND), generator=generator)[:num]
    else:
        picks = torch.randint(len(unit_ND), (num,), generator=generator)
    return unit_ND[picks.to(unit_ND.device)]
