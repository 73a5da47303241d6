import pickle
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer

from fourmill.core.coco import COCO_THINGS
from fourmill.core.crops import centre_crop
from fourmill.core.labels import Box
from fourmill.core.sequences import (
    CLASS_NAMES,
    FIRST_CLASS,
    FIRST_WORD_PIECE,
    SequenceError,
    TextTokenizer,
    detection_text,
    parse_detection,
    sentinel,
    special_tokens,
)

WIDTH, HEIGHT = 600, 400
BOXES = [
    Box(0.5, 0.5, 0.9, 0.9, 0.90, "dog"),
    Box(0.1, 0.0, 0.4, 0.3, 0.61, "person"),
    Box(0.2, 0.2, 0.3, 0.3, 0.59, "cat"),
]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ((0, 0, 400, 600, 0), "v0=100 v1=0 v2=400 v3=300 person v0=500 v1=500 v2=899 v3=899 dog"),
        ((0, 0, 400, 600, 1), "v0=100 v1=500 v2=500 v3=899 dog v0=599 v1=0 v2=899 v3=300 person"),
        ((0, 300, 400, 300, 0), "v0=0 v1=500 v2=799 v3=899 dog"),
    ],
)
def test_boxes_are_written_as_the_public_code_writes_them(row, text):
    assert detection_text(BOXES, WIDTH, HEIGHT, row) == text


def test_no_boxes_give_an_empty_text():
    assert detection_text([], WIDTH, HEIGHT, centre_crop(WIDTH, HEIGHT)) == ""


corner = st.floats(0, 1, allow_nan=False)


@given(st.lists(st.tuples(corner, corner, corner, corner, st.sampled_from(COCO_THINGS)), max_size=6), st.booleans())
def test_what_is_written_is_read_back_in_order_and_within_a_bin(corners, hflip):
    boxes = [
        Box(min(a, c), min(b, d), max(a, c), max(b, d), 0.9, name)
        for a, b, c, d, name in corners
        if abs(a - c) > 0.01 and abs(b - d) > 0.01
    ]
    text = detection_text(boxes, 50, 50, (0, 0, 50, 50, int(hflip)))
    found = parse_detection(text)
    assert sorted(b.class_name for b in found) == sorted(b.class_name for b in boxes)
    distances = [b.xmin**2 + b.ymin**2 for b in found]
    assert all(near <= far + 0.003 for near, far in pairwise(distances))
    for box in boxes:
        xmin, xmax = (1 - box.xmax, 1 - box.xmin) if hflip else (box.xmin, box.xmax)
        near = [b for b in found if b.class_name == box.class_name and abs(b.xmin - xmin) + abs(b.xmax - xmax) < 0.002]
        assert near
    assert all(0 <= b.xmin < b.xmax <= 1 and 0 <= b.ymin < b.ymax <= 1 for b in found)


def test_broken_boxes_in_a_generated_text_are_passed_over():
    text = "v0=1 v1=2 dog v0=10 v1=20 v2=30 v3=40 hot dog [S_2] v0=9 v1=9 v2=1 v3=99 cat v0=5 v1=5 v2=50 v3=50 unicorn"
    assert [b.class_name for b in parse_detection(text)] == ["hot dog"]


def test_the_special_tokens_stand_where_the_public_vocabulary_has_them():
    tokens = special_tokens()
    assert len(tokens) == FIRST_WORD_PIECE == 4284
    assert tokens[:4] == ["[PAD]", "[UNK]", "[SOS]", "[EOS]"]
    assert (tokens[4], tokens[203], tokens[204], tokens[4203]) == ("[S_0]", "[S_199]", "v0=0", "v3=999")
    assert (tokens[FIRST_CLASS], tokens[4253], tokens[4232], tokens[4283]) == ("airplane", "person", "dog", "zebra")
    assert CLASS_NAMES.index("dining table") + FIRST_CLASS == 4231
    assert sentinel(1) == 5
    with pytest.raises(ValueError, match="200"):
        sentinel(200)


def _file(tokens: list[str]) -> bytes:
    tokenizer = Tokenizer(WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = BertPreTokenizer()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(t, single_word=i > 3) for i, t in enumerate(tokens[:FIRST_WORD_PIECE])])
    return tokenizer.to_str().encode()


def test_a_file_is_checked_encoded_with_and_decoded_keeping_special_tokens():
    tokenizer = TextTokenizer(_file([*special_tokens(), "b", "##all"]))
    text = "v0=12 v1=7 v2=300 v3=999 dining table"
    assert tokenizer.encode(text) == [216, 1211, 2504, 4203, 4231, 3]
    assert tokenizer.encode("") == [3]
    assert tokenizer.decode([216, 1211, 2504, 4203, 4231, 3, 0, 0]) == text
    assert tokenizer.decode([4284, 4285, 5]) == "ball [S_1]"
    assert tokenizer.encode_batch([text, ""]) == [tokenizer.encode(text), [3]]
    assert len(tokenizer.encode("dog " * 400)) == 256
    assert pickle.loads(pickle.dumps(tokenizer)).encode(text) == tokenizer.encode(text)
    with pytest.raises(SequenceError, match="outside this vocabulary"):
        tokenizer.decode([99_999])


def test_a_file_with_another_layout_is_refused():
    with pytest.raises(SequenceError, match="joint layout"):
        TextTokenizer(_file(["[PAD]", "[UNK]", "[EOS]", "[SOS]", *special_tokens()[4:]]))
    with pytest.raises(SequenceError, match="not a tokenizer"):
        TextTokenizer(b"{}")


@pytest.mark.parametrize(("score", "is_written"), [(0.6, True), (0.5999, False)])
def test_boxes_from_the_papers_score_on_are_written(score: float, is_written: bool) -> None:
    text = detection_text([Box(0.1, 0.1, 0.5, 0.5, score, "person")], 100, 100, (0, 0, 100, 100, 0))
    assert bool(text) == is_written
