"""COCO panoptic classes by Mask2Former with a Swin backbone, hosted on transformers (4M, appendix B.1).

Sizes, padding and post-processing follow the original: mask logits are brought to the image's size before the sigmoid.
transformers' own processor works at 384 x 384 throughout, which blurs every border of a larger image.

B images, Q queries, C classes, H and W pixels.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fourmill.core.coco import COCO_PANOPTIC
from fourmill.core.labels import Picture
from fourmill.core.modality import NUM_SEMSEG_CLASSES
from fourmill.core.precision import exact_products
from fourmill.core.streams import streams_of, to_host
from fourmill.pseudolabel.config import Mask2FormerConfig, weights_digest
from fourmill.pseudolabel.labeller import CONSTANT, Label, NetworkError, Rejected
from fourmill.pseudolabel.network import (
    Forward,
    Standardise,
    batches,
    check_shape,
    fed,
    load_network,
    on_own_stream,
    shortest_edge,
    size_of,
)
from fourmill.pseudolabel.seeding import last_inputs, probe, spread_last
from fourmill.pseudolabel.watch import Watch, facts_of

Made = TypeVar("Made")

_DIVISOR = 32  # stride of the deepest map: inputs are padded to a multiple
_PIXELS_AT_ONCE = {"cpu": 1 << 14, "cuda": 1 << 20}  # as many as stay in caches; as few kernels as possible
_MASK_VALUES_AT_ONCE = 1 << 28  # 1 GB of masks; a photograph of 24 million pixels has 10 GB of them


class Mask2FormerLabeller:
    """Classes (H, W) uint8, ids 0..132; the argmax is never void."""

    label = "semseg"

    def __init__(self, config: Mask2FormerConfig) -> None:
        self.batch_size = config.batch_size
        self.weights_digest = weights_digest(config)
        self._config = config
        self._network, self._device = load_network("semseg", config, model_class, _seeded)
        _check_classes(self._network.config.id2label, config.weights)
        self.streams = streams_of(self._device)
        self._watch_classes, self._watch_masks = (Watch(f"{what} logits", config.weights) for what in ("class", "mask"))
        self._standardise = Standardise(config.mean, config.std, self._device)
        self._forward = Forward(config, self._device, self._network, self._logits, compiler=by_size)
        self.clock = self._forward.clock

    def bucket(self, picture: Picture) -> tuple[int, int]:
        """Height and width fed for an image, before padding."""
        return shortest_edge(size_of(picture), self._config.shorter_px, self._config.longer_px)

    fed_size = bucket

    @on_own_stream
    @torch.inference_mode()
    def label_pictures(self, pictures: Sequence[Picture]) -> list[Label | Rejected]:
        """Classes (H, W) uint8 at each image's size."""
        sizes = [self.bucket(p) for p in pictures]
        labels: dict[int, Label | Rejected] = {}
        for indices in batches(sizes, self.batch_size):
            batch, (height, width) = [pictures[i] for i in indices], sizes[indices[0]]
            classes_BQC, masks_BQhw, padded = self._predict(batch, height, width)
            masks_BQHW = F.interpolate(masks_BQhw, padded, mode="bilinear", align_corners=False)[..., :height, :width]
            made = [
                _semantic(classes_QC, masks_QHW, size_of(picture))
                for classes_QC, masks_QHW, picture in zip(classes_BQC, masks_BQHW, batch, strict=True)
            ]
            # Facts of the small masks: a sixteenth of the values.
            facts = [facts_of(classes_BQC.transpose(1, 2)), facts_of(masks_BQhw.flatten(2))]
            classes_BX, masks_BX, *found = to_host([*facts, *made])
            rgb = [picture.at(height, width) for picture in batch]
            dead = zip(
                self._watch_classes.check(batch, rgb, classes_BX),
                self._watch_masks.check(batch, rgb, masks_BX),
                strict=True,
            )
            labels |= {i: CONSTANT if any(which) else ids for i, ids, which in zip(indices, found, dead, strict=True)}
        return [labels[i] for i in range(len(pictures))]

    def _predict(self, pictures: Sequence[Picture], height: int, width: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Class logits (B, Q, C + 1), small mask logits (B, Q, h, w) of the padded input, and its height and width."""
        config = self._config
        rgb_BCHW = fed(pictures, self._device, height, width)
        padding = (0, -width % _DIVISOR, 0, -height % _DIVISOR)
        pixels_BCHW = F.pad(self._standardise(rgb_BCHW), padding)
        classes_BQC, masks_BQhw = self._forward(pixels_BCHW)
        queries = self._network.config.num_queries
        check_shape("class logits", classes_BQC, (len(pictures), queries, NUM_SEMSEG_CLASSES + 1), config.weights)
        check_shape("mask logits", masks_BQhw, (len(pictures), queries, *masks_BQhw.shape[2:]), config.weights)
        return classes_BQC, masks_BQhw, (pixels_BCHW.shape[2], pixels_BCHW.shape[3])

    def _logits(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        output = self._network(pixel_values=pixels_BCHW)
        return output.class_queries_logits, output.masks_queries_logits


def by_size(function: Callable[[Tensor], Made], backend: str) -> Callable[[Tensor], Made]:
    """A function of images that is compiled anew for each height and width, eight times at most; others run as they are.

    With sizes as symbols, which they would be from the second on, dynamo does not come to an end with Swin's windows.
    """
    compiled = torch.compile(function, backend=backend)

    def asked(pixels_BCHW: Tensor) -> Made:
        torch._dynamo.mark_static(pixels_BCHW, [2, 3])
        return compiled(pixels_BCHW)

    return asked


def _semantic(classes_QC: Tensor, masks_QHW: Tensor, size: tuple[int, int]) -> Tensor:
    classes_QC = classes_QC.softmax(-1)[:, :-1]  # the last class is "no object"
    rows = max(1, _MASK_VALUES_AT_ONCE // (len(masks_QHW) * size[1]))
    bands: list[Tensor] = []
    for top in range(0, size[0], rows):
        masks_QhW = enlarged_rows(masks_QHW, size, top, min(top + rows, size[0])).sigmoid()
        # In parts: the scores of all classes at every pixel of one large image are 300 MB.
        parts = masks_QhW.flatten(1).T.split(_PIXELS_AT_ONCE.get(masks_QhW.device.type, 1 << 14))
        with exact_products():  # whatever another thread's forward pass lets torch round
            bands += [(part_PQ @ classes_QC).argmax(1) for part_PQ in parts]
    return torch.cat(bands).to(torch.uint8).reshape(size)


def enlarged_rows(x_CHW: Tensor, size: tuple[int, int], top: int, bottom: int) -> Tensor:
    """Rows `top` to `bottom` of maps resized to `size`, bilinear, without making the others."""
    if (top, bottom) == (0, size[0]):
        return F.interpolate(x_CHW[None], size, mode="bilinear", align_corners=False)[0]
    height = x_CHW.shape[1]
    places = (torch.arange(top, bottom, device=x_CHW.device) + 0.5) * (height / size[0]) - 0.5
    places = places.clamp(0, height - 1)
    above = places.floor().long()
    share = (places - above)[:, None]
    below = (above + 1).clamp(max=height - 1)
    mixed_CHW = x_CHW[:, above] * (1 - share) + x_CHW[:, below] * share
    return F.interpolate(mixed_CHW[None], (bottom - top, size[1]), mode="bilinear", align_corners=False)[0]


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


def model_class() -> Any:
    """Transformers' Mask2Former."""
    from transformers import Mask2FormerForUniversalSegmentation

    return Mask2FormerForUniversalSegmentation


def _seeded() -> nn.Module:
    from transformers import Mask2FormerConfig as NetworkConfig
    from transformers import SwinConfig

    swin: dict[str, Any] = {"image_size": 128, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4]}
    swin |= {"window_size": 4, "drop_path_rate": 0.0, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    network = model_class()(
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
