"""4M: one encoder-decoder over tokens of every modality, with the public state-dict names (4M, section 2.2).

The model takes compact batches (`train.batch`): only the tokens that budgets chose. B samples, N inputs, M targets,
D channels, V ids of a modality, K numbers of a pixel patch, P patches.
"""

import math
from collections.abc import Collection, Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fourmill.core.imagenet import IMAGENET_MEAN, IMAGENET_STD
from fourmill.core.modality import Modality
from fourmill.core.positions import grid_positions, text_positions
from fourmill.train.batch import Batch, Inputs, Targets
from fourmill.train.blocks import DecoderBlock, EncoderBlock, Norm, hidden_bias, start_trunk
from fourmill.train.config import ModelConfig


class Embedding(nn.Module):
    """One modality on one side: tokens or patches to channels, a modality vector, positions; a head on the decoder's."""

    pos_emb: Tensor

    def __init__(
        self, modality: Modality, config: ModelConfig, patch_px: int, mod_emb: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        dim = config.dim
        if modality.vocab_size is None:
            self.proj = nn.Linear(patch_px * patch_px * 3, dim, bias=False)
        else:
            self.token_emb = nn.Embedding(modality.vocab_size, dim)
        self.mod_emb = nn.Parameter(torch.zeros(1, 1, dim)) if mod_emb is None else mod_emb
        positions = (
            text_positions(dim)
            if modality.kind == "text"
            else grid_positions(
                dim, modality.grid, config.position_temperature, config.centre_positions, config.position_grid
            )
        )
        self.register_buffer("pos_emb", positions)
        if mod_emb is not None:  # the decoder's side; its head shares the table
            self.to_logits = nn.Linear(dim, self.token_emb.num_embeddings, bias=False)
            self.to_logits.weight = self.token_emb.weight

    def place(self, position: Tensor) -> Tensor:
        """Position and modality of tokens, (T,) to (T, D)."""
        return self.pos_emb[0, position] + self.mod_emb[0, 0]


class FourM(nn.Module):
    """4M. Build it from a config and modalities; `train.load` reads a trained one.

    Args:
        config: sizes.
        modalities: of the manifest, in any order; pixels are input only.
        patch_px: side of a pixel patch.
        predicted: names of those that it predicts; all but pixels by default.
    """

    def __init__(
        self,
        config: ModelConfig,
        modalities: Iterable[Modality],
        patch_px: int,
        predicted: Collection[str] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.patch_px = config, patch_px
        self.modalities = tuple(sorted(modalities, key=lambda m: m.name))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.encoder_embeddings = nn.ModuleDict({m.name: Embedding(m, config, patch_px) for m in self.modalities})
        self.decoder_embeddings = nn.ModuleDict(
            {
                m.name: Embedding(m, config, patch_px, self._side("encoder", m.name).mod_emb)
                for m in self.modalities
                if m.kind != "pixels" and (predicted is None or m.name in predicted)
            }
        )
        self.encoder = nn.ModuleList(EncoderBlock(config) for _ in range(config.encoder_depth))
        self.encoder_norm = Norm(config.dim)
        self.decoder_proj_context = nn.Linear(config.dim, config.dim)
        self.decoder = nn.ModuleList(DecoderBlock(config) for _ in range(config.decoder_depth))
        self.decoder_norm = Norm(config.dim)
        self._start()

    @property
    def by_name(self) -> dict[str, Modality]:
        """Modalities by name."""
        return {m.name: m for m in self.modalities}

    def index(self, name: str) -> int:
        """The number of a modality in batches. Raises ValueError."""
        return [m.name for m in self.modalities].index(name)

    def encode(self, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        """Visible tokens to what the decoder looks at.

        Returns:
            (B, N, D), and the additive mask of padding (B, 1, 1, N), None where there is none.
        """
        device = self.mask_token.device
        modality_BN = _long(inputs.modality_BN, device)
        tokens, places = self._embed_inputs(inputs, modality_BN)
        padding_BN = modality_BN < 0
        bias = hidden_bias(padding_BN[:, None, None], self._score_type) if (inputs.modality_BN < 0).any() else None
        x_BND = tokens + places
        for block in self.encoder:
            x_BND = block(x_BND, bias)
        return self.decoder_proj_context(self.encoder_norm(x_BND)) + places, bias

    def decode(self, targets: Targets, context_BND: Tensor, context_bias: Tensor | None, full: bool = False) -> Tensor:
        """Targets to channels that heads read, (B, M, D).

        Args:
            full: targets of one image modality: all of them see each other, no mask is needed.
        """
        device = self.mask_token.device
        modality_BM = _long(targets.modality_BM, device)
        y_BMD = self._embed_targets(targets, modality_BM)
        self_bias = None
        if not full:
            hidden_BMM = hidden_from(_long(targets.visible_BM, device), modality_BM)
            self_bias = hidden_bias(hidden_BMM[:, None], self._score_type)
        for block in self.decoder:
            y_BMD = block(y_BMD, context_BND, self_bias, context_bias)
        return self.decoder_norm(y_BMD)

    def logits(self, y_TD: Tensor, name: str) -> Tensor:
        """Scores of every id of a modality, (T, D) to (T, V)."""
        return self._side("decoder", name).to_logits(y_TD)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Mean cross-entropy in nats of each modality that has a target in the batch (public loss type `mod`)."""
        y_BMD = self.decode(batch.targets, *self.encode(batch.inputs))
        y_TD = y_BMD.flatten(0, 1)
        found = {}
        for i, where in _by_modality(batch.targets.modality_BM, len(self.modalities)).items():
            wanted = _long(batch.targets.id_BM.reshape(-1)[where], y_TD.device)
            name = self.modalities[i].name
            logits_TV = self.logits(y_TD.index_select(0, _long(where, y_TD.device)), name)
            found[name] = F.cross_entropy(logits_TV.float(), wanted)
        return found

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of the modalities' losses over all that can be predicted; one without a target in the batch counts as 0."""
        found = self.losses(batch)
        return torch.stack(list(found.values())).sum() / len(self.decoder_embeddings), found

    @property
    def _score_type(self) -> torch.dtype:
        device = self.mask_token.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.mask_token.dtype

    def _side(self, side: str, name: str) -> Embedding:
        part = getattr(self, f"{side}_embeddings")[name]
        assert isinstance(part, Embedding)
        return part

    def _embed_inputs(self, inputs: Inputs, modality_BN: Tensor) -> tuple[Tensor, Tensor]:
        device = modality_BN.device
        tokens, places, order = [], [], []
        for i, where in _by_modality(inputs.modality_BN, len(self.modalities)).items():
            part = self._side("encoder", self.modalities[i].name)
            if self.modalities[i].kind == "pixels":
                tokens.append(part.proj(normalise_patches(torch.from_numpy(inputs.patches_PK).to(device))).float())
            else:
                tokens.append(part.token_emb(_long(inputs.id_BN.reshape(-1)[where], device)))
            places.append(part.place(_long(inputs.position_BN.reshape(-1)[where], device)))
            order.append(where)
        shape = (*inputs.modality_BN.shape, self.config.dim)
        return self._scatter(tokens, order, shape), self._scatter(places, order, shape)

    def _embed_targets(self, targets: Targets, modality_BM: Tensor) -> Tensor:
        device = modality_BM.device
        parts, order = [], []
        for i, where in _by_modality(targets.modality_BM, len(self.modalities)).items():
            part = self._side("decoder", self.modalities[i].name)
            place = part.place(_long(targets.position_BM.reshape(-1)[where], device))
            is_text = self.modalities[i].kind == "text"
            given = (
                part.token_emb(_long(targets.given_BM.reshape(-1)[where], device)) if is_text else self.mask_token[0]
            )
            parts.append(place + given)
            order.append(where)
        return self._scatter(parts, order, (*targets.modality_BM.shape, self.config.dim))

    def _scatter(self, parts: list[Tensor], order: list[NDArray[np.int64]], shape: tuple[int, ...]) -> Tensor:
        """Rows of all modalities back in batch order, zeros on padding."""
        source = np.full(math.prod(shape[:-1]), sum(map(len, order)), np.int64)
        source[np.concatenate(order)] = np.arange(sum(map(len, order)))
        table = torch.cat([*parts, parts[0].new_zeros(1, shape[-1])])
        return table.index_select(0, _long(source, table.device)).view(shape)

    def _start(self) -> None:
        for side in (self.encoder_embeddings, self.decoder_embeddings):
            for part in side.values():
                assert isinstance(part, Embedding)
                nn.init.normal_(part.mod_emb, std=0.02)
                if hasattr(part, "proj"):
                    nn.init.xavier_uniform_(part.proj.weight)
                elif hasattr(part, "to_logits"):
                    nn.init.xavier_uniform_(part.to_logits.weight)
                else:
                    nn.init.normal_(part.token_emb.weight, std=self.config.embedding_std)
        nn.init.normal_(self.mask_token, std=0.02)
        for part in (self.encoder, self.decoder_proj_context, self.decoder):
            start_trunk(part, self.config.queries_are_keys_init)


def hidden_from(visible_BM: Tensor, modality_BM: Tensor) -> Tensor:
    """Which targets a target may not see (public decoder mask): images see their own modality, texts what came before.

    Args:
        visible_BM: tokens that become visible at each slot (`Targets.visible_BM`).
        modality_BM: modality of each slot.

    Returns:
        (B, M, M) bool, True where query m may not see key j.
    """
    reach_BM1 = visible_BM.cumsum(1)[..., None]
    ahead_BMM = torch.arange(modality_BM.shape[1], device=modality_BM.device) >= reach_BM1
    return ahead_BMM | (modality_BM[:, :, None] != modality_BM[:, None])


def normalise_patches(patches_PK: Tensor) -> Tensor:
    """Patches of 8-bit pixels, channel fastest, by ImageNet's statistics: float32 (P, K)."""
    pixels_PC = patches_PK.float().div_(255).view(len(patches_PK), -1, 3)
    mean, std = (torch.tensor(values, device=pixels_PC.device) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((pixels_PC - mean) / std).flatten(1)


def mean_losses(losses: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Mean by modality over batches that have it."""
    found: dict[str, list[float]] = {}
    for batch in losses:
        for name, value in batch.items():
            found.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in sorted(found.items())}


def _by_modality(modality_BN: NDArray[np.int16], number: int) -> dict[int, NDArray[np.int64]]:
    """Flat places of each modality that occurs, ascending."""
    flat = modality_BN.reshape(-1)
    places = {i: np.flatnonzero(flat == i) for i in range(number)}
    return {i: where for i, where in places.items() if len(where)}


def _long(values: NDArray[np.integer], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.int64)).to(device)
