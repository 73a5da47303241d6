"""Depth and normals by Omnidata's DPT-Hybrid, hosted on transformers' DPT (4M, appendix B.1).

Depth is fed in [-1, 1], normals in [0, 1]; both outputs are clamped to [0, 1]. Depth is stored as it comes (far is
large, no inversion), normals as n = 2 o - 1 without making them unit vectors, as Omnidata stores them. What the clamp
takes away cannot be had back, so the share of clamped pixels is kept beside each label.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fourmill.core.labels import Picture
from fourmill.core.streams import streams_of, to_host
from fourmill.pseudolabel.config import DptConfig, weights_digest
from fourmill.pseudolabel.labeller import CONSTANT, Answer, Labelled, NetworkError
from fourmill.pseudolabel.network import (
    Forward,
    batches,
    check_shape,
    fed,
    load_network,
    on_own_stream,
    resize,
    size_of,
)
from fourmill.pseudolabel.seeding import PROBE_PX, last_inputs, probe, spread_last
from fourmill.pseudolabel.watch import Watch, facts_of

_STRIDE = 32  # of the deepest map; at other sizes the maps to be fused differ in size


class DptLabeller:
    """One DPT network: depth or normals."""

    def __init__(self, label: Literal["depth", "normal"], config: DptConfig) -> None:
        self.label = label
        self.batch_size = config.batch_size
        self.weights_digest = weights_digest(config)
        self._config = config
        self._channels = 3 if label == "normal" else 1
        self._network, self._device = load_network(
            label, config, lambda: model_class(self._channels), lambda: _seeded(self._channels)
        )
        if not self._network.config.is_hybrid:
            raise NetworkError(
                f"{config.weights} is a plain DPT; the {label} labeller drives DPT-Hybrid (is_hybrid in config.json)"
            )
        if config.compile_backend is not None:
            _fix_padding(self._network)
        self.streams = streams_of(self._device)
        self._watch = Watch(label, config.weights)
        self._forward = Forward(
            config,
            self._device,
            self._network,
            lambda pixels: (forward(self._network, pixels),),
            prepare=lambda: _standardise_once(self._network),
        )
        self.clock = self._forward.clock

    def bucket(self, picture: Picture) -> tuple[int, int]:
        """Height and width fed for an image."""
        return fed_size(size_of(picture), self._config.longer_px)

    fed_size = bucket

    @on_own_stream
    @torch.inference_mode()
    def label_pictures(self, pictures: Sequence[Picture]) -> list[Answer]:
        """Depth (H, W) float32 in [0, 1] or normals (H, W, 3) float32 in [-1, 1] at each image's size.

        `clamped` beside it: the share of the network's pixels with an output at or outside of the bounds of [0, 1].
        """
        sizes = [self.bucket(p) for p in pictures]
        labels: dict[int, Answer] = {}
        for indices in batches(sizes, self.batch_size):
            batch, size = [pictures[i] for i in indices], sizes[indices[0]]
            output_BCHW = self._predict(batch, *size)
            clamped_B = ((output_BCHW <= 0) | (output_BCHW >= 1)).any(1).flatten(1).float().mean(1)
            made = [self._label(output_CHW, picture) for output_CHW, picture in zip(output_BCHW, batch, strict=True)]
            facts_BX, clamped_B, *found = to_host([facts_of(output_BCHW.flatten(2)), clamped_B, *made])
            dead = self._watch.check(batch, [picture.at(*size) for picture in batch], facts_BX)
            for i, label, clamped, is_dead in zip(indices, found, clamped_B.tolist(), dead, strict=True):
                labels[i] = CONSTANT if is_dead else Labelled(label, {"clamped": clamped})
        return [labels[i] for i in range(len(pictures))]

    def _predict(self, pictures: Sequence[Picture], height: int, width: int) -> Tensor:
        rgb_BCHW = fed(pictures, self._device, height, width)
        (output,) = self._forward(rgb_BCHW * 2 - 1 if self.label == "depth" else rgb_BCHW)
        output_BCHW = output.reshape(len(pictures), -1, *output.shape[-2:])
        check_shape(self.label, output_BCHW, (len(pictures), self._channels, height, width), self._config.weights)
        return output_BCHW

    def _label(self, output_CHW: Tensor, picture: Picture) -> Tensor:
        height, width = size_of(picture)
        label_CHW = resize(output_CHW.clamp(0, 1)[None], height, width)[0].clamp(0, 1)
        if self.label == "depth":
            return label_CHW[0]
        return (label_CHW.permute(1, 2, 0) * 2 - 1).clamp(-1, 1).contiguous()


def fed_size(size: tuple[int, int], longer_px: int) -> tuple[int, int]:
    """Height and width that the network sees: closest multiples of 32, the longer at most `longer_px`, never 0."""
    (height, width), longer = size, max(size)
    scale = 1.0 if _closest(longer) <= longer_px else longer_px / longer
    return max(_STRIDE, _closest(height * scale)), max(_STRIDE, _closest(width * scale))


def forward(network: Any, pixels_BCHW: Tensor) -> Tensor:
    """The network at any multiple of 32, (B, 3, H, W) to (B, H, W) or (B, 3, H, W).

    Stock transformers (5.23) refuses any size of a hybrid but the trained square, so its parts are driven here.
    """
    config, height, width = network.config, *pixels_BCHW.shape[-2:]
    embedded = network.dpt.embeddings(pixels_BCHW, interpolate_pos_encoding=True)
    maps, hidden = list(embedded.intermediate_activations), embedded.last_hidden_states
    for index, layer in enumerate(network.dpt.encoder.layer):
        hidden = layer(hidden)
        if index in config.backbone_out_indices[2:]:  # the first two are stages of the convolutional stem
            maps.append(hidden)
    return network.head(network.neck(maps, height // config.patch_size, width // config.patch_size))


def _fix_padding(network: nn.Module) -> None:
    """Let the convolutional stem pad by constants; at multiples of 32 they are what transformers computes from each size.

    Computed, they nest in one another, and dynamo does not come to an end with them where sizes are symbols, which they are
    from the second size on.
    """
    from transformers.models.bit.modeling_bit import DynamicPad2d

    for module in network.modules():
        pad = getattr(module, "pad", None)
        if isinstance(pad, DynamicPad2d):
            sides = zip(pad.kernel_size, pad.stride, pad.dilation, strict=True)
            height, width = (max((kernel - 1) * dilation + 1 - stride, 0) for kernel, stride, dilation in sides)
            by = (width // 2, width - width // 2, height // 2, height - height // 2)
            module.pad = nn.ConstantPad2d(by, pad.value)


def _standardise_once(network: nn.Module) -> None:
    """Give the stem's convolutions the weights that they multiply by, for good; labels stay the same bit for bit.

    Transformers computes them anew for every batch: 260 of the network's 1,065 calls, each of which a GPU's host has to make.
    """
    from transformers.models.bit.modeling_bit import WeightStandardizedConv2d

    for parent in list(network.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, WeightStandardizedConv2d):
                setattr(parent, name, _plain(module))


@torch.no_grad()
def _plain(standardising: Any) -> nn.Module:
    weight = standardising.weight
    flat = weight.reshape(1, len(weight), -1)
    ready = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=standardising.eps).reshape_as(weight)
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    plain = nn.Conv2d(*(getattr(standardising, name) for name in names), bias=standardising.bias is not None)
    plain.weight, plain.bias = weight, standardising.bias
    plain.weight.copy_(ready)  # laid out as the weight was
    return plain if standardising.pad is None else nn.Sequential(standardising.pad, plain)


def _closest(side: float) -> int:
    return math.floor(side / _STRIDE + 0.5) * _STRIDE


def model_class(channels: int) -> Any:
    """Transformers' DPT, with a head of one channel or of three."""
    from transformers import DPTForDepthEstimation

    class NormalDpt(DPTForDepthEstimation):
        """The same network with a head of three channels."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            head: Any = self.head.head
            head[4] = nn.Conv2d(head[4].in_channels, 3, kernel_size=1)

    return NormalDpt if channels == 3 else DPTForDepthEstimation


def _seeded(channels: int) -> nn.Module:
    from transformers import DPTConfig

    bit = {"model_type": "bit", "layer_type": "bottleneck", "global_padding": "same", "embedding_dynamic_padding": True}
    bit |= {"embedding_size": 16, "hidden_sizes": [16, 24, 32], "depths": [1, 1, 1], "num_groups": 4}
    network = model_class(channels)(
        DPTConfig(
            is_hybrid=True,
            image_size=PROBE_PX,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=64,
            layer_norm_eps=1e-6,
            initializer_range=0.1,
            backbone_config={**bit, "out_features": ["stage1", "stage2", "stage3"]},
            backbone_featmap_shape=[1, 32, PROBE_PX // 16, PROBE_PX // 16],
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[16, 24, 32, 32],
            reassemble_factors=[1, 1, 1, 0.5],
            fusion_hidden_size=24,
        )
    ).eval()
    _tune(network)
    return network


def _tune(network: Any) -> None:
    """Spread the answers of a seeded network over [0, 1]."""
    last = network.head.head[4]
    spread_last(last, last_inputs(last, lambda: forward(network, probe() * 2 - 1)), mean=0.5, deviation=0.2)
