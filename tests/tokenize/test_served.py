"""A tokenizer from a file serves only a project that expects one of its kind."""

from typing import Any

import pytest

from fourmill.core.store import Store
from fourmill.tokenize.load import ModelError, load_image_tokenizer, read_config
from fourmill.tokenize.served import report_tokenizer


@pytest.mark.parametrize(
    ("field", "has", "others"),
    [("codebook_size", 64, (32, 128)), ("feature_dim", 12, (8, 16)), ("patch_px", 8, (4, 16))],
)
def test_a_tokenizer_of_another_vocabulary_width_or_patch_than_the_projects_is_refused(
    store: Store, tiny: Any, chain: Any, field: str, has: int, others: tuple[int, int]
) -> None:
    """More codewords than 4M has ids, or features that no network here makes, would be met in the middle of a run."""
    folder, _ = chain.tokenizer("clip")
    config = load_image_tokenizer(store, folder).config
    assert getattr(config, field) == has
    for other in others:
        wanted = config.model_copy(update={field: other})
        if field == "codebook_size":  # which is the quantizer's
            wanted = config.model_copy(update={"quantizer": config.quantizer.model_copy(update={field: other})})
        with pytest.raises(ModelError, match=f"{folder} has {field} {has}, the project's clip tokenizer {other}"):
            report_tokenizer(store, "tokenizer_clip", folder, wanted, tiny.train_set.path, tiny.train_set.digest)
    assert not store.list("models/tokenizer_clip/served")


def test_it_is_refused_although_it_was_scored_for_a_project_that_it_fitted(store: Store, tiny: Any, chain: Any) -> None:
    folder, _ = chain.tokenizer("clip")
    config = read_config(store, folder)
    place = (tiny.train_set.path, tiny.train_set.digest)
    report_tokenizer(store, "tokenizer_clip", folder, config, *place)
    with pytest.raises(ModelError, match="feature_dim 12"):
        report_tokenizer(store, "tokenizer_clip", folder, config.model_copy(update={"feature_dim": 8}), *place)
