"""The paper's tokenizers are those of its Table 3 and appendix B.3: each value here is the paper's, or says whose it is."""

from pathlib import Path
from typing import Any

import pytest

from fourmill.pipelines.profiles import cc12m_4m7
from fourmill.tokenize.config import TrainingConfig
from fourmill.tokenize.presets import paper_tokenizers

# Codebook size, loss, batch size, random crop scale
TABLE_3 = {
    "rgb": (16384, "mse", 640, (0.8, 1.0)),
    "normal": (8192, "mse", 640, (0.8, 1.0)),
    "depth": (8192, "smooth_l1", 640, (0.8, 1.0)),
    "semseg": (4096, "cross_entropy", 640, (0.8, 1.0)),
    "clip": (8192, "smooth_l1", 1024, None),  # packed crops, of (0.2, 1.0)
}
# B.3, "Multi-resolution training": epochs of CC12M; images a GPU, here of eight
FINE_TUNES = {"rgb": (5, 16), "normal": (1, 16), "depth": (1, 16), "semseg": (1, 10), "clip": (1, 16)}
IMAGENET, CC12M = 1_281_167, 12_000_000
VIT_B = {"kind": "vit", "width": 768, "depth": 12, "heads": 12}
U_NET = {  # of B.3; channels and their multiples are the public code's
    "kind": "diffusion",
    "patch_px": 4,
    "channels": 256,
    "multipliers": (1, 2, 2, 2),  # four down and up layers
    "res_blocks": 3,
    "attention_levels": (2, 3),  # the two smallest
    "train_steps": 1000,
    "sample_steps": 25,
}


def named(value: Any, *names: str) -> tuple[Any, ...]:
    return tuple(getattr(value, name) for name in names)


def expected_stages(label: str) -> list[TrainingConfig]:
    """Every value of every stage."""
    _, loss, batch, scale = TABLE_3[label]
    epochs, per_gpu = FINE_TUNES[label]
    small = 8 * per_gpu
    everywhere: dict[str, Any] = {
        "loss": loss,
        "betas": (0.9, 0.95),
        "weight_decay": 0.05,
        "crop_scale": scale,
        "crop_ratio": (0.75, 1.3333),
        "hflip": label != "clip",  # its mirrored crops are packed
        "scored_share": 1.0,
        "precision": "bf16",  # not the paper's, which has float16 for rgb, normal and depth: see presets
        "clip_grad": 1.0,  # public code
        "ema_decay": 0.9999 if label in ("rgb", "normal", "depth") else 0.99,  # public code
        "score_every": 5000,  # public code
        "checkpoint_every": 1000,
        "log_every": 50,
        "compile": True,
        "cuda_graphs": False,
        "seed": 0,
    }

    def stage(name: str, train_set: str | None, batch: int, images: int, epochs: int, **values: Any) -> TrainingConfig:
        steps, rate = epochs * (images // batch), 5e-5 * batch / 256  # the base rate is for 256
        return TrainingConfig(
            name=name, train_set=train_set, batch_size=batch, steps=steps, learning_rate=rate, **values, **everywhere
        )

    # The paper gives the fine-tune no warm-up: one epoch for RGB and 5,000 steps for the others are the public code's.
    last = CC12M // small if label == "rgb" else 5000
    return [
        stage("imagenet", "imagenet", batch, IMAGENET, 100, warmup_steps=5 * (IMAGENET // batch)),
        stage("cc12m", None, batch, CC12M, 15, warmup_steps=CC12M // batch),
        stage(
            "multi_resolution",
            "multi_resolution",
            small,
            CC12M,
            epochs,
            warmup_steps=last,
            sides_px=(224, 256, 288, 320, 352, 384, 416, 448),
        ),
    ]


def test_the_papers_five_modalities_have_a_tokenizer() -> None:
    assert paper_tokenizers().keys() == TABLE_3.keys()


@pytest.mark.parametrize("label", TABLE_3)
def test_networks_and_codebooks_are_table_3s(label: str) -> None:
    config = paper_tokenizers()[label]
    assert named(config, "label", "input_px", "patch_px") == (label, 224, 16)
    assert config.feature_dim == (512 if label == "clip" else None)  # of CLIP-B/16
    assert config.encoder.model_dump() == VIT_B
    clamp = {"clamp": label != "depth"}  # standardised depth leaves [-1, 1]
    assert config.decoder.model_dump() == (VIT_B if label in ("semseg", "clip") else U_NET | clamp)
    assert config.quantizer.model_dump() == {
        "codebook_size": TABLE_3[label][0],
        "latent_dim": 32,
        "ema_decay": 0.99,
        "stale_coefficient": 32,
        "commitment_weight": 1.0,
        "kmeans_init": False,  # public code
    }


@pytest.mark.parametrize("label", TABLE_3)
def test_the_stages_are_table_3s_and_appendix_b3s(label: str) -> None:
    found = [stage.model_dump() for stage in paper_tokenizers()[label].stages]
    assert found == [stage.model_dump() for stage in expected_stages(label)]


@pytest.mark.parametrize("label", TABLE_3)
def test_codewords_are_stale_below_the_threshold_of_appendix_b3(label: str) -> None:
    config = paper_tokenizers()[label]
    size, _, batch, _ = TABLE_3[label]
    for stage in config.stages[:2]:
        assert config.at_stage(stage).stale_threshold == pytest.approx(batch * 14**2 / (32 * size))


def test_clips_packed_crops_are_table_3s_at_every_side_of_its_stage(tmp_path: Path) -> None:
    project = cc12m_4m7(tmp_path)
    for stage in project.tokenizers["clip"].stages:
        packed = project.train_set_of(stage.train_set)
        assert packed.clip_crop_scale == (0.2, 1.0)
        assert packed.clip_sides(224) == (stage.sides_px or (224,))
