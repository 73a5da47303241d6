"""The tokenizers that the authors of 4M have published, by the names of `fourmill weights add`. No torch: definitions load this."""

from dataclasses import dataclass

from fourmill.core.modality import IMAGE_TOKENS
from fourmill.tokenize.config import ImageLabel

PREFIX = "tokenizer_"  # of an image tokenizer's model name
TEXT = "text"
TEXT_FILE = "tokenizer.json"  # in its folder of the store; as the tokenizers library calls it
_LICENCE = "the authors' own for weights (LICENSE_WEIGHTS of apple/ml-4m)"


@dataclass(frozen=True)
class Released:
    """Public weights of a tokenizer."""

    source: str  # what `weights add` is given
    about: str
    licence: str  # as their authors state it
    url: str = ""  # where to fetch the file first, which is no folder of the hub


RELEASED: dict[str, Released] = {
    "tokenizer_rgb": Released(
        "hf:EPFL-VILAB/4M_tokenizers_rgb_16k_224-448", "RGB, 16,384 codewords, diffusion", _LICENCE
    ),
    "tokenizer_depth": Released(
        "hf:EPFL-VILAB/4M_tokenizers_depth_8k_224-448", "depth, 8,192 codewords, diffusion", _LICENCE
    ),
    "tokenizer_normal": Released(
        "hf:EPFL-VILAB/4M_tokenizers_normal_8k_224-448", "surface normals, 8,192 codewords, diffusion", _LICENCE
    ),
    "tokenizer_semseg": Released(
        "hf:EPFL-VILAB/4M_tokenizers_semseg_4k_224-448", "COCO classes, 4,096 codewords", _LICENCE
    ),
    "tokenizer_clip": Released(
        "hf:EPFL-VILAB/4M_tokenizers_CLIP-B16_8k_224-448", "CLIP-B/16 features, 8,192 codewords", _LICENCE
    ),
    TEXT: Released(
        "text_tokenizer_4m_wordpiece_30k.json",
        "WordPiece of captions and boxes, from fourm/utils/tokenizer",
        "Apache-2.0",
        "https://raw.githubusercontent.com/apple/ml-4m/main/fourm/utils/tokenizer/trained/text_tokenizer_4m_wordpiece_30k.json",
    ),
}
"""By model name: `models/{name}/{digest}/`."""


def label_of_name(name: str) -> ImageLabel:
    """`rgb` of `tokenizer_rgb`.

    Raises:
        ValueError: not the name of an image tokenizer.
    """
    label = name.removeprefix(PREFIX)
    for known in IMAGE_TOKENS:
        if name.startswith(PREFIX) and label == known:
            return known
    raise ValueError(f"no image tokenizer is called {name!r}; there are {', '.join(PREFIX + k for k in IMAGE_TOKENS)}")


def add_command(name: str, store_root: str) -> str:
    """The command line that puts a public tokenizer into a store, from nothing."""
    released = RELEASED[name]
    add = f"fourmill weights add {name} {released.source} --store {store_root}"
    return f"curl -fLO {released.url} && {add}" if released.url else add
