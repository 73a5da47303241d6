"""Configs of the public 4M's image tokenizers (`VQVAE`, `DiVAE`) read as ours, and ours written as theirs. No torch.

What this project's networks would not compute alike is refused by name, with the value that is supported. What only
training or sampling uses (`sync_codebook`, `scheduler`, dropout of the conditioning) is passed over, as are keys that the
public code does not know either. A config that leaves a key out means the public code's default, not ours.
"""

import ast
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fourmill.tokenize.config import (
    CLASS_CHANNELS,
    NUM_CLASS_ROWS,
    DiffusionDecoderConfig,
    EncoderConfig,
    ImageLabel,
    ImageTokenizerConfig,
    QuantizerConfig,
    VitDecoderConfig,
)
from fourmill.tokenize.presets import paper_tokenizers

OURS = "fourmill"  # a key of our exports that the public code passes over: what it has no word for
Positive = Annotated[int, Field(gt=0)]
_VITS = {"s": (512, 8, 8), "b": (768, 12, 12), "l": (1024, 24, 16)}  # width, blocks, heads of the public sizes
_VIT = re.compile(r"(?P<kind>vit|patch)_w(?P<width>\d+)_d(?P<depth>\d+)_h(?P<heads>\d+)_(?:enc|dec)")
_UNET = re.compile(
    r"unet_patched_p(?P<patch>\d+)_c(?P<channels>\d+)_m(?P<multipliers>\d+(?:-\d+)*)_r(?P<blocks>\d+)_a(?P<levels>(?:\d+(?:-\d+)*)?)"
)
_ONLY = {
    "quant_type": "lucid",
    "num_codebooks": 1,
    "norm_codes": True,
    "norm_latents": False,
    "undo_std": False,
    "post_mlp": True,
}
_ONLY_PLAIN = {"out_conv": False}
_ONLY_DIFFUSION = {"beta_schedule": "linear", "prediction_type": "sample", "zero_terminal_snr": True}
# Arguments of the public training program -> fields of the classes; a file of weights with `args` has the former.
_RENAMED = {
    "quantizer_type": "quant_type",
    "encoder_type": "enc_type",
    "decoder_type": "dec_type",
    "input_size_max": "image_size",
    "input_size": "image_size",
    "input_size_enc": "image_size_enc",
    "input_size_dec": "image_size_dec",
    "quantizer_ema_decay": "ema_decay",
}


class PublicConfigError(ValueError):
    """A public tokenizer's config that this project has no network for; every such value is named."""


