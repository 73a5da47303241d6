"""The paper's labellers at their own sizes with random weights, saved as public ones are: for bench.labels, where none are at hand."""

import json
from pathlib import Path
from typing import Any


def make_networks(folder: Path, labels: tuple[str, ...], seed: int = 0) -> None:
    """Write `folder/{label}/` with config.json and model.safetensors of each network.

    Args:
        labels: of depth, normal, semseg, det, clip and vitdet (which needs detectron2).
    """
    import torch

    for number, label in enumerate(labels):
        torch.manual_seed(seed + number)
        _MAKERS[label](folder / label)


def _dpt(channels: int) -> Any:
    def make(folder: Path) -> None:
        from fourmill.pseudolabel import dpt
        from fourmill.pseudolabel.omnidata import omnidata_config

        network = dpt.model_class(channels)(omnidata_config()).eval()
        dpt._tune(network)
        network.save_pretrained(folder)

    return make


def _mask2former(folder: Path) -> None:
    from transformers import Mask2FormerConfig, SwinConfig

    from fourmill.core.coco import COCO_PANOPTIC
    from fourmill.pseudolabel import mask2former

    swin: dict[str, Any] = {"image_size": 384, "embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}
    swin |= {"window_size": 12, "drop_path_rate": 0.3, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    names = {"id2label": dict(enumerate(COCO_PANOPTIC)), "label2id": {name: i for i, name in enumerate(COCO_PANOPTIC)}}
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(**swin), num_queries=100, **names
    )  # the rest is the public one's
    network = mask2former.model_class()(config).eval()
    mask2former._tune(network)
    network.save_pretrained(folder)


def _detector(folder: Path) -> None:
    from transformers import RTDetrV2Config, RTDetrV2ForObjectDetection

    from fourmill.core.coco import COCO_THINGS
    from fourmill.pseudolabel import detector
    from fourmill.pseudolabel.config import DetectorConfig

    names = {"id2label": dict(enumerate(COCO_THINGS)), "label2id": {name: i for i, name in enumerate(COCO_THINGS)}}
    network = RTDetrV2ForObjectDetection(RTDetrV2Config(**names)).eval()  # a ResNet-50 backbone, as r50vd
    detector._tune(network, DetectorConfig(weights="seeded:0"))
    network.save_pretrained(folder)


def _clip(folder: Path) -> None:
    from transformers import CLIPVisionConfig

    from fourmill.pseudolabel import clip

    config = CLIPVisionConfig(image_size=224, patch_size=16, projection_dim=512)  # the rest is ViT-B, the default
    clip.model_class()(config).save_pretrained(folder)


def _vitdet(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from fourmill.pseudolabel.vitdet import build
    from fourmill.pseudolabel.vitdet_keys import VitDetArchitecture

    architecture = VitDetArchitecture()
    model = build(architecture)
    for predictor in model.roi_heads.box_predictor:  # so that boxes are found, as in photographs, and not none
        torch.nn.init.normal_(predictor.cls_score.weight, std=0.3)
    folder.mkdir(parents=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(architecture.model_dump(mode="json")))


_MAKERS = {
    "depth": _dpt(1),
    "normal": _dpt(3),
    "semseg": _mask2former,
    "det": _detector,
    "clip": _clip,
    "vitdet": _vitdet,
}
