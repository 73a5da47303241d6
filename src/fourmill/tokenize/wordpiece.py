"""Fitting the joint WordPiece vocabulary of captions and boxes (4M, appendix B.2), in the public file's layout."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.trainers import WordPieceTrainer

from fourmill.core.digest import digest_bytes, digest_json
from fourmill.core.sequences import (
    EOS,
    FIRST_CLASS,
    FIRST_SENTINEL,
    FIRST_WORD_PIECE,
    UNK,
    TextTokenizer,
    special_tokens,
)
from fourmill.core.store import Store
from fourmill.tokenize.card import fitted_text_card, with_figures
from fourmill.tokenize.config import TEXT_VERSION, TextTokenizerConfig
from fourmill.tokenize.released import TEXT_FILE

_PREFIX = "##"  # of a piece that continues a word
_MAX_CHARS = 100  # of a word; longer ones are unknown
_MOST_ROUND_TRIPS = 50_000  # captions that are decoded again; of more, as many evenly spread


class TextError(ValueError):
    """Captions that no vocabulary can be fitted on."""


def fit_wordpiece(store: Store, captions: Sequence[str], config: TextTokenizerConfig) -> str:
    """Fit, publish `models/text/{digest}/tokenizer.json` with its card, and say how well it knows the captions.

    Args:
        captions: of the training split; their order does not matter.

    Returns:
        Store path of the report: digest, path (the folder), vocab_size, and figures: shares of captions that are known and that
        come back, share of [UNK] among tokens, tokens_per_caption.

    Raises:
        TextError: no caption.
    """
    if not captions:
        raise TextError(
            "no caption to fit the text tokenizer on: look at the images ledger of the training set's blocks"
        )
    file = train_wordpiece(captions, config)
    digest = digest_bytes(file)
    folder = f"models/text/{digest}"
    store.write(f"{folder}/{TEXT_FILE}", file)
    report = _report(file, captions)
    store.write(f"{folder}/card.md", fitted_text_card(report, config).encode())
    store.write(f"{folder}/report.json", json.dumps(report, indent=1).encode())
    return f"{folder}/report.json"


def report_wordpiece(store: Store, digest: str, captions: Sequence[str]) -> str:
    """Say how well a stored vocabulary, which was imported, knows captions.

    Returns:
        Store path of the report, as of `fit_wordpiece`.

    Raises:
        TextError: no caption, or no vocabulary of that digest.
    """
    if not captions:
        raise TextError(
            "no caption to score the text tokenizer on: look at the images ledger of the training set's blocks"
        )
    folder = f"models/text/{digest}"
    try:
        file = store.read(f"{folder}/{TEXT_FILE}")
    except FileNotFoundError:
        raise TextError(f"no vocabulary at {folder}: add it again with `fourmill weights add text`") from None
    report = _report(file, captions)
    card, path = f"{folder}/card.md", f"{folder}/served/{report['captions_digest']}.json"
    if store.exists(card):
        store.write(card, with_figures(store.read(card).decode(), report).encode())
    store.write(path, json.dumps(report, indent=1).encode())
    return path


def _report(file: bytes, captions: Sequence[str]) -> dict[str, Any]:
    digest, tokenizer = digest_bytes(file), TextTokenizer(file)
    captions = sorted(captions)
    ids = tokenizer.encode_batch(captions)
    known = sum(UNK not in found for found in ids) / len(ids)
    pieces = Counter(chain.from_iterable(ids))
    return {
        "name": "text",
        "digest": digest,
        "path": f"models/text/{digest}",
        "vocab_size": tokenizer.vocab_size,
        "num_captions": len(captions),
        "captions_digest": digest_json(captions),
        "code_version": TEXT_VERSION,
        "figures": {
            "known_share": round(known, 4),
            "round_trip_share": round(_round_trip_share(file, captions, ids), 4),
            "unknown_token_share": round(pieces[UNK] / pieces.total(), 4),
            "tokens_per_caption": round(sum(map(len, ids)) / len(ids), 2),
            "word_pieces_used": sum(i >= FIRST_WORD_PIECE for i in pieces),
        },
        "baseline": {},
    }


def _round_trip_share(file: bytes, captions: Sequence[str], ids: Sequence[Sequence[int]]) -> float:
    """Captions whose ids decode to them, as the file's normaliser has them; of one that was cut, to its beginning.

    Compared word by word: decoding sets a space around every punctuation mark.
    """
    tokenizer, pipeline = TextTokenizer(file), Tokenizer.from_buffer(file)
    normalise = pipeline.normalizer.normalize_str if pipeline.normalizer else str

    def words(text: str) -> str:
        return " ".join(word for word, _ in pipeline.pre_tokenizer.pre_tokenize_str(text))

    step = -(-len(captions) // _MOST_ROUND_TRIPS)
    came_back = [
        words(normalise(caption)) == words(decoded)
        if EOS in found
        else words(normalise(caption)).startswith(words(decoded))
        for caption, found, decoded in (
            (caption, found, tokenizer.decode(found))
            for caption, found in zip(captions[::step], ids[::step], strict=True)
        )
    ]
    return sum(came_back) / len(came_back)


def train_wordpiece(captions: Sequence[str], config: TextTokenizerConfig) -> bytes:
    """The tokenizer.json of a vocabulary fitted on captions; equal captions in any order give equal bytes.

    A small corpus may hold fewer word pieces than the vocabulary has room for; ids above are then never used.
    """
    captions = sorted(captions)
    tokenizer = _pipeline(WordPiece(unk_token="[UNK]"))
    # The trainer numbers `##x` pieces in the order of a randomly seeded hash map, and ties between pieces are broken by
    # these numbers: naming them beforehand, as if special, makes the fit the same every time.
    named = [*special_tokens(), *_continuations(tokenizer, captions)]
    trainer = WordPieceTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=named,
        show_progress=False,
        continuing_subword_prefix=_PREFIX,
    )
    tokenizer.train_from_iterator(captions, trainer)
    vocab = tokenizer.get_vocab()
    fitted = _pipeline(WordPiece(vocab=vocab, unk_token="[UNK]", max_input_chars_per_word=_MAX_CHARS))
    fitted.add_special_tokens([_added(i, token) for i, token in enumerate(special_tokens())])
    return fitted.to_str().encode()


def _pipeline(model: WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = BertNormalizer(clean_text=True, handle_chinese_chars=True, lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.decoder = WordPieceDecoder(prefix=_PREFIX, cleanup=True)
    return tokenizer


def _continuations(tokenizer: Tokenizer, captions: Sequence[str]) -> list[str]:
    """`##x` for every character that stands inside a word, sorted."""
    normalise, split = tokenizer.normalizer.normalize_str, tokenizer.pre_tokenizer.pre_tokenize_str
    inside = {char for caption in captions for word, _ in split(normalise(caption)) for char in word[1:]}
    return [f"{_PREFIX}{char}" for char in sorted(inside)]


def _added(token_id: int, token: str) -> AddedToken:
    """Specials split off anywhere; sentinels and coordinates as whole words; class names in any case too."""
    return AddedToken(token, single_word=token_id >= FIRST_SENTINEL, normalized=token_id >= FIRST_CLASS, special=True)
