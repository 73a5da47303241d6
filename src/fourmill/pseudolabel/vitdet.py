"""Boxes of COCO's 80 things by ViTDet, the paper's detector, through detectron2 (4M, appendix B.1).

detectron2's own base configuration is loaded by path and made larger: its package has no ViT-H, and its model zoo does not
import everywhere. The mask head is left out. detectron2 needs libraries that break Dagster, so this module is imported
only in its own environment (infra/detectron2).

B images, C channels, H and W pixels.
"""

# pyright: reportMissingImports=false
# (detectron2 is not in this environment, and must not be)

import importlib.util
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fourmill.core.coco import COCO_THINGS
from fourmill.core.labels import Box, Picture, clipped_box
from fourmill.core.safe_load import read_weights
from fourmill.core.streams import streams_of, to_device, to_host
from fourmill.pseudolabel.config import VitDetConfig, weights_digest
from fourmill.pseudolabel.labeller import CONSTANT, Label, NetworkError, Rejected
from fourmill.pseudolabel.network import (
    PRECISIONS,
    Forward,
    on_own_stream,
    placed,
    shortest_edge,
    size_of,
)
from fourmill.pseudolabel.stored import WEIGHTS_FILE
from fourmill.pseudolabel.vitdet_keys import VitDetArchitecture, check_vitdet, read_architecture
from fourmill.pseudolabel.vitdet_parts import fuse_attention, heads_in
from fourmill.pseudolabel.watch import Watch, check_finite, facts_of, finite_share

_BASE = "model_zoo/configs/common/models/mask_rcnn_vitdet.py"
_CASCADE = (((10, 10, 5, 5), 0.5), ((20, 20, 10, 10), 0.6), ((30, 30, 15, 15), 0.7))  # box scales and IoU of each stage


class Detectron2MissingError(ImportError):
    """This Python has no detectron2; says where it is to be."""


