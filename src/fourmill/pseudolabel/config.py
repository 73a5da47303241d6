"""Which labeller makes a label, and from which weights. No torch: definitions load this.

Weights are `stored:depth/DIGEST`, once `fourmill weights add` has put them into the store; a folder as `save_pretrained`
writes it; or `seeded:7`: a tiny network of the same architecture with random weights, good for trying the chain on any
images and for nothing else, so it is only ever chosen by name.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, SerializeAsAny, Tag

from fourmill.core.digest import digest_config, digest_json
from fourmill.core.imagenet import IMAGENET_MEAN, IMAGENET_STD
from fourmill.core.scene import SCENE_VERSION
from fourmill.core.sequences import MIN_SCORE
from fourmill.pseudolabel.folders import TRANSFORMERS_FILES
from fourmill.pseudolabel.format import OwnConfig
from fourmill.pseudolabel.members import OWN, own_config, own_label
from fourmill.pseudolabel.stored import (
    WEIGHTS_FILE,
    Weights,
    named_digest,
    seed_of,
)

# Of what labellers make of the same image, weights and config.
VERSION = "1"
MASK2FORMER_VERSION = "2"
VITDET_VERSION = "2"

DETECTORS = (
    "conditional_detr",
    "d_fine",
    "dab-detr",
    "deformable_detr",
    "deimv2",
    "detr",
    "lw_detr",
    "rf_detr",
    "rt_detr",
    "rt_detr_v2",
    "table-transformer",
    "yolos",
)
"""Kinds of network behind transformers' AutoModelForObjectDetection, as their config.json says."""

Side = Annotated[int, Field(gt=0, multiple_of=32)]
BatchSize = Annotated[int, Field(gt=0, description="Images that go through the network at once.")]
Colour = tuple[float, float, float]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NetworkSettings(_Config):
    """How any network is run. All of it can change labels a little, so all of it is part of their version."""

    labels: ClassVar[tuple[str, ...]]  # that it can make
    version: ClassVar[str] = VERSION
    model_types: ClassVar[tuple[str, ...]] = ()  # one of which config.json says; any, where there are none
    weight_files: ClassVar[tuple[str, ...]] = TRANSFORMERS_FILES  # one of which its folder holds

    weights: Weights
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32",
        description="What the network computes in, where that is safe; its inputs and what becomes of its outputs stay float32. "
        "Bounds on the difference to fp32 that tests/pseudolabel/test_precision.py holds on random networks: depth 0.01 of its range on "
        "average, normals 0.02 a component, classes of 15 % of pixels (near ties), 85 % of boxes found again within 0.03 of the "
        "image (ViTDet: 70 %) and half of those within 0.01, CLIP features 3 %.",
    )
    channels_last: bool = Field(
        default=False,
        description="Keep images with their channels last in memory; other kernels, so depth to within 0.001 and 1 % of "
        "classes.",
    )
    compile_backend: str | None = Field(
        default=None,
        description="torch.compile's backend, such as inductor; None: not compiled. Labels are those of the same precision "
        "uncompiled to within 1e-4 of their range, and 0.1 % of classes.",
    )


class SceneConfig(_Config):
    """Exact labels of the demo's generated scenes, from the description in each file; refuses any other image."""

    labels: ClassVar[tuple[str, ...]] = ("depth", "normal", "semseg", "det")
    version: ClassVar[str] = VERSION

    kind: Literal["scene"] = "scene"
    batch_size: BatchSize = 32


class DptConfig(NetworkSettings):
    """Depth or normals by Omnidata's DPT-Hybrid (4M, appendix B.1)."""

    labels = ("depth", "normal")
    model_types = ("dpt",)

    kind: Literal["dpt"] = "dpt"
    longer_px: Side = Field(
        default=736, description="Largest side fed: both sides go to the closest multiple of 32, the longer below 768."
    )
    batch_size: BatchSize = 8


class Mask2FormerConfig(NetworkSettings):
    """COCO panoptic classes by Mask2Former with a Swin backbone (4M, appendix B.1)."""

    labels = ("semseg",)
    version = MASK2FORMER_VERSION
    model_types = ("mask2former",)

    kind: Literal["mask2former"] = "mask2former"
    shorter_px: Annotated[int, Field(gt=0, description="The shorter side is resized to this.")] = 800
    longer_px: Annotated[int, Field(gt=0, description="Bound on the longer side; it wins.")] = 1333
    mean: Colour = Field(default=IMAGENET_MEAN, description="Subtracted from RGB in [0, 1].")
    std: Colour = Field(default=IMAGENET_STD, description="Then divided by.")
    batch_size: BatchSize = 2


