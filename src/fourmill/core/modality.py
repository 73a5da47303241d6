"""The modality table: names, folders, member formats, vocabularies and grids, as the public 4M lays them out.

`tok_depth@224` is a modality of 14x14 tokens made from 224-pixel crops with 16-pixel patches; the demo's `tok_depth@64`
is 8x8 tokens from 64-pixel crops with 8-pixel patches. Pixels (`rgb@224`) are input only. A training set may hold a second
resolution of the same crops (`tok_rgb@448` beside `tok_rgb@224`), for super-resolution.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["pixels", "tokens", "text"]
Resolutions = Literal["base", "both"]

IMAGE_TOKENS = ("rgb", "depth", "normal", "semseg", "clip")
TEXTS = ("caption", "det")
LABEL_FOLDERS = {"depth": "depth", "normal": "normal", "semseg": "semseg", "det": "boxes"}
LABELS = tuple(LABEL_FOLDERS)
IMAGES = "images"  # folder that all labels are made from
CROPS = "crop_settings"  # folder of the crops that all modalities of a sample were made by
TEXT_MAX_TOKENS = 256
NUM_SEMSEG_CLASSES = 133  # COCO panoptic: 80 things, 53 stuff
SEMSEG_INVALID = 255


@dataclass(frozen=True)
class Modality:
    """One modality as the model and the shards see it."""

    name: str
    kind: Kind
    folder: str  # below {dataset}/{split}/
    ext: str  # of the tar members
    grid: int  # tokens along a side; 0 for text
    vocab_size: int | None  # None for pixels

    @property
    def max_tokens(self) -> int:
        """Tokens of one sample: the whole grid, or the longest text."""
        return TEXT_MAX_TOKENS if self.kind == "text" else self.grid**2

    @property
    def label(self) -> str:
        """`tok_depth` of `tok_depth@224`; texts are their own."""
        return self.name.partition("@")[0]

    @property
    def px(self) -> int | None:
        """Side of the crops behind an image modality; None for texts, which have no size."""
        side = self.name.partition("@")[2]
        return int(side) if side else None

    @property
    def id(self) -> int:
        """The public code's modality id: sha256 of the name modulo 2^15."""
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % 2**15


def tokens_name(label: str, input_px: int) -> str:
    """`tok_depth@224` from `depth` and 224."""
    return f"tok_{label}@{input_px}"


def tokens_asset(modality: str, base_px: int) -> str:
    """The asset that makes a modality of tokens or texts: `tokens/depth` of `tok_depth@224`, `tokens/depth_448` of `tok_depth@448`.

    Args:
        base_px: side of the crops of the base resolution.
    """
    label, _, px = modality.removeprefix("tok_").partition("@")
    return f"tokens/{label}" if px in ("", str(base_px)) else f"tokens/{label}_{px}"


def modality_table(
    input_px: int,
    patch_px: int,
    vocab_sizes: Mapping[str, int],
    text_vocab: int,
    second_px: int | None = None,
    second_labels: Sequence[str] = (),
) -> dict[str, Modality]:
    """Every modality of one training set by name: pixels and image tokens of each resolution, then texts.

    Args:
        input_px: side of the crops, a multiple of `patch_px`.
        vocab_sizes: codebook size of each image tokenizer (keys of `IMAGE_TOKENS`).
        text_vocab: size of the joint WordPiece vocabulary.
        second_px: side of the crops of a second resolution.
        second_labels: keys of `vocab_sizes` that are tokenized there too; its pixels are there when rgb is.

    Raises:
        ValueError: a side is not a multiple of the patch, or both are the same.
    """
    if second_px == input_px:
        raise ValueError(f"the second resolution has the side of the first, {input_px}")
    table = _images(input_px, patch_px, vocab_sizes, with_pixels=True)
    if second_px is not None:
        chosen = {label: vocab_sizes[label] for label in second_labels}
        table |= _images(second_px, patch_px, chosen, with_pixels="rgb" in chosen)
    for text, ext in zip(TEXTS, ("txt", "json"), strict=True):
        table[text] = Modality(text, "text", text, ext, 0, text_vocab)
    return table


def _images(px: int, patch_px: int, vocab_sizes: Mapping[str, int], with_pixels: bool) -> dict[str, Modality]:
    if px % patch_px:
        raise ValueError(f"crops of {px} pixels are not a multiple of patch_px {patch_px}")
    grid = px // patch_px
    pixels = [Modality(f"rgb@{px}", "pixels", "rgb", "jpg", grid, None)] if with_pixels else []
    names = {tokens_name(label, px): vocab for label, vocab in vocab_sizes.items()}
    tokens = [Modality(name, "tokens", name, "npy", grid, vocab) for name, vocab in names.items()]
    return {modality.name: modality for modality in (*pixels, *tokens)}