class VitDetLabeller:
    """Boxes, the surest first."""

    label = "det"

    def __init__(self, config: VitDetConfig) -> None:
        self.batch_size = config.batch_size
        self.weights_digest = weights_digest(config)
        self._config = config
        folder = Path(config.weights)
        self._architecture = read_architecture(folder)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = placed(load(folder, self._architecture), config, self._device)
        fuse_attention(self._model.backbone.net)
        self._heads = heads_in(self._model, PRECISIONS[config.precision])
        self.streams = streams_of(self._device)
        self._watch = Watch("features", config.weights)
        self._forward = Forward(
            config, self._device, self._model.backbone, self._features, self._model.backbone.net.blocks
        )
        self.clock = self._forward.clock

    def bucket(self, picture: Picture) -> tuple[int, int]:
        """Height and width fed: the same for all images, since all are padded to a square."""
        return self._architecture.image_px, self._architecture.image_px

    def fed_size(self, picture: Picture) -> tuple[int, int]:
        """Height and width of an image in that square."""
        side = self._architecture.image_px
        return shortest_edge(size_of(picture), side, side)

    @on_own_stream
    @torch.inference_mode()
    def label_pictures(self, pictures: Sequence[Picture]) -> list[Label | Rejected]:
        """Boxes of each image with a score of at least the threshold; an image may have none."""
        labels: list[Label | Rejected] = []
        for start in range(0, len(pictures), self.batch_size):
            batch = pictures[start : start + self.batch_size]
            found, facts_BX = self._predict(batch)
            fed = [self._in_square(picture) for picture in batch]
            dead = self._watch.check(batch, fed, facts_BX)
            for instances, is_dead in zip(found, dead, strict=True):
                labels.append(CONSTANT if is_dead else self._boxes(instances))
        return labels

    def _in_square(self, picture: Picture) -> NDArray[np.uint8]:
        """What the network sees of an image, before its colours are standardised."""
        (height, width), side = self.fed_size(picture), self._architecture.image_px
        square_HWC = np.zeros((side, side, 3), np.uint8)
        square_HWC[:height, :width] = picture.at(height, width)
        return square_HWC

    def _predict(self, pictures: Sequence[Picture]) -> tuple[list[Any], NDArray[np.float32]]:
        """detectron2's instances of each image at the size fed, and `facts_of` what the backbone saw."""
        side = self._architecture.image_px
        sizes = [self.fed_size(picture) for picture in pictures]
        pixels_BCHW = torch.zeros(len(pictures), 3, side, side, device=self._device)
        for place, (picture, (height, width)) in enumerate(zip(pictures, sizes, strict=True)):
            rgb_CHW = to_device(picture.at(height, width), self._device).permute(2, 0, 1).float()
            pixels_BCHW[place, :, :height, :width] = (rgb_CHW - self._model.pixel_mean) / self._model.pixel_std
        return self.detect(pixels_BCHW, sizes)

    def detect(self, pixels_BCHW: Tensor, sizes: list[tuple[int, int]]) -> tuple[list[Any], NDArray[np.float32]]:
        """The network alone: standardised pixels, padded to its square, to what `_predict` says.

        Args:
            sizes: height and width of each image without its padding.

        Raises:
            NetworkError: features, scores or boxes are not finite, or a head says the same of all boxes.
        """
        maps = self._forward(pixels_BCHW)
        # Of what is not finite detectron2 drops some and stops at the rest: the heads' answer counts when these do.
        of_maps = [facts_of(maps[2].flatten(2)), *map(finite_share, maps)]
        with self._heads.noted() as of_heads:
            found = self._found(pixels_BCHW, sizes, maps)
        facts_BX, heads_N2, *finite = to_host([of_maps[0], torch.stack(of_heads), *of_maps[1:]])
        for share_B in finite:
            check_finite("features", share_B, self._config.weights)
        check_finite("scores and boxes", heads_N2[:, 0], self._config.weights)
        if heads_N2[:, 1].any():
            raise NetworkError(
                f"scores or offsets of boxes from {self._config.weights} are the same for all boxes: the weights are broken, or are "
                "of another network"
            )
        if isinstance(found, AssertionError):
            raise NetworkError(f"boxes from {self._config.weights} are not finite: {found}") from found
        return found, facts_BX

    def _found(
        self, pixels_BCHW: Tensor, sizes: list[tuple[int, int]], maps: Sequence[Tensor]
    ) -> list[Any] | AssertionError:
        """The heads' answer, or detectron2's error of boxes that are not finite. On the clock with their waits for the host."""
        from detectron2.structures import ImageList

        images = ImageList(pixels_BCHW, sizes)
        features = dict(zip(self._levels, maps, strict=True))
        noted = self.clock.around() if self.clock is not None else nullcontext()
        try:
            with noted, torch.autocast(self._device.type, enabled=False):
                proposals, _ = self._model.proposal_generator(images, features)
                return self._model.roi_heads(images, features, proposals)[0]
        except AssertionError as error:
            if "infinite or NaN" not in str(error):
                raise
            return error

    @property
    def _levels(self) -> list[str]:
        return list(self._model.proposal_generator.in_features)

    def _features(self, pixels_BCHW: Tensor) -> tuple[Tensor, ...]:
        maps = self._model.backbone(pixels_BCHW)
        return tuple(maps[level] for level in self._levels)

    def _boxes(self, instances: Any) -> list[Box]:
        fed_height, fed_width = instances.image_size
        scale = instances.pred_boxes.tensor.new_tensor([fed_width, fed_height, fed_width, fed_height])
        columns = [instances.scores[:, None], instances.pred_classes[:, None], instances.pred_boxes.tensor / scale]
        rows = torch.cat([column.double() for column in columns], 1).tolist()
        return to_boxes(rows, self._config.score_threshold)


def to_boxes(rows: Sequence[Sequence[float]], threshold: float) -> list[Box]:
    """Boxes of rows (score, class, xmin, ymin, xmax, ymax in shares of the image), the surest first; empty ones left out."""
    sure = sorted((row for row in rows if row[0] >= threshold), key=lambda row: -row[0])
    found = [clipped_box(corners, score, COCO_THINGS[int(class_id)]) for score, class_id, *corners in sure]
    return [box for box in found if box is not None]