class PublicConfig(BaseModel):
    """Arguments of the public classes that decide what a tokenizer computes, with their defaults."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    image_size: Positive = 224
    image_size_enc: Positive | None = None
    image_size_dec: Positive | None = None
    n_channels: Positive = 3
    n_labels: Positive | None = None
    enc_type: str = "vit_b_enc"
    dec_type: str = Field(description="The classes' own default is of the class, which the file of weights tells.")
    patch_proj: bool = True
    post_mlp: bool = False
    patch_size: Positive = 16
    patch_size_dec: Positive | None = None
    quant_type: str = "lucid"
    codebook_size: Positive = 16384
    num_codebooks: int = 1
    latent_dim: Positive = 32
    norm_codes: bool = True
    norm_latents: bool = False
    ema_decay: float = 0.99
    commitment_weight: float = 1.0
    kmeans_init: bool = False
    undo_std: bool = False
    out_conv: bool = False
    num_train_timesteps: Positive = 1000
    beta_schedule: str = "squaredcos_cap_v2"
    prediction_type: str = "v_prediction"
    clip_sample: bool = False
    thresholding: bool = True
    zero_terminal_snr: bool = True


def from_public(values: Mapping[str, Any], label: ImageLabel, where: str) -> ImageTokenizerConfig:
    """Our config of a public tokenizer; its training is the paper's on CC12M, should it be trained on.

    Args:
        values: config.json, or the metadata of the file of weights; `dec_type` must be among them.
        where: the file, for messages.

    Raises:
        PublicConfigError: values that no network here computes; each by name.
    """
    try:
        public = PublicConfig.model_validate(dict(values))
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise PublicConfigError(f"{where}: {'; '.join(lines)}") from error
    problems = _problems(public, values, label)
    if problems:
        raise PublicConfigError(f"{where} is no {label} tokenizer that this project has: {'; '.join(problems)}")
    paper, known = paper_tokenizers()[label], values.get(OURS)
    steps = known.get("sample_steps") if isinstance(known, Mapping) else None
    try:
        return ImageTokenizerConfig.model_validate(
            {
                **paper.at_stage(paper.earlier_stages[-1]).model_dump(),
                "input_px": public.image_size,
                "patch_px": public.patch_size,
                "feature_dim": public.n_channels if label == "clip" else None,
                "encoder": _encoder(public.enc_type).model_dump(),
                "quantizer": QuantizerConfig(
                    codebook_size=public.codebook_size,
                    latent_dim=public.latent_dim,
                    ema_decay=public.ema_decay,
                    commitment_weight=public.commitment_weight,
                    kmeans_init=public.kmeans_init,
                ).model_dump(),
                "decoder": _decoder(public, steps).model_dump(),
            }
        )
    except ValidationError as error:
        raise PublicConfigError(f"{where}: {'; '.join(e['msg'] for e in error.errors())}") from error


def to_public(config: ImageTokenizerConfig, stored_px: int, depth_span: tuple[float, float]) -> dict[str, Any]:
    """What the public classes are constructed with for one of our tokenizers.

    Networks of sizes that have no public name get one of ours (`vit_w128_d2_h4_enc`), which the public code refuses.

    Args:
        stored_px: side in pixels that the weights' positions are stored for.
    """
    decoder, quantizer = config.decoder, config.quantizer
    values: dict[str, Any] = {
        "image_size": stored_px,
        "n_channels": config.in_channels,
        "n_labels": NUM_CLASS_ROWS if config.label == "semseg" else None,
        "enc_type": _vit_name(config.encoder, "enc"),
        "dec_type": _unet_name(decoder) if isinstance(decoder, DiffusionDecoderConfig) else _vit_name(decoder, "dec"),
        "patch_proj": config.label != "clip",
        "patch_size": config.patch_px,
        "codebook_size": quantizer.codebook_size,
        "latent_dim": quantizer.latent_dim,
        "ema_decay": quantizer.ema_decay,
        "threshold_ema_dead_code": config.stale_threshold,
        "commitment_weight": quantizer.commitment_weight,
        "kmeans_init": quantizer.kmeans_init,
        "sync_codebook": False,  # else the public code waits for other processes
        **_ONLY,
    }
    if not isinstance(decoder, DiffusionDecoderConfig):
        return values | _ONLY_PLAIN | {OURS: {"depth_span": list(depth_span)}}
    steps = {"num_train_timesteps": decoder.train_steps, "thresholding": decoder.clamp, "clip_sample": False}
    ours = {"depth_span": list(depth_span), "sample_steps": decoder.sample_steps}
    return values | _ONLY_DIFFUSION | steps | {OURS: ours}


def from_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A public training program's arguments, as a `.pth` holds them, under the names of the classes."""
    values = {name: value for name, value in arguments.items() if value is not None}
    for name, field in _RENAMED.items():
        if name in values:
            values[field] = values[name]
    if "CLIP" in str(values.get("domain", "")):
        values["patch_proj"] = False
    return values


def from_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """A config from the metadata of a safetensors file, whose values are what Python prints of them."""
    return {name: _parsed(text) for name, text in metadata.items()}


