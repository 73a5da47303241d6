"""Configs of 4M's training: pretraining, and fine-tuning to paint from captions and to super-resolve. No torch.

Modalities are written by label, without the size of their crops: `rgb` is the pixels, `tok_rgb` their tokens, then
`tok_depth`, `tok_normal`, `tok_semseg`, `tok_clip`, `caption`, `det`. A manifest says which of them there are and how large.
Where there are two resolutions, `low:tok_rgb` is the tokens of the smaller crops and `high:tok_rgb` those of the larger.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fourmill.core.digest import digest_json
from fourmill.core.modality import Resolutions

VERSION = "1"  # of the model, its masking and its training

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Alphas = dict[str, Annotated[float, Field(ge=0)]]
Keep = Literal["random", "all", "binary"]
RESOLUTION_NAMES = ("low", "high")


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(_Config):
    """The encoder-decoder (4M, Table 4 and appendix C.1). The defaults are the public architecture; what differs is a demo option."""

    dim: Positive = Field(default=768, description="Channels of a token.")
    encoder_depth: Positive = Field(default=12, description="Encoder blocks.")
    decoder_depth: Positive = Field(default=12, description="Decoder blocks.")
    num_heads: Positive = Field(default=12, description="Attention heads; 64 channels each at the paper's sizes.")
    mlp_ratio: Annotated[float, Field(gt=0)] = Field(
        default=4.0, description="SwiGLU's hidden channels are int(2/3 * mlp_ratio * dim); no layer has a bias."
    )
    position_temperature: Annotated[float, Field(gt=1)] = Field(
        default=10_000.0,
        description="Base of the sine-cosine positions of images; texts always have 10,000. Demo: a small one tells the "
        "places of an 8 x 8 grid apart.",
    )
    position_grid: Positive | None = Field(
        default=None,
        description="Grid in whose units the tokens of every image grid are placed, so that tokens of two resolutions share the "
        "positions of what they show (demo). None: each grid counts its own, as public.",
    )
    centre_positions: bool = Field(
        default=False, description="Subtract the mean over the grid from image positions (demo)."
    )
    queries_are_keys_init: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Start every attention with keys equal to queries times this, so that equal places see each other from "
        "the first step (demo). None: independent, as in public.",
    )
    embedding_std: Annotated[float, Field(gt=0)] = Field(
        default=0.02, description="Deviation of the encoder's token embeddings at the start."
    )

    @property
    def hidden(self) -> int:
        """SwiGLU's hidden channels, cut to an integer as in public: 1024 at dim 384, 2730 at 1024."""
        return int(2 * int(self.mlp_ratio * self.dim) / 3)

    @model_validator(mode="after")
    def _divides(self) -> "ModelConfig":
        if self.dim % self.num_heads or self.dim % 4:
            raise ValueError(f"dim {self.dim} must be a multiple of 4 and of its {self.num_heads} heads")
        return self


class MixtureComponent(_Config):
    """One kind of sample: how many tokens of which modality it tends to see and to predict (4M, 2.3, A.1, A.2).

    Keys are a full name (`tok_rgb@448`), a label at a resolution (`high:tok_rgb`), a label (`tok_rgb`), or a wildcard
    (`high:tok_*`, `tok_*`, `*`); the most precise one counts, and a modality that none names has 0. The share of each
    modality is drawn from a Dirichlet distribution: 0 leaves a modality out, small alphas give few modalities many tokens,
    large ones give all of them alike.
    """

    input_alphas: Alphas = Field(description="Dirichlet parameters of the visible tokens.")
    target_alphas: Alphas = Field(
        description="Dirichlet parameters of the predicted tokens; pixels are never predicted."
    )
    keep: Keep = Field(
        default="random",
        description="Share of a visible text that is kept before its budget cuts it: uniform in 0..1, all, or 0 or 1.",
    )
    weight: Annotated[float, Field(gt=0)] = Field(default=1.0, description="Odds of this component.")

    @field_validator("input_alphas", "target_alphas")
    @classmethod
    def _known_resolutions(cls, alphas: Alphas) -> Alphas:
        for key in alphas:
            if ":" in key and key.split(":")[0] not in RESOLUTION_NAMES:
                raise ValueError(f"{key!r}: a resolution is {' or '.join(RESOLUTION_NAMES)}, as in high:tok_rgb")
        return alphas


class MaskingConfig(_Config):
    """Budgets, and the mixture that they are divided by."""

    components: tuple[MixtureComponent, ...] = Field(min_length=1, description="One is drawn for every sample.")
    num_input_tokens: tuple[int, int] = Field(default=(128, 128), description="Least and most visible tokens.")
    num_target_tokens: tuple[int, int] = Field(default=(128, 128), description="Least and most predicted tokens.")

    @model_validator(mode="after")
    def _ordered(self) -> "MaskingConfig":
        for name in ("num_input_tokens", "num_target_tokens"):
            least, most = getattr(self, name)
            if not 0 < least <= most:
                raise ValueError(f"{name} ({least}, {most}): must be positive, the least first")
        return self


