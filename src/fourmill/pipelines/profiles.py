"""Profiles: Python functions that return one complete project. The paper's tables as code, each value with its table.

The component's own values live in its room (`tokenize.config`, `train.config`); a profile only puts them together.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from fourmill.core.modality import IMAGE_TOKENS
from fourmill.core.names import Layout
from fourmill.ingest.config import IngestConfig, SourceConfig
from fourmill.ingest.demo_source import DEMO_HOST
from fourmill.pipelines import environment
from fourmill.pseudolabel.choices import demo_labellers, paper_labellers
from fourmill.pseudolabel.config import feature_dim
from fourmill.runtime.project import Project, SamplesConfig
from fourmill.runtime.ray_session import RayConfig, StageShare
from fourmill.tokenize.bounds import TokenizerBounds
from fourmill.tokenize.config import (
    ImageTokenizerConfig,
    TextTokenizerConfig,
    TokenizingConfig,
    TrainSetConfig,
)
from fourmill.tokenize.presets import MULTI_RESOLUTION, demo_tokenizers, paper_tokenizers
from fourmill.train.config import (
    fourm_b_cc12m,
    fourm_demo,
    fourm_superres_b,
    fourm_superres_demo,
    fourm_text2im_b,
    fourm_text2im_demo,
)

STEPS_PER_MINUTE = 400  # of the demo's 4M on two idle cores without bfloat16; length is set in steps, so that a busy
# machine is slower but reaches the same model
DEMO_MINUTES = 3.0
DETECTRON2_PYTHON = "/opt/detectron2/bin/python"  # in the image of infra/detectron2
TEXT2IM_SHARE = 0.12  # of the pretraining steps
SUPERRES_SHARE = 0.31  # in steps that take 0.4 of the time of the others: no longer than text2im


def demo(out: Path, train_minutes: float = DEMO_MINUTES) -> Project:
    """The embedded demo: 3,200 rows of generated scenes, two blocks of four shards; nine minutes on two slow cores.

    Expect on held-out scenes: see docs/benchmarks.md, "The demo".
    """
    steps = max(20, round(train_minutes * STEPS_PER_MINUTE))
    labellers = demo_labellers()
    project = Project(
        profile="demo",
        store=str(out / "store"),
        source=SourceConfig(list=str(out / "scenes" / "list.tsv"), val_fraction=0.08),
        layout=Layout(rows_per_shard=400, shards_per_block=4, num_blocks=2),
        ingest=IngestConfig(allow_hosts=(DEMO_HOST,)),
        labellers=labellers,
        train_set=TrainSetConfig(num_samples=2600, num_eval=250, blocks=("block_00", "block_01")),
        tokenizers=demo_tokenizers(feature_dim(labellers["clip"])),
        tokenizer_bounds=_bounds(_DEMO_BOUNDS, min_usage=0.8),
        text=TextTokenizerConfig(vocab_size=4800),
        pretrain=fourm_demo(steps),
        text2im=fourm_text2im_demo(max(10, round(steps * TEXT2IM_SHARE))),
        second_px=32,  # below the pictures' 64: larger ones would not fit into the demo's minutes
        second_labels=("rgb",),
        superres=fourm_superres_demo(max(10, round(steps * SUPERRES_SHARE))),
        # Each further decoding step builds on guesses, which after so short a training are too sure: 0.2 dB less at two.
        samples=SamplesConfig(superres_steps=1),
        ray=RayConfig(num_workers=2),
        fourm_processes=2,
        fine_tunes_at_once=2,  # one process each: none has to wait for another's gradients
    )
    return _at_precision(project, environment.fast_precision())


def _at_precision(project: Project, precision: Literal["bf16", "fp32"]) -> Project:
    """The project with everything trained in a precision: digests differ from one kind of CPU to another, figures hardly."""
    change = {"precision": precision}
    tokenizers = {
        label: config.model_copy(update={"training": config.training.model_copy(update=change)})
        for label, config in project.tokenizers.items()
    }
    trainings = {name: getattr(project, name).model_copy(update=change) for name in ("pretrain", "text2im", "superres")}
    return project.model_copy(update={"tokenizers": tokenizers, **trainings})


# What reaches a person's eye as wrong: somewhat beyond what the demo reaches on slow and fast machines (docs/benchmarks.md).
_DEMO_BOUNDS = {"rgb": 21.0, "depth": 0.09, "normal": 8.0, "semseg": 0.9}
# Half again as far off as the paper's tokenizers are on CC12M's validation images (Table 31: 0.06, 4.0 degrees, 90.5).
_PAPER_BOUNDS = {"depth": 0.09, "normal": 6.0, "semseg": 0.86}


def _bounds(headlines: Mapping[str, float], min_usage: float) -> dict[str, TokenizerBounds]:
    """For every image tokenizer; those without a headline must leave less of the baseline's error."""
    return {label: TokenizerBounds(headline=headlines.get(label), min_usage=min_usage) for label in IMAGE_TOKENS}


_NO_BOUNDS = TokenizerBounds(error_share=None, min_usage=0.05)