def _parsed(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _problems(public: PublicConfig, values: Mapping[str, Any], label: ImageLabel) -> list[str]:
    is_diffusion = public.dec_type.startswith("unet")
    channels = {"rgb": 3, "depth": 1, "normal": 3, "semseg": CLASS_CHANNELS}.get(label, public.n_channels)
    only: dict[str, Any] = {
        **_ONLY,
        **(_ONLY_DIFFUSION if is_diffusion else _ONLY_PLAIN),
        "n_channels": channels,
        "n_labels": NUM_CLASS_ROWS if label == "semseg" else None,
        "patch_proj": label != "clip",
    }
    problems = [
        f"{name} is {found!r}{'' if name in values else ' (the public default)'}, supported is {wanted!r}"
        for name, wanted in only.items()
        if (found := getattr(public, name)) != wanted
    ]
    same = {"image_size_enc": public.image_size, "image_size_dec": public.image_size}
    if not is_diffusion:  # a U-Net's patch is its own
        same["patch_size_dec"] = public.patch_size
    for name, wanted in same.items():
        if getattr(public, name) not in (None, wanted):
            problems.append(f"{name} is {getattr(public, name)}, supported is {wanted}, as of the encoder")
    if public.codebook_size > 2**15:
        problems.append(f"codebook_size is {public.codebook_size}, supported are up to {2**15}: tokens are int16")
    if _vit(public.enc_type) is None:
        problems.append(f"enc_type is {public.enc_type!r}, supported are {', '.join(f'vit_{s}_enc' for s in _VITS)}")
    if _unet(public) is None if is_diffusion else (_vit(public.dec_type) or ("", 0, 0, 0))[0] != "vit":
        names = ", ".join(f"vit_{size}_dec" for size in _VITS)
        problems.append(f"dec_type is {public.dec_type!r}, supported are unet_patched, {names}")
    return problems


def _encoder(name: str) -> EncoderConfig:
    kind, width, depth, heads = _vit(name) or ("", 0, 0, 0)
    return EncoderConfig.model_validate({"kind": kind, "width": width, "depth": depth, "heads": heads})


def _decoder(public: PublicConfig, sample_steps: object) -> VitDecoderConfig | DiffusionDecoderConfig:
    values = _unet(public)
    if values is None:
        _, width, depth, heads = _vit(public.dec_type) or ("", 0, 0, 0)
        return VitDecoderConfig(width=width, depth=depth, heads=heads)
    values |= {"train_steps": public.num_train_timesteps, "clamp": public.thresholding or public.clip_sample}
    if sample_steps is not None:
        values["sample_steps"] = sample_steps
    return DiffusionDecoderConfig.model_validate(values)


def _vit(name: str) -> tuple[str, int, int, int] | None:
    """Kind, width, blocks and heads of a ViT by its name, without its `_enc` or `_dec`."""
    kind, _, size = name.removesuffix("_enc").removesuffix("_dec").partition("_")
    if kind == "vit" and size in _VITS:
        return (kind, *_VITS[size])
    found = _VIT.fullmatch(name)
    return (found["kind"], int(found["width"]), int(found["depth"]), int(found["heads"])) if found else None


def _vit_name(config: EncoderConfig | VitDecoderConfig, end: str) -> str:
    for size, known in _VITS.items():
        if config.kind == "vit" and (config.width, config.depth, config.heads) == known:
            return f"vit_{size}_{end}"
    return f"{config.kind}_w{config.width}_d{config.depth}_h{config.heads}_{end}"


def _unet(public: PublicConfig) -> dict[str, Any] | None:
    if public.dec_type == "unet_patched":
        return {}
    found = _UNET.fullmatch(public.dec_type)
    if found is None:
        return None
    return {
        "patch_px": int(found["patch"]),
        "channels": int(found["channels"]),
        "multipliers": [int(m) for m in found["multipliers"].split("-")],
        "res_blocks": int(found["blocks"]),
        "attention_levels": [int(level) for level in found["levels"].split("-") if level],
    }


def _unet_name(config: DiffusionDecoderConfig) -> str:
    fields = ("patch_px", "channels", "multipliers", "res_blocks", "attention_levels")
    if all(getattr(config, field) == getattr(DiffusionDecoderConfig(), field) for field in fields):
        return "unet_patched"
    multipliers, levels = ("-".join(map(str, many)) for many in (config.multipliers, config.attention_levels))
    return f"unet_patched_p{config.patch_px}_c{config.channels}_m{multipliers}_r{config.res_blocks}_a{levels}"