class OptimConfig(_Config):
    """AdamW with a linear warm-up and a cosine decay to 0 (4M, Table 5)."""

    learning_rate: Annotated[float, Field(gt=0)] = Field(description="Peak, at this batch size.")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(description="Steps of linear warm-up.")
    betas: tuple[Share, Share] = Field(default=(0.9, 0.95), description="Momentum.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.05, description="Not on norms; on embeddings, as public."
    )
    clip_grad: Annotated[float, Field(gt=0)] | None = Field(default=None, description="Bound on the gradient's norm.")
    average_decay: Share = Field(
        default=0.0,
        description="Decay of the moving average of weights that is published instead of the last ones; 0: none.",
    )


class PretrainConfig(_Config):
    """One training of 4M: from nothing, or from another one's weights."""

    model: ModelConfig
    masking: MaskingConfig
    optim: OptimConfig
    resolutions: Resolutions = Field(
        default="base", description="Images that take part: those of the base resolution, or the second one's too."
    )
    copy_tables: bool = Field(
        default=False,
        description="Start the token tables of a new modality from the same label's at the other resolution (demo); "
        "at random otherwise, as the paper.",
    )
    batch_size: Positive = Field(description="Samples a step.")
    steps: Positive = Field(description="Optimiser steps.")
    seed: int = Field(default=0, ge=0, description="Seed of weights, order and masks.")
    precision: Literal["bf16", "fp32"] = Field(default="bf16", description="Autocast type of the trunk.")
    checkpoint_every: Positive = Field(default=200, description="Steps between checkpoints.")
    num_val: Positive = Field(default=256, description="Held-out samples, the first by key, for the validation loss.")


class TrainSpec(_Config):
    """All that `python -m fourmill.train --spec FILE` needs."""

    store: str = Field(description="Root of the store.")
    manifest: str = Field(description="Store path of the manifest; its digest is in its name.")
    name: Literal["fourm", "text2im", "superres"] = Field(description="Model name: models/{name}/{digest}/.")
    config: PretrainConfig
    init_from: str | None = Field(
        default=None, description="Store folder models/{name}/{digest} of the weights to start from."
    )
    run_folder: str = Field(description="Local folder for checkpoints, so that a killed training resumes.")
    threads: Positive = Field(default=2, description="CPU threads of each process.")
    processes: Positive = Field(
        default=1, description="Processes that share every batch, as torchrun's nproc-per-node."
    )

    @property
    def input_digest(self) -> str:
        """Digest of all that the weights depend on: equal inputs, equal model."""
        config = self.config.model_dump(mode="json", exclude={"checkpoint_every"})
        return digest_json([VERSION, self.name, config, self.manifest, self.init_from, self.threads, self.processes])


def fourm_b_cc12m() -> PretrainConfig:
    """4M-7 B on CC12M as in the paper (4M, Tables 4 and 5; all-to-all and RGB-to-all at alpha 0.5 in equal parts).

    | | |
    |---|---|
    | blocks, width, heads | 12 + 12, 768, 12 |
    | tokens in / out | 128 / 128 |
    | batch, learning rate | 8,192; 1e-4 * 8192 / 256 = 3.2e-3 |
    | tokens, warm-up | 500 B in 239,120 steps, 10 B in 4,769 |
    | AdamW | betas 0.9, 0.95; weight decay 0.05 |

    About 229 H100-hours at 40 % of the peak (docs/benchmarks.md); not yet run at scale. The steps are the public code's: 196
    epochs of 1,220, counting 256 tokens a sample. Not the paper's: Table 5's repeated sampling, which draws each sample
    four times from a buffer to read less: here samples are read once and held in memory (`train.data`).
    """
    return PretrainConfig(
        model=ModelConfig(),
        masking=MaskingConfig(components=_all_to_all_and_rgb_to_all()),
        optim=OptimConfig(learning_rate=1e-4 * 8192 / 256, warmup_steps=4_769),
        batch_size=8192,
        steps=239_120,
        checkpoint_every=1_220,
        num_val=5_000,
    )


def fourm_text2im_b() -> PretrainConfig:
    """4M-B fine-tuned to paint from captions (4M, appendix A.2, and the public text2im recipe).

    Inputs 64..256, targets 256; a third of the samples see a whole caption and little else (A.2). Batch 4,096; learning rate
    1e-4 * 4096 / 256 = 1.6e-3; 100 B tokens in 48,820 steps, 10 B of warm-up in 4,769 (public T2I-B). A.2 has 50 B tokens.
    """
    return PretrainConfig(
        model=ModelConfig(),
        masking=MaskingConfig(components=_caption_biased(), num_input_tokens=(64, 256), num_target_tokens=(256, 256)),
        optim=OptimConfig(learning_rate=1e-4 * 4096 / 256, warmup_steps=4_769),
        batch_size=4096,
        steps=48_820,
        checkpoint_every=1_220,
        num_val=5_000,
    )


