"""ViTDet's architecture, and the keys and shapes of its weights: known without detectron2, so that files can be checked.

The names are detectron2's own: a ViT with windowed attention and relative positions, a simple feature pyramid, a proposal
network of two convolutions, three box heads in cascade. The mask head, which 4M does not use, is left out.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fourmill.core.weights import Shape, key_problems, shown_problems
from fourmill.pseudolabel.labeller import NetworkError
from fourmill.pseudolabel.stored import CONFIG_FILE, WeightsMissingError, add_command

MASK_HEAD = "roi_heads.mask_head."
_PRETRAIN_POSITIONS = 197  # of MAE's 224-pixel images, and their CLS token
_PATCH, _MLP, _POOLED, _ANCHORS, _STAGES = 16, 4, 7, 3, 3

Positive = Annotated[int, Field(gt=0)]


class VitDetArchitecture(BaseModel):
    """ViT-H as the paper's; kept as config.json beside the weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: Literal["vitdet"] = "vitdet"
    image_px: Annotated[int, Field(gt=0, multiple_of=64)] = Field(
        default=1024, description="Images are resized to this on the longer side, and padded to a square of it."
    )
    embed_dim: Positive = 1280
    depth: Positive = 32
    num_heads: Positive = 16
    window_size: Positive = Field(default=14, description="Side of an attention window, in patches.")
    global_blocks: tuple[int, ...] = Field(default=(7, 15, 23, 31), description="Blocks that attend to everything.")
    channels: Positive = Field(default=256, description="Of the feature pyramid and the heads' convolutions.")
    box_dim: Positive = Field(default=1024, description="Of the boxes' fully connected layer.")
    num_classes: Literal[80] = Field(default=80, description="COCO's things, in COCO-80 order.")


def read_architecture(folder: Path) -> VitDetArchitecture:
    """The architecture beside the weights.

    Raises:
        WeightsMissingError: there is none, or it is another network's.
    """
    try:
        return VitDetArchitecture.model_validate_json((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise WeightsMissingError(
            f"det labeller: {folder / CONFIG_FILE} is not ViTDet's ({error}); put the weights into the store with "
            f"`{add_command('vitdet')}`"
        ) from error


def check_vitdet(found: Mapping[str, Any], architecture: VitDetArchitecture, where: str) -> None:
    """See that weights are exactly those of an architecture.

    Raises:
        NetworkError: a key is missing, unknown, or of another shape.
    """
    problems = key_problems(found, vitdet_shapes(architecture))
    if problems:
        raise NetworkError(f"{where} does not fit ViTDet without its mask head: {shown_problems(problems)}")


def vitdet_shapes(architecture: VitDetArchitecture) -> dict[str, Shape]:
    """Shape by key."""
    return dict(_all(architecture))


def _all(a: VitDetArchitecture) -> Iterator[tuple[str, Shape]]:
    yield from _pyramid(a)
    net = "backbone.net."
    yield f"{net}pos_embed", (1, _PRETRAIN_POSITIONS, a.embed_dim)
    yield from _affine(f"{net}patch_embed.proj", (a.embed_dim, 3, _PATCH, _PATCH))
    for block in range(a.depth):
        yield from _block(a, f"{net}blocks.{block}.", block in a.global_blocks)
    rpn = "proposal_generator.rpn_head."
    for conv in range(2):
        yield from _affine(f"{rpn}conv.conv{conv}", (a.channels, a.channels, 3, 3))
    yield from _affine(f"{rpn}objectness_logits", (_ANCHORS, a.channels, 1, 1))
    yield from _affine(f"{rpn}anchor_deltas", (4 * _ANCHORS, a.channels, 1, 1))
    for stage in range(_STAGES):
        yield from _box_stage(a, stage)


def _block(a: VitDetArchitecture, prefix: str, is_global: bool) -> Iterator[tuple[str, Shape]]:
    dim, span = a.embed_dim, a.image_px // _PATCH if is_global else a.window_size
    for norm in ("norm1", "norm2"):
        yield from _affine(f"{prefix}{norm}", (dim,))
    for axis in "hw":
        yield f"{prefix}attn.rel_pos_{axis}", (2 * span - 1, dim // a.num_heads)
    for name, shape in (("attn.qkv", (3 * dim, dim)), ("attn.proj", (dim, dim))):
        yield from _affine(prefix + name, shape)
    for name, shape in (("mlp.fc1", (_MLP * dim, dim)), ("mlp.fc2", (dim, _MLP * dim))):
        yield from _affine(prefix + name, shape)


def _pyramid(a: VitDetArchitecture) -> Iterator[tuple[str, Shape]]:
    """Four maps of one: enlarged four and two times, as it is, and halved; `simfp_2` to `simfp_5`."""
    dim, half, quarter = a.embed_dim, a.embed_dim // 2, a.embed_dim // 4
    yield "backbone.simfp_2.0.weight", (dim, half, 2, 2)  # transposed: inputs first
    yield "backbone.simfp_2.0.bias", (half,)
    yield from _affine("backbone.simfp_2.1", (half,))
    yield "backbone.simfp_2.3.weight", (half, quarter, 2, 2)
    yield "backbone.simfp_2.3.bias", (quarter,)
    yield "backbone.simfp_3.0.weight", (dim, half, 2, 2)
    yield "backbone.simfp_3.0.bias", (half,)
    for level, first, inputs in ((2, 4, quarter), (3, 1, half), (4, 0, dim), (5, 1, dim)):
        yield from _normed(f"backbone.simfp_{level}.{first}", (a.channels, inputs, 1, 1))
        yield from _normed(f"backbone.simfp_{level}.{first + 1}", (a.channels, a.channels, 3, 3))


def _box_stage(a: VitDetArchitecture, stage: int) -> Iterator[tuple[str, Shape]]:
    head, predictor = f"roi_heads.box_head.{stage}.", f"roi_heads.box_predictor.{stage}."
    for conv in range(1, 5):
        yield from _normed(f"{head}conv{conv}", (a.channels, a.channels, 3, 3))
    yield from _affine(f"{head}fc1", (a.box_dim, a.channels * _POOLED * _POOLED))
    yield from _affine(f"{predictor}cls_score", (a.num_classes + 1, a.box_dim))
    yield from _affine(f"{predictor}bbox_pred", (4, a.box_dim))


def _affine(name: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _normed(name: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    """A convolution without offset, and the norm after it."""
    yield f"{name}.weight", shape
    yield from _affine(f"{name}.norm", shape[:1])
