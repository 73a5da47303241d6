"""Which labeller makes a label, and from which weights. No torch: definitions load this.

Weights are a folder as `save_pretrained` writes it, or `seeded:7`: a tiny network of the same architecture with random
weights, good for trying the chain on any images and for nothing else, so it is only ever chosen by name.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from hashlib import file_digest
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, SerializeAsAny, Tag

from fourmill.core.digest import digest_config, digest_json
from fourmill.core.scene import SCENE_VERSION
from fourmill.pseudolabel.format import OwnConfig
from fourmill.pseudolabel.members import OWN, own_config, own_label

VERSION = "1"  # of what labellers make of the same image, weights and config

_NETWORK_OF = {"depth": "dpt", "normal": "dpt", "semseg": "mask2former", "det": "detector", "clip": "clip"}
"""The kind of network behind each label."""

Side = Annotated[int, Field(gt=0, multiple_of=32)]
Weights = Annotated[
    str,
    Field(
        min_length=1,
        description="Folder with config.json and model.safetensors (or pytorch_model.bin), or seeded:N for a tiny random "
        "network.",
    ),
]
BatchSize = Annotated[int, Field(gt=0, description="Images that go through the network at once.")]
Colour = tuple[float, float, float]

IMAGENET_MEAN: Colour = (0.485, 0.456, 0.406)
IMAGENET_STD: Colour = (0.229, 0.224, 0.225)


class WeightsMissingError(ValueError):
    """No network where the config says; names the folder and the choices."""


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SceneConfig(_Config):
    """Exact labels of the demo's generated scenes, from the description in each file; refuses any other image."""

    kind: Literal["scene"] = "scene"
    batch_size: BatchSize = 32


class DptConfig(_Config):
    """Depth or normals by Omnidata's DPT-Hybrid (4M, appendix B.1)."""

    kind: Literal["dpt"] = "dpt"
    weights: Weights
    longer_px: Side = Field(
        default=736, description="Largest side fed: both sides go to the closest multiple of 32, the longer below 768."
    )
    batch_size: BatchSize = 8


class Mask2FormerConfig(_Config):
    """COCO panoptic classes by Mask2Former with a Swin backbone (4M, appendix B.1)."""

    kind: Literal["mask2former"] = "mask2former"
    weights: Weights
    shorter_px: Annotated[int, Field(gt=0, description="The shorter side is resized to this.")] = 800
    longer_px: Annotated[int, Field(gt=0, description="Bound on the longer side; it wins.")] = 1333
    mean: Colour = Field(default=IMAGENET_MEAN, description="Subtracted from RGB in [0, 1].")
    std: Colour = Field(default=IMAGENET_STD, description="Then divided by.")
    batch_size: BatchSize = 2


class DetectorConfig(_Config):
    """Boxes of COCO's 80 things by a detector of the DETR family (RT-DETRv2 or D-FINE)."""

    kind: Literal["detector"] = "detector"
    weights: Weights
    input_px: Side = Field(default=640, description="Images are squashed to a square of this side.")
    mean: Colour = Field(
        default=(0.0, 0.0, 0.0), description="Subtracted from RGB in [0, 1]; RT-DETR and D-FINE: none."
    )
    std: Colour = Field(default=(1.0, 1.0, 1.0), description="Then divided by.")
    score_threshold: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.6, description="Boxes below it are dropped. 4M's 0.6 is for ViTDet; every detector has its own scale."
    )
    max_boxes: Annotated[int, Field(gt=0)] = Field(
        default=100, description="Boxes kept for an image, the surest first."
    )
    batch_size: BatchSize = 8


class ClipConfig(_Config):
    """Dense CLIP features of crops; computed on the way to tokens, never stored."""

    kind: Literal["clip"] = "clip"
    weights: Weights
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


NetworkConfig = SceneConfig | DptConfig | Mask2FormerConfig | DetectorConfig | ClipConfig
AnyLabellerConfig = NetworkConfig | OwnConfig


