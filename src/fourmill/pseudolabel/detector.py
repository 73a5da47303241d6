"""Boxes of COCO's 80 things by a detector of the DETR family, hosted on transformers: RT-DETRv2, D-FINE and their kin.

It serves where detectron2's ViTDet, the paper's detector, is not installed. Scores of different detectors are on
different scales, so the threshold belongs to the network; 4M's readers cut at 0.6 again, so scores are stored on a scale
on which the threshold is 0.6.

B images, Q queries, C classes, K of them kept.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fourmill.core.coco import COCO_THINGS
from fourmill.core.labels import Box, Picture, clipped_box
from fourmill.core.sequences import MIN_SCORE
from fourmill.core.streams import streams_of, to_host
from fourmill.pseudolabel.config import DetectorConfig, weights_digest
from fourmill.pseudolabel.labeller import CONSTANT, Label, NetworkError, Rejected
from fourmill.pseudolabel.network import (
    Forward,
    Standardise,
    check_shape,
    fed,
    load_network,
    on_own_stream,
)
from fourmill.pseudolabel.seeding import last_inputs, probe, spread_last
from fourmill.pseudolabel.watch import Watch, facts_of, facts_of_boxes

THRESHOLDS = {"rt_detr": 0.5, "rt_detr_v2": 0.5, "d_fine": 0.5}
"""Least score by kind of network: what their own post-processing keeps by default. Others need one in the config."""

_PLAIN_COLOURS = (*THRESHOLDS, "deimv2")  # kinds that may take RGB in [0, 1] as it is; others never do

# Names that some checkpoints took from PASCAL VOC.
_ALIASES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}


class DetectorLabeller:
    """Boxes, the surest first."""

    label = "det"

    def __init__(self, config: DetectorConfig) -> None:
        self.batch_size = config.batch_size
        self.weights_digest = weights_digest(config)
        self._config = config
        self._network, self._device = load_network("det", config, model_class, lambda: _seeded(config))
        self._names = thing_names(self._network.config.id2label, config.weights)
        self._kept = list(self._names)  # the network's ids of things
        self._kept_K = torch.tensor(self._kept, device=self._device)
        self._threshold = threshold_of(config, self._network.config.model_type)
        check_colours(config, self._network.config.model_type)
        self.streams = streams_of(self._device)
        self._watch_classes, self._watch_boxes = Watch("class logits", config.weights), Watch("boxes", config.weights)
        self._standardise = Standardise(config.mean, config.std, self._device)
        self._forward = Forward(config, self._device, self._network, self._logits)
        self.clock = self._forward.clock

    def bucket(self, picture: Picture) -> tuple[int, int]:
        """Height and width fed: the same for all images."""
        return self._config.input_px, self._config.input_px

    fed_size = bucket

    @on_own_stream
    @torch.inference_mode()
    def label_pictures(self, pictures: Sequence[Picture]) -> list[Label | Rejected]:
        """Boxes of each image with a score of at least the threshold; an image may have none."""
        labels: list[Label | Rejected] = []
        for start in range(0, len(pictures), self.batch_size):
            batch = pictures[start : start + self.batch_size]
            logits_BQC, boxes_BQ4 = self._predict(batch)
            facts = [facts_of(logits_BQC.transpose(1, 2)), facts_of_boxes(boxes_BQ4)]
            rows_BNX, classes_BX, boxes_BX = to_host([self._best(logits_BQC, boxes_BQ4), *facts])
            rgb = [picture.at(*self.bucket(picture)) for picture in batch]
            dead = zip(
                self._watch_classes.check(batch, rgb, classes_BX),
                self._watch_boxes.check(batch, rgb, boxes_BX),
                strict=True,
            )
            labels += [
                CONSTANT if any(which) else self._boxes(rows) for rows, which in zip(rows_BNX, dead, strict=True)
            ]
        return labels

    def _predict(self, pictures: Sequence[Picture]) -> tuple[Tensor, Tensor]:
        """Logits (B, Q, C), boxes (B, Q, 4) as centre and size in shares of the image."""
        config, side = self._config, self._config.input_px
        rgb_BCHW = fed(pictures, self._device, side, side)
        logits_BQC, boxes_BQ4 = self._forward(self._standardise(rgb_BCHW))
        queries, classes = logits_BQC.shape[1], len(self._network.config.id2label)
        # Detectors trained with a softmax have one logit more, for "no object".
        classes += logits_BQC.shape[-1] == classes + 1
        check_shape("class logits", logits_BQC, (len(pictures), queries, classes), config.weights)
        check_shape("boxes", boxes_BQ4, (len(pictures), queries, 4), config.weights)
        return logits_BQC, boxes_BQ4

    def _logits(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        output = self._network(pixel_values=pixels_BCHW)
        return output.logits, output.pred_boxes

    def _best(self, logits_BQC: Tensor, boxes_BQ4: Tensor) -> Tensor:
        """The surest boxes of each image, (B, N, 6) float64: score, place in `_kept`, centre and size."""
        scores_BQC = scores(logits_BQC, len(self._network.config.id2label))
        flat_BN = scores_BQC[..., self._kept_K].flatten(1)
        best = flat_BN.topk(min(self._config.max_boxes, flat_BN.shape[1]))
        queries_BN = best.indices // len(self._kept)
        boxes_BN4 = boxes_BQ4.gather(1, queries_BN[..., None].expand(-1, -1, 4))
        columns = [best.values[..., None], (best.indices % len(self._kept))[..., None], boxes_BN4]
        return torch.cat([column.double() for column in columns], -1)

    def _boxes(self, rows_NX: NDArray[np.float64]) -> list[Box]:
        sure = rows_NX[rows_NX[:, 0] >= self._threshold].tolist()
        return [box for row in sure if (box := self._box(row)) is not None]

    def _box(self, row: list[float]) -> Box | None:
        score, which, x, y, width, height = row
        corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        return clipped_box(corners, rescaled(score, self._threshold), self._names[self._kept[int(which)]])


def threshold_of(config: DetectorConfig, model_type: str) -> float:
    """Least score of a network's boxes.

    Raises:
        NetworkError: neither the config nor `THRESHOLDS` has one.
    """
    if config.score_threshold is not None:
        return config.score_threshold
    if model_type not in THRESHOLDS:
        raise NetworkError(
            f"{config.weights} is a {model_type}, and detectors' scores are on different scales: set "
            f"labellers.det.score_threshold so that an image gets about as many boxes as it shows objects (known: {THRESHOLDS}); and "
            "mean, std and input_px as its preprocessor_config.json has them"
        )
    return THRESHOLDS[model_type]


def check_colours(config: DetectorConfig, model_type: str) -> None:
    """Raise NetworkError where a network would be fed colours as no network of its kind was trained with."""
    if model_type not in _PLAIN_COLOURS and config.mean == (0, 0, 0) and config.std == (1, 1, 1):
        raise NetworkError(
            f"{config.weights} is a {model_type}, which was trained with standardised colours: set labellers.det.mean and .std to "
            "the image_mean and image_std of its preprocessor_config.json, and .input_px to about the size there"
        )


def rescaled(score: float, threshold: float) -> float:
    """A score on the scale on which `threshold` is `MIN_SCORE` and 1 is 1, straight between them."""
    share = (score - threshold) / (1 - threshold) if threshold < 1 else 1.0
    return min(1.0, MIN_SCORE + (1 - MIN_SCORE) * share)


def scores(logits_QC: Tensor, num_classes: int) -> Tensor:
    """Scores (..., Q, C) in [0, 1]: a sigmoid, or a softmax where the network has a logit for "no object"."""
    if logits_QC.shape[-1] == num_classes + 1:
        return logits_QC.softmax(-1)[..., :-1]
    return logits_QC.sigmoid()


def thing_names(id2label: Mapping[int, str], weights: str) -> dict[int, str]:
    """COCO's name of each class id of a network; ids of other classes, and those beyond its outputs, are left out.

    Raises:
        NetworkError: one of COCO's 80 things has no class: its objects would be missing from the labels in silence.
    """
    named = {i: _ALIASES.get(name.lower(), name.lower()) for i, name in sorted(id2label.items()) if i < len(id2label)}
    known = {i: name for i, name in named.items() if name in COCO_THINGS}
    missing = [name for name in COCO_THINGS if name not in known.values()]
    if missing:
        others = [id2label[i] for i in named if i not in known]
        raise NetworkError(
            f"{weights} has no class for {len(missing)} of COCO's {len(COCO_THINGS)} things ({_few(missing)}); its other classes: "
            f"{_few(others)}. Take weights trained on COCO, or give its classes COCO's names in id2label of config.json"
        )
    return known


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "none"


def model_class() -> Any:
    """Transformers' class of any detector."""
    from transformers import AutoModelForObjectDetection

    return AutoModelForObjectDetection


