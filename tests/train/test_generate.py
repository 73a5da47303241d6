import numpy as np
import pytest
import torch

from fourmill.core.modality import Modality, modality_table
from fourmill.core.sequences import EOS, FIRST_SENTINEL, NUM_SENTINELS
from fourmill.train.config import ModelConfig
from fourmill.train.generate import Decoding, generate, generate_from_caption, generate_from_rgb, super_resolve
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


@pytest.fixture
def two_sizes() -> FourM:
    torch.manual_seed(2)
    config = ModelConfig(dim=32, encoder_depth=1, decoder_depth=1, num_heads=2, embedding_std=1.0)
    table = modality_table(32, 8, {"rgb": 12, "depth": 12}, 4292, 16, ("rgb",))
    return FourM(config, table.values(), 8, predicted=["tok_rgb@32", "tok_depth@32"]).eval()


def test_small_grids_become_large_ones_that_depend_on_them(two_sizes: FourM):
    low = np.random.default_rng(1).integers(0, 12, (3, 4)).astype(np.int16)
    made = super_resolve(two_sizes, {"tok_rgb@16": low}, ["tok_rgb@32"], temperature=0.0)["tok_rgb@32"]
    assert isinstance(made, np.ndarray) and made.shape == (3, 16) and 0 <= made.min() and made.max() < 12
    other = low.copy()
    other[1] = (other[1] + 5) % 12
    changed = np.asarray(super_resolve(two_sizes, {"tok_rgb@16": other}, ["tok_rgb@32"], temperature=0.0)["tok_rgb@32"])
    assert np.array_equal(changed[[0, 2]], made[[0, 2]]) and not np.array_equal(changed[1], made[1])
    texts = {"caption": [[4284, EOS]] * 3}
    several = super_resolve(two_sizes, {"tok_rgb@16": low}, ["tok_depth@32", "tok_rgb@32"], texts=texts)
    assert list(several) == ["tok_depth@32", "tok_rgb@32"]


def test_pixels_of_either_size_are_seen_as_their_own_modality(two_sizes: FourM):
    small = RGB[:, :16, :16].copy()
    assert list(visible_rgb(two_sizes, small).patches) == ["rgb@16"]
    assert list(visible_rgb(two_sizes, RGB).patches) == ["rgb@32"]
    with pytest.raises(ValueError, match=r"takes uint8 \(B, 16, 16, 3\) or \(B, 32, 32, 3\)"):
        visible_rgb(two_sizes, RGB[:, :24, :24].copy())


def test_what_cannot_be_super_resolved_is_refused(two_sizes: FourM):
    with pytest.raises(ValueError, match="at least one low-resolution modality"):
        super_resolve(two_sizes, {}, ["tok_rgb@32"])
    with pytest.raises(ValueError, match=r"tok_rgb@16 tokens of shape \(3, 16\); this model takes \(B, 4\)"):
        super_resolve(two_sizes, {"tok_rgb@16": np.zeros((3, 16), np.int16)}, ["tok_rgb@32"])
    with pytest.raises(ValueError, match=r"tok_rgb@8 .* takes one of"):
        super_resolve(two_sizes, {"tok_rgb@8": np.zeros((3, 1), np.int16)}, ["tok_rgb@32"])
    with pytest.raises(ValueError, match="title: not seen by this model, only caption"):
        super_resolve(two_sizes, {"tok_rgb@16": np.zeros((1, 4), np.int16)}, ["tok_rgb@32"], texts={"title": [[EOS]]})
    with pytest.raises(ValueError, match="'tok_rgb@16' is not predicted"):
        super_resolve(two_sizes, {"tok_rgb@16": np.zeros((3, 4), np.int16)}, ["tok_rgb@16"])


def test_wrong_requests_are_refused(model: FourM):
    with pytest.raises(ValueError, match=r"takes uint8 \(B, 32, 32, 3\)"):
        generate_from_rgb(model, RGB[:, :16])
    with pytest.raises(ValueError, match="'rgb@32' is not predicted"):
        generate_from_rgb(model, RGB, ["rgb@32"])
    with pytest.raises(ValueError, match="given and to be decoded"):
        generate_from_caption(model, [[EOS]], ["caption"])
