import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from fourmill.core.sequences import CLASS_NAMES, FIRST_CLASS, FIRST_WORD_PIECE, TextTokenizer, special_tokens
from fourmill.core.store import LocalStore
from fourmill.tokenize.config import TextTokenizerConfig
from fourmill.tokenize.exchange import Origin, export_text_tokenizer, import_text_tokenizer
from fourmill.tokenize.wordpiece import TextError, fit_wordpiece, report_wordpiece, train_wordpiece

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
    assert report["figures"]["known_share"] == 1.0
    assert report["figures"]["round_trip_share"] == 1.0 and report["figures"]["unknown_token_share"] == 0.0
    with pytest.raises(TextError, match="no caption"):
        fit_wordpiece(store, [], CONFIG)


def test_a_fitted_vocabulary_has_a_card(tmp_path):
    store = LocalStore(tmp_path)
    report = json.loads(store.read(fit_wordpiece(store, CAPTIONS, CONFIG)))
    card = store.read(f"{report['path']}/card.md").decode()
    for said in (
        f"Fitted WordPiece vocabulary of {report['vocab_size']} ids",
        f"- digest of tokenizer.json: {report['digest']}",
        f"- fitted on 4 captions, digest {report['captions_digest']}",
        "- eats captions as they are written",
        "| 204..4203 | coordinates",
        f"| 4284..{report['vocab_size'] - 1} | word pieces |",
        "| round_trip_share | 1.0 |",
        "| unknown_token_share | 0.0 |",
        f"| tokens_per_caption | {report['figures']['tokens_per_caption']} |",
    ):
        assert said in card
    export_text_tokenizer(store, report["path"], tmp_path / "own")
    assert (tmp_path / "own/card.md").read_text() == card
    for source in (tmp_path / "own", tmp_path / "own/tokenizer.json"):
        assert import_text_tokenizer(store, source, Origin("a test", "ours")).digest == report["digest"]
    assert store.read(f"{report['path']}/card.md").decode() == card


def test_captions_that_do_not_come_back_are_counted(tmp_path):
    store = LocalStore(tmp_path)
    fitted = json.loads(store.read(fit_wordpiece(store, CAPTIONS, CONFIG)))
    kept = ["A small DOG", "vases=12", "dogs " * 300, "wine  glass v0=3"]
    lost = ["a \u2603", "[PAD] a dog"]  # unknown, and known all the same
    report = json.loads(store.read(report_wordpiece(store, fitted["digest"], [*kept, *lost])))
    assert report["figures"]["round_trip_share"] == round(4 / 6, 4)
    assert report["figures"]["known_share"] == round(5 / 6, 4)
    assert report["figures"]["unknown_token_share"] > 0


def public_file(path: Path) -> Path:
    """A file as the public one is laid out: 30,000 ids, of which those are words here that the tests use."""
    words = {
        6105: "glasses",
        6302: "##house",
        6424: "wine",
        5000: "a",
        5001: "small",
        5002: "v2",
        5003: "=",
        5004: "1000",
    }
    words |= {5005: "v0", 5006: "3", 5007: "hot", 5008: "##s"}
    vocab = {token: i for i, token in enumerate(special_tokens())}
    vocab |= {words.get(i, f"##fill{i}"): i for i in range(FIRST_WORD_PIECE, 30_000)}
    flags: list[dict[str, Any]] = [
        {
            "id": i,
            "content": t,
            "single_word": i > 3,
            "lstrip": False,
            "rstrip": False,
            "normalized": i >= FIRST_CLASS,
            "special": True,
        }
        for i, t in enumerate(special_tokens())
    ]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": flags,
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": None,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocab,
        },
    }
    path.write_text(json.dumps(content))
    return path


def test_a_file_of_the_public_layout_is_taken_as_it_is_and_gives_the_worked_ids(tmp_path: Path) -> None:
    store, source = LocalStore(tmp_path / "store"), public_file(tmp_path / "text.json")
    made = import_text_tokenizer(store, source, Origin("a test", "ours"))
    assert store.read(f"{made.path}/tokenizer.json") == source.read_bytes()
    tokenizer = TextTokenizer(source.read_bytes())
    assert tokenizer.vocab_size == 30_000
    for text, ids in (
        ("v0=12 v1=7 v2=300 v3=999 dining table", [216, 1211, 2504, 4203, 4231]),
        ("Wine Glass", [4282]),
        ("WINE GLASSES", [6424, 6105]),
        ("hot dog", [4242]),
        ("doghouse", [4232, 6302]),
        ("V0=3", [5005, 5003, 5006]),  # coordinates are case-sensitive: an ordinary word here
        ("v2=1000", [5002, 5003, 5004]),
        ("v2=999", [3203]),
        ("a small DOG", [5000, 5001, 4232]),
        ("[S_1] dogs", [5, 4232, 5008]),
    ):
        assert tokenizer.encode(text) == [*ids, 3], text
    report = json.loads(store.read(report_wordpiece(store, made.digest, ["a small dog", "zzz"])))
    assert (
        report["digest"] == made.digest and report["figures"]["known_share"] == 0.5 and report["vocab_size"] == 30_000
    )
    card = store.read(f"{made.path}/card.md").decode()
    for said in (
        "Imported WordPiece vocabulary of 30000 ids",
        "- eats captions",
        "- origin: a test",
        "- licence: ours",
    ):
        assert said in card
    assert "- training data: not known here" in card
    assert f"Of 2 captions, digest {report['captions_digest']}." in card and "| round_trip_share | 0.5 |" in card
    report_wordpiece(store, made.digest, ["a small dog"])
    again = store.read(f"{made.path}/card.md").decode()
    assert again.count("## Figures") == 1 and "| round_trip_share | 1.0 |" in again
    with pytest.raises(TextError, match="add it again"):
        report_wordpiece(store, "0" * 64, ["a small dog"])


def test_a_corpus_that_is_large_enough_fills_the_vocabulary_exactly() -> None:
    draw = random.Random(0)
    captions = [" ".join("".join(draw.choices("aeiourstlnm", k=7)) for _ in range(10)) for _ in range(400)]
    config = TextTokenizerConfig(vocab_size=7000)
    filled = train_wordpiece(captions, config)
    assert TextTokenizer(filled).vocab_size == 7000
    vocab = json.loads(filled)["model"]["vocab"]
    assert sorted(vocab.values()) == list(range(7000))
    assert [t for t, i in sorted(vocab.items(), key=lambda item: item[1])[FIRST_CLASS:FIRST_WORD_PIECE]] == sorted(
        CLASS_NAMES
    )
    assert TextTokenizerConfig().vocab_size == 30_000


@pytest.mark.parametrize(("least", "words"), [(0, {"sunny", "rock"}), (2, {"sunny"}), (3, {"sunny"}), (4, set())])
def test_a_piece_that_occurs_less_often_than_is_asked_for_is_not_made(least: int, words: set[str]) -> None:
    captions = ["sunny", "sunny sunny", "rock"]
    config = TextTokenizerConfig(vocab_size=4400, min_frequency=least)
    tokenizer = TextTokenizer(train_wordpiece(captions, config))
    assert {word for word in ("sunny", "rock") if len(tokenizer.encode(word)) == 2} == words  # and [EOS]
