"""COCO panoptic classes by Mask2Former with a Swin backbone, hosted on transformers (4M, appendix B.1).

Sizes, padding and post-processing follow the original: mask logits are brought to the image's size before the sigmoid.
transformers' own processor works at 384 x 384 throughout, which blurs every border of a larger image.

B images, Q queries, C classes, H and W pixels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fourmill.core.labels import COCO_PANOPTIC, Picture
from fourmill.core.modality import NUM_SEMSEG_CLASSES
from fourmill.pseudolabel.config import VERSION, Mask2FormerConfig, weights_digest
from fourmill.pseudolabel.labeller import Label, NetworkError, Rejected
from fourmill.pseudolabel.network import (
    ConstantGuard,
    batches,
    check_output,
    is_constant,
    last_inputs,
    load_network,
    probe,
    resize,
    size_of,
    spread_last,
    standardise,
    to_tensor,
)

_DIVISOR = 32  # stride of the deepest map: inputs are padded to a multiple
_PIXELS_AT_ONCE = 16_384


class Mask2FormerLabeller:
    """Classes (H, W) uint8, ids 0..132; the argmax is never void."""

    label = "semseg"
    version = VERSION

    def __init__(self, config: Mask2FormerConfig) -> None:
        self.batch_size = config.batch_size
        self.weights_digest = weights_digest(config)
        self._config = config
        self._network, self._device = load_network("semseg", config.weights, _model_class, _seeded)
        _check_classes(self._network.config.id2label, config.weights)

    def bucket(self, picture: Picture) -> tuple[int, int]:
        """Height and width fed for an image, before padding."""
        return fed_size(size_of(picture), self._config.shorter_px, self._config.longer_px)

    @torch.inference_mode()
    def label_pictures(self, pictures: Sequence[Picture]) -> list[Label | Rejected]:
        """Classes (H, W) uint8 at each image's size."""
        config = self._config
        sizes = [fed_size(size_of(p), config.shorter_px, config.longer_px) for p in pictures]
        guard = ConstantGuard(self.label, config.weights)
        labels: dict[int, Label | Rejected] = {}
        for indices in batches(sizes, self.batch_size):
            height, width = sizes[indices[0]]
            classes_BQC, masks_BQHW = self._predict([pictures[i] for i in indices], height, width)
            constant = is_constant(masks_BQHW)
            for position, i in enumerate(indices):
                if guard.add(pictures[i], constant[position]):
                    labels[i] = Rejected("the network's output is constant")
                    continue
                masks_QHW = masks_BQHW[position][:, :height, :width]
                labels[i] = _semantic(classes_BQC[position], masks_QHW, size_of(pictures[i]))
        guard.finish()
        return [labels[i] for i in range(len(pictures))]

    def _predict(self, pictures: Sequence[Picture], height: int, width: int) -> tuple[Tensor, Tensor]:
        """Class logits (B, Q, C + 1) and mask logits (B, Q, H, W) of the padded input."""
        config = self._config
        rgb_BCHW = torch.cat([resize(to_tensor([picture], self._device), height, width) for picture in pictures])
        padding = (0, -width % _DIVISOR, 0, -height % _DIVISOR)
        pixels_BCHW = F.pad(standardise(rgb_BCHW, config.mean, config.std), padding)
        output = self._network(pixel_values=pixels_BCHW)
        classes_BQC, masks_BQhw = output.class_queries_logits, output.masks_queries_logits
        queries = self._network.config.num_queries
        check_output("class logits", classes_BQC, (len(pictures), queries, NUM_SEMSEG_CLASSES + 1), config.weights)
        check_output("mask logits", masks_BQhw, (len(pictures), queries, *masks_BQhw.shape[2:]), config.weights)
        masks_BQHW = F.interpolate(masks_BQhw, pixels_BCHW.shape[-2:], mode="bilinear", align_corners=False)
        return classes_BQC, masks_BQHW


def fed_size(size: tuple[int, int], shorter_px: int, longer_px: int) -> tuple[int, int]:
    """Height and width that the network sees before padding: the shorter side as asked, unless the longer gets too long."""
    scale = min(shorter_px / min(size), longer_px / max(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def _semantic(classes_QC: Tensor, masks_QHW: Tensor, size: tuple[int, int]) -> Label:
    masks_QHW = F.interpolate(masks_QHW[None], size, mode="bilinear", align_corners=False)[0].sigmoid()
    masks_PQ, classes_QC = masks_QHW.flatten(1).T, classes_QC.softmax(-1)[:, :-1]  # the last class is "no object"
    # In parts: the scores of all classes at every pixel of one large image are 300 MB.
    ids = [(part_PQ @ classes_QC).argmax(1) for part_PQ in masks_PQ.split(_PIXELS_AT_ONCE)]
    return torch.cat(ids).to(torch.uint8).reshape(size).cpu().numpy()


def _check_classes(id2label: dict[int, str], weights: str) -> None:
    names = [id2label.get(i) for i in range(NUM_SEMSEG_CLASSES)]
    wrong = [
        f"{i} is {name!r}, not {known!r}"
        for i, (name, known) in enumerate(zip(names, COCO_PANOPTIC, strict=True))
        if name != known
    ]
    if wrong or len(id2label) != NUM_SEMSEG_CLASSES:
        raise NetworkError(
            f"{weights} has {len(id2label)} classes, expected the {NUM_SEMSEG_CLASSES} of COCO panoptic in detectron2's order "
            f"({'; '.join(wrong[:3]) or 'the first agree'}): take the COCO panoptic weights"
        )


def _model_class() -> Any:
    from transformers import Mask2FormerForUniversalSegmentation

    return Mask2FormerForUniversalSegmentation


def _seeded() -> nn.Module:
    from transformers import Mask2FormerConfig as NetworkConfig
    from transformers import SwinConfig

    swin: dict[str, Any] = {"image_size": 128, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4]}
    swin |= {"window_size": 4, "drop_path_rate": 0.0, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    network = _model_class()(
        NetworkConfig(
            backbone_config=SwinConfig(**swin),
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=64,
            dim_feedforward=64,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=4,
            num_queries=16,
            id2label=dict(enumerate(COCO_PANOPTIC)),
            label2id={name: i for i, name in enumerate(COCO_PANOPTIC)},
        )
    ).eval()
    _tune(network)
    return network


def _tune(network: Any) -> None:
    """Let the queries of a seeded network disagree about classes, and its masks about places."""
    pixels_BCHW = probe() * 2 - 1
    features = network.model.pixel_level_module.decoder.mask_projection
    masks = network.model.transformer_module.decoder.mask_predictor.mask_embedder.layers[-1].layers[0]
    for layer, deviation in ((features, 1.0), (masks, 4.0 / masks.out_features**0.5), (network.class_predictor, 3.0)):
        spread_last(layer, last_inputs(layer, lambda: network(pixel_values=pixels_BCHW)), 0.0, deviation)
