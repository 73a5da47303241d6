"""The modality table: names, folders, member formats, vocabularies and grids, as the public 4M lays them out.

`tok_depth@224` is a modality of 14x14 tokens made from 224-pixel crops with 16-pixel patches; the demo's `tok_depth@64`
is 8x8 tokens from 64-pixel crops with 8-pixel patches. Pixels (`rgb@224`) are input only.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["pixels", "tokens", "text"]

IMAGE_TOKENS = ("rgb", "depth", "normal", "semseg", "clip")
TEXTS = ("caption", "det")
LABELS = ("depth", "normal", "semseg", "det")
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
    def id(self) -> int:
        """The public code's modality id: sha256 of the name modulo 2^15."""
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % 2**15


def tokens_name(label: str, input_px: int) -> str:
    """`tok_depth@224` from `depth` and 224."""
    return f"tok_{label}@{input_px}"


def modality_table(
    input_px: int, patch_px: int, vocab_sizes: Mapping[str, int], text_vocab: int
) -> dict[str, Modality]:
    """Every modality of one training set by name: pixels, image tokens, then texts.

    Args:
        input_px: side of the crops, a multiple of `patch_px`.
        vocab_sizes: codebook size of each image tokenizer (keys of `IMAGE_TOKENS`).
        text_vocab: size of the joint WordPiece vocabulary.

    Raises:
        ValueError: the side is not a multiple of the patch.
    """
    if input_px % patch_px:
        raise ValueError(f"input_px {input_px} is not a multiple of patch_px {patch_px}")
    grid = input_px // patch_px
    table = {f"rgb@{input_px}": Modality(f"rgb@{input_px}", "pixels", "rgb", "jpg", grid, None)}
    for label, vocab in vocab_sizes.items():
        name = tokens_name(label, input_px)
        table[name] = Modality(name, "tokens", name, "npy", grid, vocab)
    for text, ext in zip(TEXTS, ("txt", "json"), strict=True):
        table[text] = Modality(text, "text", text, ext, 0, text_vocab)
    return table
