"""Omnidata's DPT-Hybrid files in transformers' terms: which of their keys is which of ours, at any width and depth.

The authors' Lightning checkpoints have `model.` before every key, the mirrors have not. The unused ImageNet classifier
(`pretrained.model.head`) is left behind; every other key must be there, in the shape that the architecture gives it.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fourmill.core.weights import Shape, key_problems, shapes, shown_problems
from fourmill.pseudolabel.dpt import model_class
from fourmill.pseudolabel.labeller import NetworkError

_LIGHTNING = "model."
_UNUSED = "pretrained.model.head."
_BIT, _STEM = "dpt.embeddings.backbone.bit.", "pretrained.model.patch_embed.backbone."
_LAYER, _BLOCK = r"dpt\.encoder\.layer\.(\d+)\.", r"pretrained.model.blocks.\1."

_NAMES: tuple[tuple[str, str], ...] = (
    (r"dpt\.embeddings\.cls_token", "pretrained.model.cls_token"),
    (r"dpt\.embeddings\.position_embeddings", "pretrained.model.pos_embed"),
    (r"dpt\.embeddings\.projection\.", "pretrained.model.patch_embed.proj."),
    (re.escape(_BIT) + r"embedder\.convolution\.", f"{_STEM}stem.conv."),
    (re.escape(_BIT) + r"embedder\.norm\.", f"{_STEM}stem.norm."),
    (re.escape(_BIT) + r"encoder\.stages\.(\d+)\.layers\.(\d+)\.", _STEM + r"stages.\1.blocks.\2."),
    (_LAYER + r"layernorm_before\.", _BLOCK + "norm1."),
    (_LAYER + r"layernorm_after\.", _BLOCK + "norm2."),
    (_LAYER + r"attention\.attention\.(?:query|key|value)\.", _BLOCK + "attn.qkv."),
    (_LAYER + r"attention\.output\.dense\.", _BLOCK + "attn.proj."),
    (_LAYER + r"intermediate\.dense\.", _BLOCK + "mlp.fc1."),
    (_LAYER + r"output\.dense\.", _BLOCK + "mlp.fc2."),
    (r"dpt\.layernorm\.", "pretrained.model.norm."),
    (r"neck\.reassemble_stage\.readout_projects\.2\.0\.", "pretrained.act_postprocess3.0.project.0."),
    (r"neck\.reassemble_stage\.readout_projects\.3\.0\.", "pretrained.act_postprocess4.0.project.0."),
    (r"neck\.reassemble_stage\.layers\.2\.projection\.", "pretrained.act_postprocess3.3."),
    (r"neck\.reassemble_stage\.layers\.3\.projection\.", "pretrained.act_postprocess4.3."),
    (r"neck\.reassemble_stage\.layers\.3\.resize\.", "pretrained.act_postprocess4.4."),
    *((rf"neck\.convs\.{k}\.", f"scratch.layer{k + 1}_rn.") for k in range(4)),
    *((rf"neck\.fusion_stage\.layers\.{k}\.projection\.", f"scratch.refinenet{4 - k}.out_conv.") for k in range(4)),
    *(
        (
            rf"neck\.fusion_stage\.layers\.{k}\.residual_layer(\d)\.convolution(\d)\.",
            rf"scratch.refinenet{4 - k}.resConfUnit\1.conv\2.",
        )
        for k in range(4)
    ),
    (r"head\.head\.", "scratch.output_conv."),
)
"""transformers' name to Omnidata's, by the beginning of the key."""

_THIRDS = {"query": 0, "key": 1, "value": 2}  # of the fused projection's rows


def omnidata_config() -> Any:
    """The architecture of the public files: a ResNet stem, then a ViT-B."""
    from transformers import DPTConfig

    return DPTConfig(
        is_hybrid=True,
        image_size=384,
        layer_norm_eps=1e-6,  # timm's, which the weights were trained with
        readout_type="project",
        backbone_out_indices=[2, 5, 8, 11],
        neck_hidden_sizes=[256, 512, 768, 768],
        reassemble_factors=[1, 1, 1, 0.5],
        neck_ignore_stages=[0, 1],
        backbone_featmap_shape=[1, 1024, 24, 24],
        fusion_hidden_size=256,
    )


def from_omnidata(state: Mapping[str, Tensor], channels: int, config: Any, where: str) -> nn.Module:
    """Transformers' network with the weights of an Omnidata file.

    Args:
        state: what the file holds, with or without Lightning's prefix.
        channels: of the head: 1 for depth, 3 for normals.
        config: the architecture, `omnidata_config()` for the public files.
        where: the file, for errors.

    Raises:
        NetworkError: a key is missing, unknown, or of another shape; by its name in the file.
    """
    prefix = _LIGHTNING if all(key.startswith(_LIGHTNING) for key in state) else ""
    found = {key.removeprefix(prefix): value for key, value in state.items()}
    found = {key: value for key, value in found.items() if not key.startswith(_UNUSED)}
    with torch.random.fork_rng(devices=[]):
        network = model_class(channels)(config).eval()
    ours = network.state_dict()
    expected = {original_name(key): _file_shape(key, shape) for key, shape in shapes(ours).items()}
    problems = key_problems(found, expected)
    if problems:
        raise NetworkError(f"{where} does not fit Omnidata's DPT-Hybrid: {shown_problems(problems)}")
    network.load_state_dict({key: _part(key, found[original_name(key)]).float() for key in ours})
    return network


def to_omnidata(network: nn.Module) -> dict[str, Tensor]:
    """A network's weights under Omnidata's names: the inverse, for files in the original layout."""
    made: dict[str, Tensor] = {}
    for key, value in network.state_dict().items():
        name, third = original_name(key), _third(key)
        if third is None:
            made[name] = value
        else:
            made[name] = torch.cat([made[name], value]) if third else value
    return made


def original_name(key: str) -> str:
    """Omnidata's name of one of transformers' keys; of the fused projection for queries, keys and values."""
    for pattern, name in _NAMES:
        match = re.match(pattern, key)
        if match:
            return match.expand(name) + key[match.end() :]
    raise NetworkError(
        f"transformers' DPT has a key {key} that Omnidata's files have no name for: another version of it?"
    )


def _third(key: str) -> int | None:
    match = re.match(_LAYER + r"attention\.attention\.(query|key|value)\.", key)
    return _THIRDS[match[2]] if match else None


def _file_shape(key: str, shape: Shape) -> Shape:
    return shape if _third(key) is None else (3 * shape[0], *shape[1:])


def _part(key: str, value: Tensor) -> Tensor:
    third = _third(key)
    return value if third is None else value.chunk(3)[third]