def _table_of(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
    return "own" if kind in {own.config.model_fields["kind"].default for own in OWN.values()} else "network"


LabellerConfig = Annotated[
    Annotated[NetworkConfig, Field(discriminator="kind"), Tag("network")]
    | Annotated[SerializeAsAny[OwnConfig], BeforeValidator(own_config), Tag("own")],
    Discriminator(_table_of),
]
"""A labeller of a project file: one of 4M's, or of `members.OWN`."""


def seed_of(weights: str) -> int | None:
    """7 for `seeded:7`; None for a folder.

    Raises:
        ValueError: `seeded` without a whole number.
    """
    name, _, seed = weights.partition(":")
    if name != "seeded":
        return None
    if not seed.isdecimal():
        raise ValueError(f"weights {weights!r}: write seeded:N with a whole number, such as seeded:0")
    return int(seed)


def weights_digest(config: AnyLabellerConfig) -> str:
    """Digest of the network's weights: of every file of a folder, of seed and version of a seeded one. 64 hex digits.

    A folder that is missing has a digest too, so that definitions load; `require_weights` says what to do about it.
    """
    if isinstance(config, OwnConfig):
        return config.weights_digest
    if isinstance(config, SceneConfig):
        return digest_json(["scene", SCENE_VERSION])
    if seed_of(config.weights) is not None:
        return digest_json(["seeded", VERSION, config_digest(config), config.weights])
    return _folder_digest(config.weights, _stats(Path(config.weights)))


def config_digest(config: AnyLabellerConfig) -> str:
    """Digest of the settings that a label depends on: not where the weights lie, and not the size of batches."""
    return digest_config(config, exclude={"weights", "batch_size"})


def label_version(config: AnyLabellerConfig) -> str:
    """Version of what a labeller makes of the same image, weights and config."""
    return OWN[own_label(config)].version if isinstance(config, OwnConfig) else VERSION


def require_weights(label: str, config: AnyLabellerConfig) -> None:
    """Make sure that a labeller can be made, before any work starts.

    Raises:
        ValueError: the config's network does not make this label.
        WeightsMissingError: there is no network in the folder.
    """
    if isinstance(config, OwnConfig):
        if own_label(config) != label:
            raise ValueError(f"a {config.kind} labeller does not make {label}; it makes {own_label(config)}")
        config.require()
        return
    kind = _NETWORK_OF.get(label)
    if kind is None or config.kind not in ((kind,) if label == "clip" else ("scene", kind)):
        raise ValueError(f"a {config.kind} labeller does not make {label}; labels are made by {_NETWORK_OF}")
    if isinstance(config, SceneConfig) or seed_of(config.weights) is not None:
        return
    folder = Path(config.weights)
    if not (folder / "config.json").is_file():
        found = "a file" if folder.is_file() else "a folder without config.json" if folder.is_dir() else "nothing"
        raise WeightsMissingError(
            f"{label} labeller: {found} at {folder}, expected a folder with config.json and model.safetensors of a "
            f"{config.kind} network (as transformers' save_pretrained writes it). Put it there, or choose --labellers "
            "seeded to try the chain with tiny random networks"
        )


def feature_dim(config: AnyLabellerConfig) -> int:
    """Channels of the features of a CLIP labeller. Raises ValueError for any other."""
    if not isinstance(config, ClipConfig):
        raise ValueError(f"a {config.kind} labeller makes labels, not features; the clip labeller does")
    return config.channels


def demo_labellers() -> dict[str, LabellerConfig]:
    """The demo's: exact labels of generated scenes, and a tiny seeded CLIP of 8x8x64 features for 64-pixel crops."""
    return {**{label: SceneConfig() for label in ("depth", "normal", "semseg", "det")}, "clip": _demo_clip("seeded:0")}


def paper_labellers(folder: Path) -> dict[str, LabellerConfig]:
    """The paper's networks and sizes (appendix B.1), each in the folder of its label; the detector is a transformers one."""
    return {
        "depth": DptConfig(weights=str(folder / "depth")),
        "normal": DptConfig(weights=str(folder / "normal")),
        "semseg": Mask2FormerConfig(weights=str(folder / "semseg")),
        "det": DetectorConfig(weights=str(folder / "det")),
        "clip": ClipConfig(weights=str(folder / "clip")),
    }


def seeded_labellers(seed: int = 0) -> dict[str, LabellerConfig]:
    """Tiny random networks at small sizes: labels of no meaning, for any image, in some milliseconds each."""
    weights = f"seeded:{seed}"
    return {
        "depth": DptConfig(weights=weights, longer_px=256),
        "normal": DptConfig(weights=weights, longer_px=256),
        "semseg": Mask2FormerConfig(weights=weights, shorter_px=128, longer_px=256),
        "det": DetectorConfig(weights=weights, input_px=160),
        "clip": _demo_clip(weights),
    }


def labellers_from(choice: str, grid: int = 8) -> dict[str, LabellerConfig]:
    """The labellers behind `--labellers`: `scene`, `seeded`, `seeded:N`, or a folder with one network a label.

    Args:
        choice: what was written on the command line.
        grid: tokens along a side of a crop; a CLIP network from a folder gets crops of as many of its own patches.

    Raises:
        WeightsMissingError: the folder, or one of depth/, normal/, semseg/, det/, clip/ in it, is not there.
    """
    if choice == "scene":
        return demo_labellers()
    if choice == "seeded":
        return seeded_labellers()
    seed = seed_of(choice)
    if seed is not None:
        return seeded_labellers(seed)
    made = paper_labellers(Path(choice).expanduser().resolve())
    for label, config in made.items():
        require_weights(label, config)
    return {**made, "clip": _clip_of(Path(choice).expanduser().resolve() / "clip", grid)}


def _demo_clip(weights: str) -> ClipConfig:
    return ClipConfig(weights=weights, patch_px=8, channels=64)


def _clip_of(folder: Path, grid: int) -> ClipConfig:
    facts = json.loads((folder / "config.json").read_text())
    vision = facts.get("vision_config", facts)  # a whole CLIP model nests it
    patch_px, channels = vision.get("patch_size"), vision.get("projection_dim", facts.get("projection_dim"))
    if not isinstance(patch_px, int) or not isinstance(channels, int):
        raise WeightsMissingError(
            f"clip labeller: {folder / 'config.json'} gives patch_size {patch_px} and projection_dim {channels}; expected "
            "the config of a CLIPVisionModelWithProjection"
        )
    return ClipConfig(weights=str(folder), input_px=grid * patch_px, patch_px=patch_px, channels=channels)


def _stats(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of every file, so that a digest is computed again only when one of them may have changed."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    kept = [(p, p.stat()) for p in files if not p.relative_to(folder).as_posix().startswith(".")]
    return tuple((p.relative_to(folder).as_posix(), s.st_size, s.st_mtime_ns) for p, s in kept)


@lru_cache(maxsize=64)
def _folder_digest(folder: str, stats: tuple[tuple[str, int, int], ...]) -> str:
    files: dict[str, str] = {}
    for name, _, _ in stats:
        with (Path(folder) / name).open("rb") as file:
            files[name] = file_digest(file, "sha256").hexdigest()
    return digest_json(["files", files])
