"""The paper's tokenizers are those of its Table 3 and appendix B.3: each value here is the paper's."""

from typing import Any

import pytest

from fourmill.tokenize.presets import paper_tokenizers

# Codebook size, loss, batch size, random crop scale
TABLE_3 = {
    "rgb": (16384, "mse", 640, (0.8, 1.0)),
    "normal": (8192, "mse", 640, (0.8, 1.0)),
    "depth": (8192, "smooth_l1", 640, (0.8, 1.0)),
    "semseg": (4096, "cross_entropy", 640, (0.8, 1.0)),
    "clip": (8192, "smooth_l1", 1024, None),  # packed crops, of (0.2, 1.0)
}
VIT_B = {"kind": "vit", "width": 768, "depth": 12, "heads": 12}
U_NET = {"kind": "diffusion", "res_blocks": 3, "attention_levels": (2, 3), "train_steps": 1000, "sample_steps": 25}


def named(value: Any, *names: str) -> tuple[Any, ...]:
    return tuple(getattr(value, name) for name in names)


@pytest.mark.parametrize("label", TABLE_3)
def test_networks_and_codebooks_are_table_3s(label: str) -> None:
    config = paper_tokenizers()[label]
    assert named(config, "input_px", "patch_px") == (224, 16)
    assert config.encoder.model_dump() == VIT_B
    decoder = config.decoder.model_dump()
    wanted = VIT_B if label in ("semseg", "clip") else U_NET
    assert decoder | wanted == decoder
    assert len(decoder.get("multipliers", range(4))) == 4  # down and up layers
    names = ("codebook_size", "latent_dim", "stale_coefficient", "ema_decay", "commitment_weight", "kmeans_init")
    assert named(config.quantizer, *names) == (TABLE_3[label][0], 32, 32, 0.99, 1.0, False)


@pytest.mark.parametrize("label", TABLE_3)
def test_the_last_stage_warms_up_for_rgbs_first_epoch_or_5000_steps(label: str) -> None:
    stage = paper_tokenizers()[label].training
    assert stage.warmup_steps == (12_000_000 // 128 if label == "rgb" else 5000)


@pytest.mark.parametrize("label", TABLE_3)
def test_the_first_two_stages_are_table_3s(label: str) -> None:
    _, loss, batch, scale = TABLE_3[label]
    for stage, epochs, warmup, images in zip(
        paper_tokenizers()[label].stages[:2], (100, 15), (5, 1), (1_281_167, 12_000_000), strict=True
    ):
        assert named(stage, "loss", "batch_size", "crop_scale") == (loss, batch, scale)
        assert named(stage, "betas", "weight_decay", "crop_ratio") == ((0.9, 0.95), 0.05, (0.75, 1.3333))
        assert stage.hflip == (label != "clip")  # its mirrored crops are packed
        assert stage.learning_rate == pytest.approx(5e-5 * batch / 256)
        assert stage.steps / (images // batch) == epochs and stage.warmup_steps / (images // batch) == warmup
