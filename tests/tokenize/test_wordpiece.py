import json

import pytest
from tokenizers import Tokenizer

from fourmill.core.sequences import FIRST_WORD_PIECE, TextTokenizer
from fourmill.core.store import LocalStore
from fourmill.tokenize.config import TextTokenizerConfig
from fourmill.tokenize.wordpiece import TextError, fit_wordpiece, train_wordpiece

CAPTIONS = [
    "A small dog playing with a red ball",
    "wine glasses in the greenhouse",
    "a traffic light v2=1000",
    "vases = 12",
]
CONFIG = TextTokenizerConfig(vocab_size=4400)


@pytest.fixture(scope="module")
def file() -> bytes:
    return train_wordpiece(CAPTIONS, CONFIG)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("v0=12 v1=7 v2=300 v3=999 dining table", [216, 1211, 2504, 4203, 4231]),
        ("Wine Glass", [4282]),
        ("hot dog", [4242]),
        ("[PAD] [UNK] [SOS] [EOS]", [0, 1, 2, 3]),
        ("[S_0] [S_199]", [4, 203]),
        ("airplane zebra person DOG", [4204, 4283, 4253, 4232]),
    ],
)
def test_the_special_tokens_have_the_public_ids(file, text, ids):
    assert TextTokenizer(file).encode(text) == [*ids, 3]


def test_what_only_looks_special_is_word_pieces(file):
    tokenizer = TextTokenizer(file)
    for text in ("WINE GLASSES", "V0=3", "v2=1000"):
        ids = tokenizer.encode(text)[:-1]
        assert len(ids) > 1 and all(i >= FIRST_WORD_PIECE or i == 1 for i in ids)
    house = tokenizer.encode("doghouse")
    assert house[0] == 4232 and tokenizer.decode(house) == "doghouse"
    assert (
        tokenizer.decode(tokenizer.encode("A small dog playing with a red ball"))
        == "a small dog playing with a red ball"
    )


def test_the_file_is_of_the_public_kind(file):
    content = json.loads(file)
    assert content["version"] == "1.0" and len(content["added_tokens"]) == 4284
    assert content["model"]["type"] == "WordPiece" and content["model"]["unk_token"] == "[UNK]"
    assert content["model"]["max_input_chars_per_word"] == 100
    assert (content["normalizer"]["type"], content["normalizer"]["lowercase"]) == ("BertNormalizer", True)
    assert content["pre_tokenizer"] == {"type": "BertPreTokenizer"}
    assert content["decoder"] == {"type": "WordPiece", "prefix": "##", "cleanup": True}
    assert content["truncation"] is content["padding"] is content["post_processor"] is None
    flags = {t["content"]: (t["single_word"], t["normalized"], t["special"]) for t in content["added_tokens"]}
    assert flags["[EOS]"] == (False, False, True)
    assert flags["[S_1]"] == flags["v3=999"] == (True, False, True)
    assert flags["traffic light"] == (True, True, True)
    assert Tokenizer.from_buffer(file).get_vocab_size() <= 4400


def test_equal_captions_in_any_order_give_equal_bytes(file):
    for _ in range(3):  # the library's hash maps are seeded at random
        assert train_wordpiece(CAPTIONS[::-1], CONFIG) == file
    assert train_wordpiece([*CAPTIONS, "another one"], CONFIG) != file


def test_fitting_publishes_the_file_and_says_how_well_it_knows_the_captions(tmp_path):
    store = LocalStore(tmp_path)
    report = json.loads(store.read(fit_wordpiece(store, CAPTIONS, CONFIG)))
    assert report["path"] == f"models/text/{report['digest']}"
    tokenizer = TextTokenizer(store.read(f"{report['path']}/tokenizer.json"))
    assert report["vocab_size"] == tokenizer.vocab_size
    assert report["known_share"] == 1.0
    with pytest.raises(TextError, match="no caption"):
        fit_wordpiece(store, [], CONFIG)
