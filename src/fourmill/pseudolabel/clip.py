"""Dense CLIP features of crops, hosted on transformers: the last layer norm on all tokens, the projection, no CLS.

For ViT-B/16 and crops of 224 pixels that is 14 x 14 x 512, as 4M's CLIP tokenizer eats them. Features depend on the
crop and would fill terabytes, so they are computed on the way to tokens and never stored.

B crops, S pixels a side, h and w patches, D channels inside, C channels out.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fourmill.core.labels import Picture
from fourmill.pseudolabel.config import ClipConfig, weights_digest
from fourmill.pseudolabel.labeller import NetworkError
from fourmill.pseudolabel.network import (
    Forward,
    Standardise,
    as_numpy,
    check_shape,
    load_network,
    on_own_stream,
    resize,
    to_tensor,
)
from fourmill.pseudolabel.watch import Watch, check_finite, facts_of

_SEEDED_PX = 64


class ClipFeatures:
    """Crops (B, S, S, 3) uint8 to features (B, h, w, C) float32; no state."""

    def __init__(self, config: ClipConfig) -> None:
        self.channels = config.channels
        self.weights_digest = weights_digest(config)
        self._config = config
        self._network, self._device = load_network("clip", config, model_class, lambda: _seeded(config))
        found = self._network.config
        if (found.patch_size, found.projection_dim) != (config.patch_px, config.channels):
            raise NetworkError(
                f"{config.weights} has patches of {found.patch_size} pixels and {found.projection_dim} channels, the clip "
                f"config says {config.patch_px} and {config.channels}: change patch_px and channels, or the weights"
            )
        self._watch = Watch("features", config.weights)
        self._standardise = Standardise(config.mean, config.std, self._device)
        self._forward = Forward(
            config, self._device, self._network, lambda pixels: (dense_features(self._network, pixels),)
        )

    def __call__(self, crops_BSSC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """`on_device`, as an array."""
        return as_numpy(self.on_device(crops_BSSC))

    @on_own_stream
    @torch.inference_mode()
    def on_device(self, crops_BSSC: NDArray[np.uint8]) -> Tensor:
        """Features of square crops, left where they are made: 0.4 MB a crop take longer to travel than to compute.

        Raises:
            ValueError: another shape or type, or a side that the patches do not divide.
            NetworkError: the features are not finite, or tell nothing of the crops.
        """
        side = self._side(crops_BSSC)
        size, width = self._config.batch_size, side // self._config.patch_px
        parts = [torch.empty((0, width, width, self.channels), device=self._device)]
        facts = [torch.empty((0, 5), device=self._device)]
        for start in range(0, len(crops_BSSC), size):
            batch = crops_BSSC[start : start + size]
            rgb_BCSS = resize(to_tensor(batch, self._device), side, side)
            (features,) = self._forward(self._standardise(rgb_BCSS))
            check_shape("features", features, (len(batch), width, width, self.channels), self._config.weights)
            parts.append(features)
            facts.append(facts_of(features.flatten(1, 2).transpose(1, 2)))
        self._check(crops_BSSC, as_numpy(torch.cat(facts)), width)
        return torch.cat(parts)

    def _check(self, crops_BSSC: NDArray[np.uint8], facts_BX: NDArray[np.float32], width: int) -> None:
        """Positions are in the features, so those of one crop are never all alike, even if it has one colour."""
        check_finite("features", facts_BX[:, 0], self._config.weights)
        if width > 1 and len(facts_BX) and facts_BX[:, 1].all():
            raise NetworkError(
                f"features from {self._config.weights} are the same at every place of each of {len(facts_BX)} crops: the weights "
                "are broken, or are of another network"
            )
        self._watch.check([Picture(crop) for crop in crops_BSSC], list(crops_BSSC), facts_BX)

    def _side(self, crops_BSSC: NDArray[np.uint8]) -> int:
        shape = crops_BSSC.shape
        if crops_BSSC.dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3:
            raise ValueError(f"crops are {crops_BSSC.dtype} of shape {shape}, expected uint8 of shape (B, S, S, 3)")
        side = self._config.input_px or shape[1]
        if side % self._config.patch_px:
            raise ValueError(
                f"crops of {side} pixels are not a multiple of CLIP's {self._config.patch_px}-pixel patches"
            )
        return side


def dense_features(network: Any, pixels_BCHW: Tensor) -> Tensor:
    """Features (B, h, w, C) of standardised pixels (B, 3, H, W)."""
    vision = network.vision_model
    embed = vision.embeddings.patch_embedding
    height, width = (side // embed.stride[0] for side in pixels_BCHW.shape[-2:])
    # On a GPU without cuDNN, whose workspace may be large: not measured by itself (docs/benchmarks.md).
    patches_BND = by_product(embed, pixels_BCHW) if pixels_BCHW.is_cuda else embed(pixels_BCHW).flatten(2).mT
    class_B1D = vision.embeddings.class_embedding.expand(len(pixels_BCHW), 1, -1)
    hidden_BTD = torch.cat([class_B1D, patches_BND], 1)
    hidden_BTD = hidden_BTD + positions(vision.embeddings.position_embedding.weight, height, width)
    hidden_BTD = vision.encoder(inputs_embeds=vision.pre_layrnorm(hidden_BTD)).last_hidden_state
    features_BTC = network.visual_projection(vision.post_layernorm(hidden_BTD))
    return features_BTC[:, 1:].unflatten(1, (height, width))


def by_product(embed: nn.Conv2d, pixels_BCHW: Tensor) -> Tensor:
    """What a convolution gives whose kernels lie side by side, as one product of matrices: (B, h * w, D)."""
    (side_px, _) = embed.kernel_size
    patches_BND = F.pixel_unshuffle(pixels_BCHW, side_px).flatten(2).mT
    return F.linear(patches_BND, embed.weight.flatten(1), embed.bias)


def positions(stored_TD: Tensor, height: int, width: int) -> Tensor:
    """Position embeddings (1 + height * width, D) for a grid of another size, CLS first.

    The scale is (side + 0.1) / stored side, as in the code that made the public CLIP tokens; interpolating to the exact
    size, as transformers does, changes the features of 448-pixel crops by 1.5 % of their range.
    """
    side = round((len(stored_TD) - 1) ** 0.5)
    if (height, width) == (side, side):
        return stored_TD
    grid = stored_TD[1:].unflatten(0, (side, side)).permute(2, 0, 1)[None]
    scale = ((height + 0.1) / side, (width + 0.1) / side)
    grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", align_corners=False, recompute_scale_factor=False)
    return torch.cat([stored_TD[:1], grid[0].flatten(1).T])


def model_class() -> Any:
    """Transformers' image half of CLIP."""
    from transformers import CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection


def _seeded(config: ClipConfig) -> nn.Module:
    from transformers import CLIPVisionConfig

    return model_class()(
        CLIPVisionConfig(
            image_size=_SEEDED_PX // config.patch_px * config.patch_px,
            patch_size=config.patch_px,
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=config.channels,
            hidden_act="quick_gelu",
            layer_norm_eps=1e-5,
        )
    )
