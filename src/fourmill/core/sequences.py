"""Captions and boxes as sequences of one joint vocabulary, laid out as the public 4M's text tokenizer.

ids 0..3 [PAD] [UNK] [SOS] [EOS]; 4..203 sentinels [S_0]..[S_199]; 204..4203 corner coordinates v0=0..v3=999, a thousand
each for xmin, ymin, xmax, ymax; 4204..4283 the 80 COCO things in alphabetical order; word pieces from 4284 on.
A box is five tokens; boxes stand in the order of their top left corner's distance to the origin (4M, appendix B.2).
"""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from fourmill.core.coco import COCO_THINGS
from fourmill.core.crops import CropRow
from fourmill.core.labels import Box
from fourmill.core.modality import TEXT_MAX_TOKENS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, UNK, SOS, EOS = 0, 1, 2, 3
FIRST_SENTINEL = 4
NUM_SENTINELS = 200
FIRST_COORDINATE = FIRST_SENTINEL + NUM_SENTINELS  # 204
NUM_BINS = 1000
FIRST_CLASS = FIRST_COORDINATE + 4 * NUM_BINS  # 4204
CLASS_NAMES = tuple(sorted(COCO_THINGS))
FIRST_WORD_PIECE = FIRST_CLASS + len(CLASS_NAMES)  # 4284
MIN_SCORE = 0.6  # boxes below are not written, as in the paper (B.1); labellers' scores are on ViTDet's scale

_BOX = re.compile(
    r"v0=(\d{1,3}) v1=(\d{1,3}) v2=(\d{1,3}) v3=(\d{1,3}) ("
    + "|".join(sorted(CLASS_NAMES, key=len, reverse=True))
    + r")\b"
)


class SequenceError(ValueError):
    """A text tokenizer or a text that does not follow the layout."""


def sentinel(number: int) -> int:
    """Id of [S_number]; masking numbers spans from 1, [S_0] is unused. Raises ValueError."""
    if not 0 <= number < NUM_SENTINELS:
        raise ValueError(f"sentinel {number} does not exist: there are {NUM_SENTINELS}, from 0")
    return FIRST_SENTINEL + number


def is_sentinel(token: int) -> bool:
    """Whether an id is a sentinel's."""
    return FIRST_SENTINEL <= token < FIRST_SENTINEL + NUM_SENTINELS


def special_tokens() -> list[str]:
    """The 4,284 special tokens in the order of their ids."""
    return [
        *("[PAD]", "[UNK]", "[SOS]", "[EOS]"),
        *(f"[S_{i}]" for i in range(NUM_SENTINELS)),
        *(f"v{corner}={i}" for corner in range(4) for i in range(NUM_BINS)),
        *CLASS_NAMES,
    ]


def detection_text(boxes: Iterable[Box], width: int, height: int, row: CropRow) -> str:
    """Boxes as the public code writes them after a crop: `v0=100 v1=0 v2=400 v3=300 person v0=...`.

    Boxes under the minimum score or without area inside the crop are left out, the rest clipped, mirrored where the
    crop is, and ordered by the distance of their top left corner.

    Args:
        boxes: in [0, 1] of the full image.
        width: of the full image, in pixels.
        height: of the full image, in pixels.
        row: crop in pixels of the full image.

    Returns:
        The text; empty when no box is left. No end token: encoding adds it.
    """
    kept = [(box.class_name, _cropped(box, width, height, row)) for box in boxes if box.score >= MIN_SCORE]
    visible = [(name, corners) for name, corners in kept if corners is not None]
    visible.sort(key=lambda item: item[1][0] ** 2 + item[1][1] ** 2)
    return " ".join(
        " ".join(f"v{i}={round(value * (NUM_BINS - 1))}" for i, value in enumerate(corners)) + f" {name}"
        for name, corners in visible
    )


def parse_detection(text: str) -> list[Box]:
    """The complete boxes in a text, generated or written, in its order; anything else in it is passed over.

    Boxes without area are dropped. Scores are 1.
    """
    boxes: list[Box] = []
    for match in _BOX.finditer(text):
        xmin, ymin, xmax, ymax = (int(match[i]) / (NUM_BINS - 1) for i in range(1, 5))
        if xmin < xmax and ymin < ymax:
            boxes.append(Box(xmin, ymin, xmax, ymax, 1.0, match[5]))
    return boxes


class TextTokenizer:
    """The joint WordPiece vocabulary from its file; ids are as laid out above."""

    def __init__(self, file: bytes) -> None:
        """Read a tokenizer.json.

        Raises:
            SequenceError: it is not one, or its special tokens are not those of the layout.
        """
        self._file = file
        _ = self._tokenizer

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_buffer(self._file)
        except Exception as error:  # the library raises bare Exception
            raise SequenceError(f"not a tokenizer.json: {error}; fit the text tokenizer again") from error
        for expected, token in enumerate(special_tokens()):
            if (found := tokenizer.token_to_id(token)) != expected:
                raise SequenceError(
                    f"token {token!r} has id {found}, expected {expected}: this file does not follow 4M's joint layout"
                )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Ids that encoding can give: special tokens and word pieces."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of a caption or a detection text, [EOS] last, cut to 256 (a cut text has no [EOS])."""
        return [*self._tokenizer.encode(text).ids, EOS][:TEXT_MAX_TOKENS]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts."""
        return [[*e.ids, EOS][:TEXT_MAX_TOKENS] for e in self._tokenizer.encode_batch(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        """The text up to [EOS], special tokens kept (coordinates and class names are special), padding left out."""
        ids = list(ids)
        end = ids.index(EOS) if EOS in ids else len(ids)
        words: list[str] = []
        for token in (self._tokenizer.id_to_token(i) for i in ids[:end] if i != PAD):
            if token is None:
                raise SequenceError(f"ids {ids} hold one outside this vocabulary of {self.vocab_size}")
            if token.startswith("##") and words:
                words[-1] += token[2:]
            else:
                words.append(token)
        return " ".join(words)

    def __reduce__(self) -> tuple[type["TextTokenizer"], tuple[bytes]]:
        return TextTokenizer, (self._file,)


def _cropped(box: Box, width: int, height: int, row: CropRow) -> tuple[float, float, float, float] | None:
    """Corners in [0, 1] of the crop, or None when nothing of the box is inside."""
    top, left, crop_height, crop_width, hflip = row
    xmin, xmax = ((x * width - left) / crop_width for x in (box.xmin, box.xmax))
    ymin, ymax = ((y * height - top) / crop_height for y in (box.ymin, box.ymax))
    xmin, ymin, xmax, ymax = (min(max(value, 0.0), 1.0) for value in (xmin, ymin, xmax, ymax))
    if xmin >= xmax or ymin >= ymax:
        return None
    return (1 - xmax, ymin, 1 - xmin, ymax) if hflip else (xmin, ymin, xmax, ymax)