class DetectorConfig(NetworkSettings):
    """Boxes of COCO's 80 things by a detector of the DETR family.

    The defaults are those of RT-DETR, RT-DETRv2 and D-FINE; for other kinds threshold, size and colours are to be set.
    """

    labels = ("det",)
    model_types = DETECTORS

    kind: Literal["detector"] = "detector"
    input_px: Side = Field(default=640, description="Images are squashed to a square of this side.")
    mean: Colour = Field(
        default=(0.0, 0.0, 0.0), description="Subtracted from RGB in [0, 1]; RT-DETR and D-FINE: none."
    )
    std: Colour = Field(default=(1.0, 1.0, 1.0), description="Then divided by.")
    score_threshold: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None,
        description="Boxes below it are dropped; None: `detector.THRESHOLDS` of its kind. Every detector has a scale of its "
        "own, so stored scores are moved onto ViTDet's: the threshold becomes 4M's 0.6.",
    )
    max_boxes: Annotated[int, Field(gt=0)] = Field(
        default=100, description="Boxes kept for an image, the surest first."
    )
    batch_size: BatchSize = 8


class VitDetConfig(NetworkSettings):
    """Boxes of COCO's 80 things by ViTDet ViT-H with a cascade (4M, appendix B.1), through detectron2.

    detectron2 cannot live beside Dagster; its Python is named by `ray.stages["labels/det"].runtime_env` (infra/detectron2).
    """

    labels = ("det",)
    version = VITDET_VERSION
    model_types = ("vitdet",)
    weight_files = (WEIGHTS_FILE,)

    kind: Literal["vitdet"] = "vitdet"
    score_threshold: Annotated[float, Field(ge=0.05, le=1)] = Field(
        default=MIN_SCORE, description="Boxes below it are dropped; the network itself gives none below 0.05."
    )
    batch_size: BatchSize = 4


class ClipConfig(NetworkSettings):
    """Dense CLIP features of crops; computed on the way to tokens, never stored."""

    labels = ("clip",)
    model_types = ("clip", "clip_vision_model")

    kind: Literal["clip"] = "clip"
    input_px: Annotated[int, Field(gt=0)] | None = Field(
        default=None, description="Crops are resized to this side; by default they are fed as they come."
    )
    patch_px: Annotated[int, Field(gt=0)] = Field(default=16, description="Side of a patch; weights must agree.")
    channels: Annotated[int, Field(gt=0)] = Field(default=512, description="Channels of a feature; weights must agree.")
    mean: Colour = Field(
        default=IMAGENET_MEAN,
        description="Subtracted from RGB in [0, 1]. ImageNet's, as 4M's CLIP tokenizer was trained with, not CLIP's own.",
    )
    std: Colour = Field(default=IMAGENET_STD, description="Then divided by.")
    batch_size: BatchSize = 32


NetworkConfig = SceneConfig | DptConfig | Mask2FormerConfig | DetectorConfig | VitDetConfig | ClipConfig
AnyLabellerConfig = NetworkConfig | OwnConfig


def _kinds(configs: Iterable[type[BaseModel]]) -> list[str]:
    return [str(config.model_fields["kind"].default) for config in configs]


def _own_kinds() -> list[str]:
    return _kinds(own.config for own in OWN.values())


def _kind(value: Any) -> Any:
    return value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)


def _of_known_kind(value: Any) -> Any:
    known = [*_kinds(get_args(NetworkConfig)), *_own_kinds()]
    if _kind(value) not in known:
        raise ValueError(f"no labeller is of the kind {_kind(value)!r}; kinds are {', '.join(known)}")
    return value


LabellerConfig = Annotated[
    Annotated[NetworkConfig, Field(discriminator="kind"), Tag("network")]
    | Annotated[SerializeAsAny[OwnConfig], BeforeValidator(own_config), Tag("own")],
    Discriminator(lambda value: "own" if _kind(value) in _own_kinds() else "network"),
    BeforeValidator(_of_known_kind),
]
"""A labeller of a project file: one of 4M's, or of `members.OWN`."""


def weights_digest(config: AnyLabellerConfig) -> str:
    """Digest of the network's weights: of every file of a folder, of seed and version of a seeded one. 64 hex digits.

    Weights that are missing have a digest too, so that definitions load; `named_weights.require_weights` says what to do.
    """
    if isinstance(config, OwnConfig):
        return config.weights_digest
    if isinstance(config, SceneConfig):
        return digest_json(["scene", SCENE_VERSION])
    if seed_of(config.weights) is not None:
        return digest_json(["seeded", VERSION, config_digest(config), config.weights])
    return named_digest(config.weights)


def config_digest(config: AnyLabellerConfig) -> str:
    """Digest of the settings that a label depends on: not where the weights lie, and not the size of batches."""
    return digest_config(config, exclude={"weights", "batch_size"})


def label_version(config: AnyLabellerConfig) -> str:
    """Which labeller, and the version of what it makes of the same image, weights and config: `vitdet-2`."""
    if isinstance(config, OwnConfig):
        return f"{config.kind}-{OWN[own_label(config)].version}"
    return f"{config.kind}-{config.version}"


def feature_dim(config: AnyLabellerConfig) -> int:
    """Channels of the features of a CLIP labeller. Raises ValueError for any other."""
    if not isinstance(config, ClipConfig):
        raise ValueError(f"a {config.kind} labeller makes labels, not features; the clip labeller does")
    return config.channels
