import numpy as np
import pytest
import torch

from fourmill.core.modality import Modality
from fourmill.core.sequences import EOS, FIRST_SENTINEL, NUM_SENTINELS
from fourmill.train.config import ModelConfig
from fourmill.train.generate import Decoding, generate, generate_from_caption, generate_from_rgb
from fourmill.train.model import FourM
from fourmill.train.visible import Visible, visible_inputs, visible_rgb

RGB = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)


@pytest.fixture
def model(table: dict[str, Modality]) -> FourM:
    torch.manual_seed(1)
    config = ModelConfig(dim=32, encoder_depth=1, decoder_depth=1, num_heads=2, embedding_std=1.0)
    return FourM(config, table.values(), 8).eval()


def _same(one: dict, other: dict) -> bool:
    return all(np.array_equal(one[k], other[k]) if not isinstance(one[k], list) else one[k] == other[k] for k in one)


@pytest.mark.parametrize("steps", [1, 4, 40])
def test_every_slot_is_filled_with_ids_of_its_vocabulary(model: FourM, steps: int):
    found = generate_from_rgb(model, RGB, steps=steps, max_text=6)
    assert set(found) == {"caption", "det", "tok_depth@32", "tok_semseg@32"}
    for name in ("tok_depth@32", "tok_semseg@32"):
        tokens = found[name]
        assert isinstance(tokens, np.ndarray) and tokens.shape == (3, 16) and tokens.min() >= 0 and tokens.max() < 12
    for row in (*found["caption"], *found["det"]):
        assert len(row) <= 6 and EOS not in row
        assert not any(FIRST_SENTINEL <= i < FIRST_SENTINEL + NUM_SENTINELS for i in row)


def test_equal_seeds_give_equal_draws_and_neighbours_do_not_matter(model: FourM):
    options = {"targets": ["tok_depth@32", "caption"], "temperature": 1.0, "max_text": 5}
    one = generate_from_rgb(model, RGB, seed=3, **options)  # type: ignore[arg-type]
    assert _same(one, generate_from_rgb(model, RGB, seed=3, **options))  # type: ignore[arg-type]
    assert not _same(one, generate_from_rgb(model, RGB, seed=4, **options))  # type: ignore[arg-type]
    alone = generate_from_rgb(model, RGB[:1], seed=3, **options)  # type: ignore[arg-type]
    assert np.array_equal(alone["tok_depth@32"], one["tok_depth@32"][:1]) and alone["caption"] == one["caption"][:1]


def test_random_order_fills_every_slot(model: FourM):
    plan = [Decoding("tok_depth@32", scheme="roar", steps=5, temperature=1.0, top_p=0.9)]
    tokens = generate(model, visible_rgb(model, RGB), plan)["tok_depth@32"]
    assert isinstance(tokens, np.ndarray) and tokens.min() >= 0


def test_later_modalities_see_earlier_ones_only_in_a_chain(model: FourM):
    names = ["tok_depth@32", "tok_semseg@32"]
    chained = generate_from_rgb(model, RGB, names, steps=2, chain=True)
    apart = generate_from_rgb(model, RGB, names, steps=2)
    alone = generate_from_rgb(model, RGB, names[1:], steps=2)
    assert np.array_equal(chained[names[0]], apart[names[0]])
    assert np.array_equal(apart[names[1]], alone[names[1]])
    assert not np.array_equal(chained[names[1]], apart[names[1]])


def test_captions_are_conditions_for_images(model: FourM):
    one = generate_from_caption(model, [[4284, 4285, EOS], [4286, EOS]], ["tok_depth@32"], steps=3, temperature=0.0)
    other = generate_from_caption(
        model, [[4287, 4288, 4289, EOS], [4286, EOS]], ["tok_depth@32"], steps=3, temperature=0.0
    )
    tokens, others = one["tok_depth@32"], other["tok_depth@32"]
    assert isinstance(tokens, np.ndarray) and isinstance(others, np.ndarray)
    assert np.array_equal(tokens[1], others[1]) and not np.array_equal(tokens[0], others[0])


def test_unknown_tokens_are_not_shown(model: FourM):
    tokens = np.full((2, 16), -1, np.int64)
    tokens[0, 3], tokens[1, [2, 5]] = 7, (1, 2)
    inputs = visible_inputs(model, Visible(2, tokens={"tok_depth@32": tokens}, texts={"caption": [[4284, EOS], []]}))
    depth, caption = model.index("tok_depth@32"), model.index("caption")
    assert inputs.modality_BN.tolist() == [[caption, caption, depth], [depth, depth, -1]]
    assert inputs.position_BN.tolist() == [[0, 1, 3], [2, 5, 0]] and inputs.id_BN.tolist() == [
        [4284, EOS, 7],
        [1, 2, 0],
    ]


def test_wrong_requests_are_refused(model: FourM):
    with pytest.raises(ValueError, match=r"takes uint8 \(B, 32, 32, 3\)"):
        generate_from_rgb(model, RGB[:, :16])
    with pytest.raises(ValueError, match="'rgb@32' is not predicted"):
        generate_from_rgb(model, RGB, ["rgb@32"])
    with pytest.raises(ValueError, match="given and to be decoded"):
        generate_from_caption(model, [[EOS]], ["caption"])