def require_detectron2() -> Path:
    """The folder of the installed package.

    Raises:
        Detectron2MissingError: there is none; with what to do.
    """
    spec = importlib.util.find_spec("detectron2")
    base = Path(next(iter(spec.submodule_search_locations or ()), "")) if spec else Path()
    if spec is None or not (base / _BASE).is_file():
        found = "is not installed" if spec is None else f"in {base} lacks {_BASE}, which its setup.py puts there"
        raise Detectron2MissingError(
            f"det labeller: detectron2 {found}, and ViTDet runs through it. Build the environment of infra/detectron2 and name "
            'its Python in the project: ray.stages["labels/det"].runtime_env = {"py_executable": "/opt/detectron2/bin/python"}; '
            "or choose a detector that needs none: labellers.det with kind detector"
        )
    return base


def build(architecture: VitDetArchitecture) -> Any:
    """detectron2's network with random weights.

    Raises:
        Detectron2MissingError: this Python has no detectron2.
    """
    base = require_detectron2()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit's farewell, at import
        from detectron2.config import LazyConfig, instantiate

        return instantiate(_configured(LazyConfig.load(str(base / _BASE)).model, architecture))


def _configured(model: Any, a: VitDetArchitecture) -> Any:
    """The base's ViT-B with one box head, as ViT-H with a cascade of three."""
    from detectron2.config import LazyCall
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.box_regression import Box2BoxTransform
    from detectron2.modeling.matcher import Matcher
    from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNConvFCHead, FastRCNNOutputLayers

    net, heads = model.backbone.net, model.roi_heads
    net.update(img_size=a.image_px, embed_dim=a.embed_dim, depth=a.depth, num_heads=a.num_heads, drop_path_rate=0.0)
    net.update(window_size=a.window_size, window_block_indexes=[i for i in range(a.depth) if i not in a.global_blocks])
    model.backbone.update(out_channels=a.channels, square_pad=a.image_px)
    model.proposal_generator.head.in_channels = a.channels
    for key in ("box_head", "box_predictor", "proposal_matcher", "mask_in_features", "mask_pooler", "mask_head"):
        heads.pop(key)
    pooled = ShapeSpec(channels=a.channels, height=7, width=7)
    heads.update(
        _target_=CascadeROIHeads,
        box_heads=[
            LazyCall(FastRCNNConvFCHead)(
                input_shape=pooled, conv_dims=[a.channels] * 4, fc_dims=[a.box_dim], conv_norm="LN"
            )
            for _ in _CASCADE
        ],
        box_predictors=[
            LazyCall(FastRCNNOutputLayers)(
                input_shape=ShapeSpec(channels=a.box_dim),
                test_score_thresh=0.05,
                box2box_transform=LazyCall(Box2BoxTransform)(weights=weights),
                cls_agnostic_bbox_reg=True,
                num_classes=a.num_classes,
            )
            for weights, _ in _CASCADE
        ],
        proposal_matchers=[
            LazyCall(Matcher)(thresholds=[iou], labels=[0, 1], allow_low_quality_matches=False) for _, iou in _CASCADE
        ],
    )
    return model


def load(folder: Path, architecture: VitDetArchitecture) -> Any:
    """detectron2's network with the weights of a folder, float32.

    Raises:
        Detectron2MissingError: this Python has no detectron2.
        NetworkError: the weights do not fit, or are not finite.
    """
    require_detectron2()  # before 2.7 GB are read
    state = read_weights(folder / WEIGHTS_FILE)
    check_vitdet(state, architecture, str(folder / WEIGHTS_FILE))
    broken = [key for key, value in state.items() if not bool(torch.isfinite(value).all())]
    if broken:  # detectron2 drops boxes that are not finite, so a broken head would look like images without objects
        raise NetworkError(f"{folder / WEIGHTS_FILE} is not finite in {', '.join(broken[:5])}: broken weights")
    model = build(architecture)
    model.load_state_dict(state)
    return model