def smallest(out: Path, train_minutes: float = 0.0) -> Project:
    """The demo at its smallest, for tests: every stage real, every figure meaningless."""
    base = demo(out)
    project = base.model_copy(
        update={
            "profile": "smallest",
            "layout": Layout(rows_per_shard=20, shards_per_block=2, num_blocks=2),
            "source": base.source.model_copy(update={"val_fraction": 0.25}),
            "train_set": TrainSetConfig(num_samples=48, num_eval=12, blocks=("block_00", "block_01")),
            "tokenizers": {label: _tiny(config) for label, config in base.tokenizers.items()},
            "tokenizer_bounds": {label: _NO_BOUNDS for label in base.tokenizers},
            "pretrain": fourm_demo(12).model_copy(update={"checkpoint_every": 5}),
            "text2im": fourm_text2im_demo(6),
            "superres": fourm_superres_demo(12),
            "samples": SamplesConfig(num_shown=2, num_scored=8, decoding_steps=2),
        }
    )
    return _at_precision(project, base.pretrain.precision)


def _tiny(config: ImageTokenizerConfig) -> ImageTokenizerConfig:
    training = config.training.model_copy(
        update={"steps": 8, "warmup_steps": 2, "batch_size": 8, "checkpoint_every": 3}
    )
    quantizer = config.quantizer.model_copy(update={"codebook_size": 32})
    return config.model_copy(update={"training": training, "quantizer": quantizer})


def cc12m_4m7(out: Path, train_minutes: float = 0.0) -> Project:
    """4M-7 B on CC12M as in the paper: 62 blocks of 200 shards of 1000 rows.

    Costs (docs/benchmarks.md): at most 360 H200-hours of labels at the paper's sizes, as measured by one process on a GPU, of which
    ViTDet 230; 229 of pretraining at 40 % of the peak. Not yet run at scale.
    """
    return Project(
        profile="cc12m_4m7",
        store=str(out / "store"),
        source=SourceConfig(list=str(out / "cc12m.tsv")),
        layout=Layout(rows_per_shard=1000, shards_per_block=200, num_blocks=62),
        ingest=IngestConfig(),
        labellers=paper_labellers(precision="bf16"),
        # Stage one of the tokenizers is ImageNet-1K's; whoever has it gives it in place of CC12M's blocks (docs/imagenet.md).
        # Packed images are whole, so larger than what is cropped from them. Sets lie on disk: 1.7 MB a sample of 320 pixels, so
        # 345 GB each; 19 MB of 640 with CLIP's features at eight sides, 375 GB. The paper's 1.28 million are 2.2 TB.
        train_set=TrainSetConfig(
            num_samples=200_000, num_eval=1_000, blocks=("block_00", "block_01"), side_px=320, clip_crops=4
        ),
        more_train_sets={
            "imagenet": TrainSetConfig(
                num_samples=200_000, num_eval=1_000, blocks=("block_02", "block_03"), side_px=320, clip_crops=4
            ),
            "multi_resolution": TrainSetConfig(
                num_samples=20_000,
                num_eval=1_000,
                blocks=("block_04",),
                side_px=640,
                clip_crops=4,
                clip_px=MULTI_RESOLUTION,
            ),
        },
        tokenizers=paper_tokenizers(),
        tokenizer_bounds=_bounds(_PAPER_BOUNDS, min_usage=0.5),
        # As fast as bf16 on a GPU, and a tenth as many tokens differ from float32's.
        tokenizing=TokenizingConfig(precision="fp16"),
        text=TextTokenizerConfig(vocab_size=30_000),
        pretrain=fourm_b_cc12m(),
        text2im=fourm_text2im_b(),
        second_px=448,  # appendix A.1
        second_labels=IMAGE_TOKENS,
        superres=fourm_superres_b(),
        ray=RayConfig(address="auto", num_workers=8, min_workers=0, cpus_per_worker=4, stages=_gpu_shares()),
        threads=16,
        tokenizers_at_once=1,
        tokenizer_processes=8,  # one a GPU
        fourm_threads=16,
    )


def _gpu_shares() -> dict[str, StageShare]:
    """Who shares GPUs with whom, on eight of them; what is not named here needs none."""
    quarter, half = (StageShare(num_workers=8 * n, gpus_per_worker=1 / n) for n in (4, 2))
    detectron2 = half.model_copy(update={"runtime_env": {"py_executable": DETECTRON2_PYTHON}})
    none = StageShare()
    labels = {"labels/depth": quarter, "labels/normal": quarter, "labels/semseg": half, "labels/det": detectron2}
    # CLIP's took 23 GB each on an H100 of 80 GB, so four did not fit (docs/benchmarks.md).
    clip = {name: half for name in ("tokens/clip", "tokens/clip_448")}
    return {**labels, "tokens": quarter, **clip, **{f"tokens/{name}": none for name in ("caption", "det", "shards")}}


PROFILES: dict[str, Callable[..., Project]] = {"demo": demo, "smallest": smallest, "cc12m_4m7": cc12m_4m7}


def profile(name: str, out: Path, train_minutes: float | None = None) -> Project:
    """A profile by name.

    Raises:
        ValueError: no such profile, with those there are.
    """
    if name not in PROFILES:
        raise ValueError(f"no profile {name!r}; there are {', '.join(PROFILES)}")
    return PROFILES[name](out) if train_minutes is None else PROFILES[name](out, train_minutes)