def _seeded(config: DetectorConfig) -> nn.Module:
    from transformers import RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection

    backbone: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]}
    backbone |= {"layer_type": "bottleneck", "out_indices": [2, 3, 4]}
    network = RTDetrV2ForObjectDetection(
        RTDetrV2Config(
            backbone_config=RTDetrResNetConfig(**backbone),
            encoder_in_channels=[24, 32, 40],
            encoder_hidden_dim=32,
            encoder_ffn_dim=64,
            encoder_attention_heads=4,
            d_model=32,
            decoder_in_channels=[32, 32, 32],
            decoder_ffn_dim=64,
            decoder_layers=2,
            decoder_attention_heads=4,
            num_queries=20,
            num_denoising=0,
            hidden_expansion=0.5,
            id2label=dict(enumerate(COCO_THINGS)),
            label2id={name: i for i, name in enumerate(COCO_THINGS)},
        )
    ).eval()
    _tune(network, config)
    return network


def _tune(network: Any, config: DetectorConfig) -> None:
    """Let a seeded network find a few boxes of several classes and sizes in an image, as a trained one does."""
    pixels_BCHW = probe(config.input_px, 4)
    decoder = network.model.decoder
    chooser = network.model.enc_score_head  # of the places that become queries
    corners, classes = decoder.bbox_embed[-1].layers[-1], decoder.class_embed[-1]
    with torch.no_grad():
        spread_last(chooser, last_inputs(chooser, lambda: network(pixel_values=pixels_BCHW)), 0.0, 1.0)
        corners.weight.normal_()
        larger = torch.tensor([0.0, 0.0, 2.0, 2.0])  # than the anchors, a twentieth of the image
        spread_last(corners, last_inputs(corners, lambda: network(pixel_values=pixels_BCHW)), larger, 0.7)
        spread_last(classes, last_inputs(classes, lambda: network(pixel_values=pixels_BCHW)), 0.0, 1.5)
        best_BQ = network(pixel_values=pixels_BCHW).logits.amax(-1)
        level = torch.logit(torch.tensor(threshold_of(config, network.config.model_type)).clamp(0.01, 0.99))
        classes.bias.add_(level - best_BQ.flatten().quantile(0.8))
