"""The tokenizers that are trained: Table 3 of the paper as code, and the same recipe at sizes two cores train in two minutes."""

from typing import Literal

from fourmill.tokenize.config import (
    DiffusionDecoderConfig,
    EncoderConfig,
    ImageLabel,
    ImageTokenizerConfig,
    QuantizerConfig,
    TrainingConfig,
    VitDecoderConfig,
)

MULTI_RESOLUTION = tuple(range(224, 449, 32))
"""Sides in pixels of the multi-resolution fine-tune (B.3)."""


def demo_tokenizers(feature_dim: int = 64) -> dict[str, ImageTokenizerConfig]:
    """Five tokenizers for generated scenes of 64 pixels: 8x8 tokens, 512 codewords, two to three minutes on two cores.

    Expect on held-out scenes: semseg mIoU 0.93, depth L1 0.08, normals 6.5 degrees, RGB 22 dB, features' R2 0.83.

    Args:
        feature_dim: channels of the CLIP features.
    """
    diffusion = ("rgb", "depth", "normal")
    plain = VitDecoderConfig(width=128, depth=2, heads=4)
    denoiser = DiffusionDecoderConfig(
        channels=32, multipliers=(1, 2), res_blocks=1, attention_levels=(1,), sample_steps=4
    )

    def one(label: ImageLabel, steps: int, batch: int, rate: float, commitment: float = 1.0) -> ImageTokenizerConfig:
        return ImageTokenizerConfig(
            label=label,
            input_px=64,
            patch_px=8,
            feature_dim=feature_dim if label == "clip" else None,
            # Without attention where a diffusion decoder takes most of the time: as sharp, and sooner.
            encoder=EncoderConfig(kind="patch" if label in diffusion else "vit", width=128, depth=2, heads=4),
            # A memory of 10 steps and k-means: an EMA of 0.99 has hardly moved in 300.
            quantizer=QuantizerConfig(codebook_size=512, ema_decay=0.9, kmeans_init=True, commitment_weight=commitment),
            decoder=_decoder(label, plain, denoiser),
            training=TrainingConfig(
                loss=_LOSS[label],
                steps=steps,
                warmup_steps=20,
                batch_size=batch,
                learning_rate=rate,
                # 134 logits a pixel are half of a step's cost, and neighbours say much the same.
                scored_share=0.25 if label == "semseg" else 1.0,
            ),
        )

    # Small batches, narrow U-Nets and many steps: in the time that gives rgb 21.7 dB, depth 0.088 and normals 6.7 degrees
    # with 16 images and 48 channels, 8 and 32 reach 22.4, 0.079 and 6.4.
    return {
        "rgb": one("rgb", 440, 8, 3e-3),
        "depth": one("depth", 480, 8, 3e-3, commitment=4.0),
        "normal": one("normal", 370, 8, 3e-3, commitment=4.0),
        "semseg": one("semseg", 710, 8, 1.6e-3),
        "clip": one("clip", 260, 8, 1e-3),
    }


def smallest_tokenizers(feature_dim: int = 64) -> dict[str, ImageTokenizerConfig]:
    """The demo's tokenizers for tests: every part real, a few steps, figures without meaning."""
    return {
        label: config.model_copy(
            update={"training": config.training.model_copy(update={"steps": 6, "batch_size": 8, "warmup_steps": 2})}
        )
        for label, config in demo_tokenizers(feature_dim).items()
    }


def paper_tokenizers() -> dict[str, ImageTokenizerConfig]:
    """The tokenizers of the paper: Table 3 and appendix B.3, in three stages.

    100 epochs of ImageNet-1K, 15 of CC12M, and a multi-resolution fine-tune of one epoch (RGB: five) at 224..448. An epoch is
    1.28 and 12 million images. Stage `imagenet` sees the training set of that name in the project. Table 3's base learning rate,
    5e-5, is for a batch of 256. The average's decay is the public code's (0.9999; 0.99 for semseg and CLIP).
    Not the paper's: bfloat16 for all, since float16 is known to end in NaN when RGB is continued; batches a GPU are taken for
    eight of them; CLIP's crops are drawn when the set is packed, some a sample (`TrainSetConfig.clip_crops`), not anew each time.
    """
    codebook: dict[ImageLabel, int] = {"rgb": 16384, "depth": 8192, "normal": 8192, "semseg": 4096, "clip": 8192}

    def stage(label: ImageLabel, name: str, batch: int, images: int, epochs: int, warmup_epochs: int) -> TrainingConfig:
        plain = label in ("semseg", "clip")
        is_multi = name == "multi_resolution"
        return TrainingConfig(
            name=name,
            train_set={"imagenet": "imagenet", "multi_resolution": "multi_resolution"}.get(name),
            loss=_LOSS[label],
            steps=epochs * (images // batch),
            warmup_steps=warmup_epochs * (images // batch) if warmup_epochs else 5000,  # 5000: public code
            batch_size=batch,
            learning_rate=5e-5 * batch / 256,  # Table 3
            # CLIP's crops, (0.2, 1), are packed, half of them mirrored, and its features are of images of each side, as the public
            # code computes them.
            hflip=label != "clip",
            crop_scale=None if label == "clip" else (0.8, 1.0),  # Table 3
            ema_decay=0.99 if plain else 0.9999,  # public code
            sides_px=MULTI_RESOLUTION if is_multi else (),  # B.3
            checkpoint_every=1000,
            log_every=50,
            score_every=5000,  # public code
            compile=True,
        )

    def one(label: ImageLabel) -> ImageTokenizerConfig:
        batch = 1024 if label == "clip" else 640  # Table 3
        small = 8 * (10 if label == "semseg" else 16)  # B.3: a GPU's 16, for semantic segmentation 10
        return ImageTokenizerConfig(
            label=label,
            input_px=224,
            patch_px=16,
            feature_dim=512 if label == "clip" else None,  # ViT-B/16 after its projection
            encoder=EncoderConfig(),  # Table 3: ViT-B/16
            quantizer=QuantizerConfig(codebook_size=codebook[label]),  # Table 3; its other values are the defaults
            decoder=_decoder(label, VitDecoderConfig(), DiffusionDecoderConfig()),  # Table 3: ViT-B/16, Patch-UNet
            earlier_stages=(
                stage(label, "imagenet", batch, 1_281_167, 100, 5),  # Table 3: 100 epochs, 5 of warm-up
                stage(label, "cc12m", batch, 12_000_000, 15, 1),  # Table 3: 15 epochs, 1 of warm-up
            ),
            # B.3: RGB five epochs, the first of warm-up, the others one.
            training=stage(label, "multi_resolution", small, 12_000_000, *((5, 1) if label == "rgb" else (1, 0))),
        )

    return {label: one(label) for label in codebook}


_LOSS: dict[ImageLabel, Literal["mse", "smooth_l1", "cross_entropy"]] = {
    "rgb": "mse",
    "normal": "mse",
    "depth": "smooth_l1",
    "semseg": "cross_entropy",
    "clip": "smooth_l1",
}
"""Loss functions of Table 3."""


def _decoder(
    label: ImageLabel, plain: VitDecoderConfig, denoiser: DiffusionDecoderConfig
) -> VitDecoderConfig | DiffusionDecoderConfig:
    """Table 3's choice: diffusion where blur shows. Standardised depth leaves [-1, 1], so it is not clamped."""
    if label in ("semseg", "clip"):
        return plain
    return denoiser.model_copy(update={"clamp": label != "depth"})
