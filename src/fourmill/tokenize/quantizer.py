"""The codebook: nearest codeword by cosine, moved by averages of what it stands for, restarted when nothing does.

4M, appendix B.3: 32-dimensional l2-normalised codes, EMA updates, stale codes replaced at random from the batch.
No gradient reaches the codebook. Everything here is float32, whatever autocast is on around it.

Buffers carry the public names: `_codebook.{initted,cluster_size,embed}`.
"""

# B batch (this process's rows of it), h w token grid, n = h*w, N = B*n latents, K codewords, D channels of a codeword

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fourmill.core.precision import exact_products
from fourmill.core.ranks import ALONE, Ranks
from fourmill.tokenize.config import QuantizerConfig

# Similarities of latents and codewords held at a time: 8 MB stay in a CPU's caches, which halves the time; 512 MB on a GPU.
_MOST_SIMILARITIES = {"cpu": 2**21, "cuda": 2**27}
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
        self._knows_started = False  # so that the device is not asked at every step

    @property
    def codewords_KD(self) -> Tensor:
        """The codebook as stored: averages of unit vectors, so at most of length 1."""
        return self._codebook.embed

    def forward(self, latent_BDhw: Tensor, generator: torch.Generator | None = None, ranks: Ranks = ALONE) -> Quantized:
        """Replace each latent by its codeword; in training mode also move the codebook, after the lookup.

        Args:
            generator: draws the restarts and the start; needed in training mode, and equal on all processes.
            ranks: the processes that share the batch; all move their codebooks alike, by the latents of all.
        """
        with torch.autocast(latent_BDhw.device.type, enabled=False):
            latent_BDhw = latent_BDhw.float()
            unit_BnD = F.normalize(latent_BDhw.detach().flatten(2).transpose(1, 2), dim=-1)
            if self.training and not self._is_started():
                self._start(unit_BnD, generator, ranks)
            tokens_N = self._nearest(unit_BnD.flatten(0, 1))
            tokens_Bhw = tokens_N.view(latent_BDhw.shape[0], *latent_BDhw.shape[2:])
            codes_BDhw = self.lookup(tokens_Bhw)
            # On the latent as it is, not its unit vector: this also keeps the encoder's scale bounded.
            commitment = F.mse_loss(latent_BDhw, codes_BDhw)
            if self.training:
                self._move(unit_BnD, tokens_N, generator, ranks)
            straight_BDhw = latent_BDhw + (codes_BDhw - latent_BDhw).detach()
            return Quantized(straight_BDhw, tokens_Bhw, commitment)

    def keep(self) -> list[Tensor]:
        """A copy of the codebook, for `put_back`: a forward pass in training mode moves it before anybody knows the loss."""
        return [buffer.clone() for buffer in self._codebook.buffers()]

    @torch.no_grad()
    def put_back(self, kept: list[Tensor]) -> None:
        """Undo what moved the codebook since `keep`."""
        for buffer, value in zip(self._codebook.buffers(), kept, strict=True):
            buffer.copy_(value)
        self._knows_started = False

    def nearest(self, latent_BDhw: Tensor) -> Tensor:
        """Tokens (B, h, w) int64 of latents in float32; what `forward` finds, without the codewords."""
        unit_ND = F.normalize(latent_BDhw.permute(0, 2, 3, 1).flatten(0, 2), dim=-1)
        return self._nearest(unit_ND).view(latent_BDhw.shape[0], *latent_BDhw.shape[2:])

    def lookup(self, tokens_Bhw: Tensor) -> Tensor:
        """Codewords (B, D, h, w) of tokens, as stored and not normalised again: the public models decode these."""
        return F.embedding(tokens_Bhw, self.codewords_KD).movedim(-1, 1)

    def _nearest(self, unit_ND: Tensor) -> Tensor:
        directions_DK = F.normalize(self.codewords_KD, dim=-1).T
        chunk = max(1, _MOST_SIMILARITIES.get(unit_ND.device.type, 2**27) // len(self.codewords_KD))
        with exact_products():
            return torch.cat([(part @ directions_DK).argmax(-1) for part in unit_ND.split(chunk)])

    def _is_started(self) -> bool:
        self._knows_started = self._knows_started or bool(self._codebook.initted)
        return self._knows_started

    @torch.no_grad()
    def _start(self, unit_BnD: Tensor, generator: torch.Generator | None, ranks: Ranks) -> None:
        book = self._codebook
        if self.config.kmeans_init:  # once, so by every process on the whole batch
            all_BnD = ranks.gather(unit_BnD)
            all_ND = all_BnD.flatten(0, 1)
            book.embed.copy_(_draw(all_BnD, len(book.embed), generator, ALONE))
            for _ in range(_KMEANS_ITERATIONS):
                book.embed.copy_(self._averages(all_ND, self._nearest(all_ND), ALONE)[1])
            book.cluster_size.copy_(self._averages(all_ND, self._nearest(all_ND), ALONE)[0])
            # A GPU adds up in any order, and latents between two codewords then fall to either.
            ranks.from_first(book.embed)
            ranks.from_first(book.cluster_size)
        book.initted.fill_(1)

    @torch.no_grad()
    def _move(self, unit_BnD: Tensor, tokens_N: Tensor, generator: torch.Generator | None, ranks: Ranks) -> None:
        book, decay = self._codebook, self.config.ema_decay
        counts_K, directions_KD = self._averages(unit_BnD.flatten(0, 1), tokens_N, ranks)
        book.cluster_size.lerp_(counts_K, 1 - decay)
        book.embed.lerp_(directions_KD, 1 - decay)
        # The count of a restarted codeword stays low, so it restarts until the encoder really uses it.
        stale_K = book.cluster_size < self.stale_threshold
        fresh_KD = _draw(unit_BnD, len(book.embed), generator, ranks)
        book.embed.copy_(torch.where(stale_K[:, None], fresh_KD, book.embed))

    def _averages(self, unit_ND: Tensor, tokens_N: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """How many latents of all processes each codeword stands for (K,), and the unit vector of their mean (K, D): its own
        direction where it stands for none.
        """
        embed_KD = self.codewords_KD
        # Not by bincount, which asks a GPU for the least and the greatest first, and waits for them. Whole numbers add up exactly.
        ones_N = torch.ones(len(tokens_N), device=tokens_N.device)
        counts_K = ranks.sum(embed_KD.new_zeros(len(embed_KD)).index_add_(0, tokens_N, ones_N))
        sums_KD = ranks.sum(torch.zeros_like(embed_KD).index_add_(0, tokens_N, unit_ND))
        return counts_K, F.normalize(torch.where(counts_K[:, None] > 0, sums_KD, embed_KD), dim=-1)


def _draw(unit_BnD: Tensor, num: int, generator: torch.Generator | None, ranks: Ranks) -> Tensor:
    """`num` latents of the whole batch at random, without repeats where there are enough."""
    total = unit_BnD.shape[0] * unit_BnD.shape[1] * ranks.size
    if total >= num:
        picks = torch.randperm(total, generator=generator)[:num]
    else:
        picks = torch.randint(total, (num,), generator=generator)
    if unit_BnD.is_cuda:  # else the host would wait here for the encoder
        picks = picks.pin_memory()
    return ranks.take(unit_BnD, picks.to(unit_BnD.device, non_blocking=True))
