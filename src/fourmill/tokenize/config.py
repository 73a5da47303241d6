"""Configs of the tokenizers, their training set and their training program. No torch: definitions load this.

What the paper and the demo train is in `presets`.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fourmill.core.crops import CropConfig
from fourmill.core.modality import NUM_SEMSEG_CLASSES

TRAIN_VERSION = "4"  # of the networks and their training: raise it when equal inputs give other weights
TRAIN_SET_VERSION = "3"  # of what is packed and how
TEXT_VERSION = "1"  # of the WordPiece fit
TOKENS_VERSION = "4"  # of labels to tokens: raise it when equal labels and weights give other tokens

NUM_CLASS_ROWS = NUM_SEMSEG_CLASSES + 1  # row 0 is "no class", ids are shifted by one
CLASS_CHANNELS = 64  # channels of a class embedding, the semseg encoder's input

ImageLabel = Literal["rgb", "depth", "normal", "semseg", "clip"]
Precision = Literal["fp32", "bf16", "fp16"]
Positive = Annotated[int, Field(gt=0)]
Span = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
"""From and to, the lower first."""


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EncoderConfig(_Config):
    """Patches to latents."""

    kind: Literal["vit", "patch"] = Field(
        default="vit",
        description="`vit`: transformer blocks, as the paper. `patch`: the same blocks without attention, so a token "
        "tells of its own patch only: a demo option, faster and sharper at 64 pixels.",
    )
    width: Positive = Field(default=768, description="Channels of a token.")
    depth: Positive = Field(default=12, description="Blocks.")
    heads: Positive = Field(default=12, description="Attention heads; 64 channels each at the paper's sizes.")


class QuantizerConfig(_Config):
    """The codebook: l2-normalised, moved by averages, stale codewords restarted (appendix B.3)."""

    codebook_size: Annotated[int, Field(gt=1, le=2**15)] = Field(description="Codewords; tokens are stored as int16.")
    latent_dim: Positive = Field(default=32, description="Channels of a codeword (Table 3).")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.99, description="Codebook EMA (Table 3).")
    stale_coefficient: Annotated[float, Field(ge=0)] = Field(
        default=32,
        description="c_replace of Table 3: a codeword whose EMA count is below tokens / (c * codewords) restarts. 0: never.",
    )
    commitment_weight: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="Weight of the commitment loss (Table 3)."
    )
    kmeans_init: bool = Field(default=False, description="Start from k-means of the first batch instead of at random.")


class VitDecoderConfig(_Config):
    """Codewords to the label in one go."""

    kind: Literal["vit"] = "vit"
    width: Positive = Field(default=768, description="Channels of a token.")
    depth: Positive = Field(default=12, description="Blocks.")
    heads: Positive = Field(default=12, description="Attention heads.")


class DiffusionDecoderConfig(_Config):
    """Codewords to the label by denoising: a U-Net over small patches that predicts the clean image (appendix B.3)."""

    kind: Literal["diffusion"] = "diffusion"
    patch_px: Positive = Field(default=4, description="Side of the patches that the U-Net sees as pixels.")
    channels: Positive = Field(default=256, description="Channels of the first level.")
    multipliers: tuple[Positive, ...] = Field(default=(1, 2, 2, 2), description="Channels of each level, as multiples.")
    res_blocks: Positive = Field(
        default=3, description="Residual blocks of a level on the way down; one more on the way up."
    )
    attention_levels: tuple[int, ...] = Field(default=(2, 3), description="Levels with self-attention, counted from 0.")
    train_steps: Annotated[int, Field(ge=2)] = Field(
        default=1000, description="Steps of the noise schedule: linear betas, zero terminal SNR."
    )
    sample_steps: Positive = Field(default=25, description="DDIM steps when tokens are decoded.")
    clamp: bool = Field(default=True, description="Clamp the predicted image to [-1, 1]; not for standardised depth.")

    @model_validator(mode="after")
    def _can_be_sampled(self) -> "DiffusionDecoderConfig":
        if self.sample_steps > self.train_steps:
            raise ValueError(
                f"sample_steps {self.sample_steps} of a schedule of train_steps {self.train_steps}: more than there are"
            )
        return self


class GuardConfig(_Config):
    """What happens when the loss or the gradient of a step is not finite: continuing RGB in half precision is known for it."""

    max_in_row: Positive = Field(
        default=5, description="Skipped steps in a row after which the training goes back to its last checkpoint."
    )
    max_rollbacks: Annotated[int, Field(ge=0)] = Field(
        default=3, description="Times that it goes back; then it stops with an error."
    )


class TrainingConfig(_Config):
    """One training stage of a tokenizer."""

    name: str = Field(default="base", pattern=r"^[a-z][a-z0-9_]*$", description="Of the stage, in reports and cards.")
    train_set: str | None = Field(
        default=None, description="Which of the project's `more_train_sets` it sees; None: its main one."
    )
    loss: Literal["mse", "smooth_l1", "cross_entropy"] = Field(description="Reconstruction loss (Table 3).")
    steps: Positive = Field(description="Optimiser steps.")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        description="Steps of linear warm-up before the peak; cosine decay to 0 after it."
    )
    batch_size: Positive = Field(description="Images a step.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(description="Peak learning rate, at this batch size.")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW momentum (Table 3).")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.05, description="AdamW weight decay (Table 3).")
    clip_grad: Annotated[float, Field(gt=0)] = Field(default=1.0, description="Bound on the gradient's norm.")
    scored_share: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="Share of an image's tokens that a plain decoder is scored on each step; less is faster.",
    )
    hflip: bool = Field(
        default=True,
        description="Mirror half of the images (Table 3); of CLIP, the maps of features, which is not quite the same: drawn crops "
        "are mirrored when the set is packed.",
    )
    crop_scale: Span | None = Field(
        default=None,
        description="Share of an image's area that is seen, drawn for each and resized (Table 3); None: its centre square, which "
        "stands for it in sets without `side_px`. CLIP's crops are drawn when the set is packed.",
    )
    crop_ratio: Span = Field(default=(0.75, 1.3333), description="Width over height of such crops (Table 3).")
    sides_px: tuple[Positive, ...] = Field(
        default=(), description="Sides of which each step draws one (multi-resolution, appendix B.3); none: input_px."
    )
    precision: Literal["bf16", "fp32"] = Field(
        default="bf16", description="Autocast type; the quantizer is always fp32."
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Moving average of all weights and the codebook, warmed up over the first steps; it is what is published. "
        "None: the last weights are.",
    )
    guard: GuardConfig = GuardConfig()
    checkpoint_every: Positive = Field(default=200, description="Steps between checkpoints.")
    log_every: Positive = Field(default=10, description="Steps between points of the TensorBoard curves.")
    score_every: Positive | None = Field(
        default=None, description="Steps between figures and pictures of held-out samples; None: at the end only."
    )
    compile: bool = Field(default=False, description="torch.compile for encoder and decoder: on GPUs.")
    cuda_graphs: bool = Field(
        default=False,
        description="Where `compile` is on, kernels are launched as CUDA graphs: a step has thousands, and a slow host needs longer "
        "to launch them than the GPU to run them. For stages of one side. Not yet run on a GPU.",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of weights, batches and noise.")


_TOLD_ONLY = {"name", "log_every", "score_every"}  # of a stage: what is said of it, on which no weight depends


class ImageTokenizerConfig(_Config):
    """One image tokenizer: what it eats, its networks, its training, in stages that each begin where the one before ended."""

    label: ImageLabel
    input_px: Positive = Field(description="Side of the square crops that it is trained on.")
    patch_px: Positive = Field(description="Side of the patch behind one token.")
    feature_dim: Positive | None = Field(default=None, description="Channels of the CLIP features; for clip only.")
    encoder: EncoderConfig = EncoderConfig()
    quantizer: QuantizerConfig
    decoder: VitDecoderConfig | DiffusionDecoderConfig = Field(discriminator="kind")
    training: TrainingConfig = Field(description="The last stage; its weights serve.")
    earlier_stages: tuple[TrainingConfig, ...] = Field(default=(), description="The stages before it, in their order.")

    @property
    def stages(self) -> tuple[TrainingConfig, ...]:
        """All stages of the training, in order."""
        return (*self.earlier_stages, self.training)

    def at_stage(self, stage: TrainingConfig) -> "ImageTokenizerConfig":
        """The config of one stage's training: what its weights depend on beside the weights that it begins with."""
        return self.model_copy(update={"training": stage, "earlier_stages": ()})

    def require_sound(self) -> None:
        """Make sure that a training by this config does what it seems to say; tokenizers that are there need not ask.

        Raises:
            ValueError: settings that would have no effect, or a poor one.
        """
        for stage in self.stages:
            if stage.warmup_steps > stage.steps:
                raise ValueError(
                    f"stage {stage.name} of the {self.label} tokenizer has warmup_steps {stage.warmup_steps} of {stage.steps} steps: the "
                    "learning rate would never reach its peak; give fewer"
                )
        if isinstance(self.decoder, DiffusionDecoderConfig):
            last = len(self.decoder.multipliers) - 1
            if any(level > last for level in self.decoder.attention_levels):
                raise ValueError(
                    f"attention_levels {self.decoder.attention_levels} of the {self.label} tokenizer: multipliers "
                    f"{self.decoder.multipliers} make levels 0 to {last}"
                )

    @property
    def weights_depend_on(self) -> dict[str, Any]:
        """The values of it that can change weights, as JSON."""
        stages = dict.fromkeys(range(len(self.earlier_stages)), _TOLD_ONLY)
        return self.model_dump(mode="json", exclude={"training": _TOLD_ONLY, "earlier_stages": stages})

    @property
    def interface(self) -> dict[str, str | int | None]:
        """What others rely on: a tokenizer that has another cannot take its place."""
        return {
            "label": self.label,
            "patch_px": self.patch_px,
            "codebook_size": self.codebook_size,
            "feature_dim": self.feature_dim,
        }

    @property
    def grid(self) -> int:
        """Tokens along a side."""
        return self.input_px // self.patch_px

    @property
    def num_tokens(self) -> int:
        """Tokens of one image."""
        return self.grid**2

    @property
    def side_multiple(self) -> int:
        """Sides in pixels that can be tokenized and decoded are the multiples of this, the training's among them."""
        if not isinstance(self.decoder, DiffusionDecoderConfig):
            return self.patch_px
        return math.lcm(self.patch_px, self.decoder.patch_px * 2 ** (len(self.decoder.multipliers) - 1))

    @property
    def codebook_size(self) -> int:
        """Vocabulary of the tokens."""
        return self.quantizer.codebook_size

    @property
    def in_channels(self) -> int:
        """Channels that the encoder sees."""
        by_label = {"rgb": 3, "depth": 1, "normal": 3, "semseg": CLASS_CHANNELS, "clip": self.feature_dim or 0}
        return by_label[self.label]

    @property
    def stale_threshold(self) -> float:
        """thresh_replace of appendix B.3: EMA count below which a codeword restarts; 0 never restarts."""
        if not self.quantizer.stale_coefficient:
            return 0.0
        sides = self.training.sides_px or (self.input_px,)
        tokens = self.training.batch_size * ((min(sides) + max(sides)) // 2 // self.patch_px) ** 2
        return tokens / (self.quantizer.stale_coefficient * self.quantizer.codebook_size)

    @model_validator(mode="after")
    def _fits(self) -> "ImageTokenizerConfig":
        if self.input_px % self.patch_px:
            raise ValueError(f"input_px {self.input_px} is not a multiple of patch_px {self.patch_px}")
        if (self.label == "clip") != (self.feature_dim is not None):
            raise ValueError(
                f"{self.label} tokenizer with feature_dim {self.feature_dim}: clip needs one, the others have none"
            )
        if isinstance(self.decoder, DiffusionDecoderConfig):
            self._check_unet(self.decoder)
        for stage in self.stages:
            self._check_stage(stage)
        for part in (self.encoder, self.decoder):
            if not isinstance(part, DiffusionDecoderConfig) and (part.width % part.heads or part.width % 4):
                raise ValueError(f"width {part.width} must be a multiple of 4 and of its {part.heads} heads")
        return self

    def _check_stage(self, stage: TrainingConfig) -> None:
        if (self.label == "semseg") != (stage.loss == "cross_entropy"):
            raise ValueError(
                f"loss {stage.loss} does not fit {self.label}: cross_entropy is for semseg and only for it"
            )
        for side in stage.sides_px:
            if side % self.side_multiple:
                raise ValueError(
                    f"sides_px of stage {stage.name} holds {side}: {self.label} takes multiples of {self.side_multiple}"
                )
        if stage.cuda_graphs and stage.sides_px:
            raise ValueError(f"stage {stage.name}: cuda_graphs is for stages of one side, and sides_px names several")
        names = [one.name for one in self.stages]
        if names.count(stage.name) > 1:
            raise ValueError(f"two stages are called {stage.name}; reports and cards tell them apart by name")
        low, high = stage.crop_scale or (1.0, 1.0)
        if not low <= high <= 1 or stage.crop_ratio[0] > stage.crop_ratio[1]:
            raise ValueError(
                f"crop_scale {stage.crop_scale} and crop_ratio {stage.crop_ratio}: the lower first, scale up to 1"
            )

    def _check_unet(self, unet: DiffusionDecoderConfig) -> None:
        if self.label not in ("rgb", "depth", "normal"):
            raise ValueError(f"{self.label} has no diffusion decoder; it is for rgb, depth and normal")
        smallest = unet.patch_px * 2 ** (len(unet.multipliers) - 1)
        if self.input_px % smallest or self.patch_px % unet.patch_px:
            raise ValueError(
                f"input_px {self.input_px} must be a multiple of {smallest} ({len(unet.multipliers)} U-Net levels over patches of "
                f"{unet.patch_px}), and patch_px {self.patch_px} of the U-Net's patch"
            )


class TrainSetConfig(_Config):
    """The frozen subset that all image tokenizers are trained on."""

    dataset: str | None = Field(
        default=None, description="Data set that it is taken from; None: the project's main one."
    )
    num_samples: Positive = Field(description="Samples of the training split, the first by key that have every label.")
    num_eval: Positive = Field(description="Held-out samples of the validation split, for figures and pictures.")
    blocks: tuple[str, ...] = Field(
        default=("block_00",), min_length=1, description="Blocks that samples are taken from, each once."
    )
    side_px: Positive | None = Field(
        default=None,
        description="Side of the squares that whole images are squeezed to where crops or larger sides are drawn from them; None: "
        "centre squares of input_px, as held-out samples always are.",
    )
    clip_crops: Positive = Field(
        default=1,
        description="Crops a sample and side whose CLIP features are packed: the centre square, and more drawn by number and key. "
        "Features are computed when the set is packed, by the labeller, which the training program does not know.",
    )
    clip_crop_scale: Span = Field(default=(0.2, 1.0), description="Share of the image's area of such crops (Table 3).")
    clip_px: Positive | tuple[Positive, ...] | None = Field(
        default=None,
        description="Side, or sides, at which CLIP sees them; None: input_px. A tokenizer trains on features of exactly its sides: "
        "CLIP's of a small image are not its of a large one, shrunk.",
    )

    @field_validator("blocks")
    @classmethod
    def _each_once(cls, blocks: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(blocks)) < len(blocks):
            raise ValueError(f"blocks {', '.join(blocks)}: one of them is named twice, and its samples would be too")
        return blocks

    def clip_sides(self, input_px: int) -> tuple[int, ...]:
        """The sides in pixels at which CLIP sees the crops of the training split."""
        return tuple(dict.fromkeys(self.clip_px)) if isinstance(self.clip_px, tuple) else (self.clip_px or input_px,)

    def most_bytes(self, input_px: int, patch_px: int, feature_dim: int) -> int:
        """Of the packed training split, where every sample is found: nine a pixel of four labels, and float16 features."""
        places = sum((px // patch_px) ** 2 for px in self.clip_sides(input_px))
        return self.num_samples * (9 * (self.side_px or input_px) ** 2 + 2 * self.clip_crops * places * feature_dim)


MOST_FARTHER: dict[Precision, float] = {"fp32": 0.0, "bf16": 5e-3, "fp16": 5e-4}
"""How much less near, in cosine to the latent of float32, a token of an encoder in a precision is than the nearest, at most."""

MOST_DIFFERENT: dict[Precision, float] = {"fp32": 0.0, "bf16": 0.05, "fp16": 0.01}
"""Share of tokens that may be others than float32's, those apart by `TIE` and less left out. Training leaves codewords that are all but
equal; where a plain background lies between two of them, all of it may change, so nothing bounds the share with these."""

TIE = 1e-4  # difference of cosines; a training of 20 steps left two codewords of a plain background 2.5e-5 apart


class TokenizingConfig(_Config):
    """How labels become tokens, beside the tokenizer itself."""

    crops: CropConfig = CropConfig()
    precision: Precision = Field(
        default="fp32",
        description="Of the encoder; codewords are compared in float32. Half precision is for GPUs: a token is at most "
        "0.005 (bf16) or 0.0005 (fp16) less near, in cosine, than the nearest, and ties apart at most 5 % and 1 % differ from "
        "float32's. The two are equally fast, so fp16, unless most images leave its range: those "
        "are encoded once more in float32.",
    )
    shards_together: Positive = Field(
        default=4, description="Shards that an actor takes at a time, so that batches go on across their borders."
    )

    @property
    def recipe(self) -> dict[str, str]:
        """What changes tokens, by name; empty for the defaults."""
        return {} if self.precision == "fp32" else {"precision": self.precision}


class TextTokenizerConfig(_Config):
    """The joint WordPiece vocabulary of captions and boxes (appendix B.2)."""

    vocab_size: Annotated[int, Field(gt=4284)] = Field(
        default=30_000,
        description="Ids in all: 4,284 special tokens and the word pieces. A small corpus may fill fewer.",
    )
    min_frequency: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Occurrences below which a piece is not made."
    )