def fourm_superres_b() -> PretrainConfig:
    """4M-B fine-tuned to super-resolve 14 x 14 tokens to 28 x 28 (4M, appendix A.1, and the public caption_rgb_bias recipe).

    | | |
    |---|---|
    | tokens in / out | uniform in 64..1,024 / 1,024 (A.1) |
    | mixture | four components in equal parts, one of whole captions (A.1; public superres `caption_rgb_bias`) |
    | batch, learning rate | 4,096; 1e-4 * 4096 / 256 = 1.6e-3 (public SR-L) |
    | tokens, warm-up | 100 B (A.1) in 12,205 steps, 5 B in 597 (public SR-L) |
    | gradient norm | at most 3.0 (public SR-L) |

    Paper and public code have 4M-SR at L only; here is its recipe at B's size. The embeddings and heads of the second
    resolution start at random, as theirs. Not yet run at scale.
    """
    return PretrainConfig(
        model=ModelConfig(),
        masking=MaskingConfig(
            components=_caption_rgb_biased(), num_input_tokens=(64, 1024), num_target_tokens=(1024, 1024)
        ),
        optim=OptimConfig(learning_rate=1e-4 * 4096 / 256, warmup_steps=597, clip_grad=3.0),
        resolutions="both",
        batch_size=4096,
        steps=12_205,
        checkpoint_every=1_220,
        num_val=5_000,
    )


def fourm_demo(steps: int) -> PretrainConfig:
    """4M for scenes of 64 pixels on two cores; 1,200 steps are about 200 s on slow ones without bfloat16."""
    return PretrainConfig(
        model=_demo_model(),
        masking=MaskingConfig(
            components=_all_to_all_and_rgb_to_all(rgb_weight=4.0),
            num_input_tokens=(80, 80),
            num_target_tokens=(96, 96),
        ),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=min(100, steps // 10), clip_grad=1.0),
        batch_size=16,
        steps=steps,
    )


def fourm_text2im_demo(steps: int) -> PretrainConfig:
    """The demo's model fine-tuned to paint from captions."""
    return PretrainConfig(
        model=_demo_model(),
        masking=MaskingConfig(components=_caption_biased(), num_input_tokens=(32, 96), num_target_tokens=(96, 96)),
        optim=OptimConfig(learning_rate=1.2e-3, warmup_steps=min(20, steps // 10), clip_grad=1.0),
        batch_size=16,
        steps=steps,
    )


def fourm_superres_demo(steps: int) -> PretrainConfig:
    """The demo's model fine-tuned to super-resolve RGB from 4 x 4 tokens to the 8 x 8 that it was trained on.

    The new, small tokens start from the tables of the large ones, and lie where these lie. No other modality takes part: steps
    are short, and what counts is their number (0.3 dB more at twice as many).
    """
    return PretrainConfig(
        model=_demo_model(),
        masking=MaskingConfig(components=_rgb_biased(), num_input_tokens=(16, 24), num_target_tokens=(32, 32)),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=min(20, steps // 10), clip_grad=1.0),
        resolutions="both",
        copy_tables=True,
        batch_size=16,
        steps=steps,
    )


def _demo_model() -> ModelConfig:
    return ModelConfig(
        dim=128,
        encoder_depth=2,
        decoder_depth=2,
        num_heads=4,
        position_temperature=10.0,
        position_grid=8,
        centre_positions=True,
        queries_are_keys_init=2.0,
        embedding_std=0.5,
    )


def _all_to_all_and_rgb_to_all(rgb_weight: float = 1.0) -> tuple[MixtureComponent, ...]:
    return (
        MixtureComponent(input_alphas={"rgb": 1000.0}, target_alphas={"*": 0.5}, weight=rgb_weight),
        MixtureComponent(input_alphas={"*": 0.5}, target_alphas={"*": 0.5}),
    )


def _caption_biased() -> tuple[MixtureComponent, ...]:
    return (
        MixtureComponent(input_alphas={"caption": 5.0, "*": 0.05}, target_alphas={"*": 1.0}, keep="all"),
        MixtureComponent(input_alphas={"*": 0.2}, target_alphas={"*": 1.0}),
        MixtureComponent(input_alphas={"*": 1.0}, target_alphas={"*": 1.0}),
    )


def _caption_rgb_biased() -> tuple[MixtureComponent, ...]:
    """Public superres `caption_rgb_bias`: targets are of the higher resolution alone."""
    high = {"high:*": 1.0}
    return (
        MixtureComponent(input_alphas={"tok_rgb": 5.0, "*": 0.05}, target_alphas={"high:tok_rgb": 5.0, "high:*": 0.05}),
        MixtureComponent(input_alphas={"caption": 5.0, "*": 0.05}, target_alphas=high, keep="all"),
        MixtureComponent(input_alphas={"*": 0.2}, target_alphas=high),
        MixtureComponent(input_alphas={"*": 1.0}, target_alphas=high),
    )


def _rgb_biased() -> tuple[MixtureComponent, ...]:
    """The demo's share of it, RGB alone: mostly what the first decoding step sees, and the others' at times."""
    high = {"high:tok_rgb": 1.0}
    return (
        MixtureComponent(input_alphas={"low:tok_rgb": 1.0}, target_alphas=high, weight=7.0),
        MixtureComponent(input_alphas={"tok_rgb": 5.0}, target_alphas=high),
    )
