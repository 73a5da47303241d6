import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fourmill.core.modality import modality_table
from fourmill.core.sequences import EOS, FIRST_WORD_PIECE, is_sentinel, sentinel
from fourmill.train.config import MaskingConfig, MixtureComponent, fourm_b_cc12m, fourm_demo, fourm_superres_b
from fourmill.train.masking import (
    MaskingError,
    Mixture,
    alpha_of,
    cut_target,
    mask_image,
    mask_spans,
    mask_text,
    resolution_names,
    split_budget,
)

A, DOG = 4321, 4232
TABLE = modality_table(224, 16, {"rgb": 16384, "depth": 8192, "clip": 8192}, 30_000)
MODALITIES = sorted(TABLE.values(), key=lambda m: m.name)

seeds = st.integers(0, 2**32 - 1)
texts = st.lists(st.integers(FIRST_WORD_PIECE, 5000), max_size=60).map(lambda ids: [*ids, EOS])


def test_span_masking_gives_the_worked_values():
    ids = [A, DOG, EOS]
    visible, target = mask_spans(ids, np.ones(3, bool))
    assert visible.tolist() == ids and target.tolist() == [5]
    visible, target = mask_spans(ids, np.zeros(3, bool))
    assert visible.tolist() == [5] and target.tolist() == [5, A, DOG, EOS, 6]


def test_a_text_without_input_budget_shows_nothing_and_targets_are_cut_at_their_end():
    visible, target = mask_text([A, DOG, A, DOG, A, DOG, EOS], 0, 6, "random", np.random.default_rng(0))
    assert visible.tolist() == [] and target.tolist() == [5, A, DOG, A, DOG, A]


def merged(visible: list[int], target: list[int]) -> list[int]:
    """The text again: each sentinel of the visible part replaced by its run; one without a run is dropped."""
    runs: dict[int, list[int]] = {}
    number = None
    for token in target:
        if is_sentinel(token):
            number = token
            runs.setdefault(token, [])
        elif number is not None:
            runs[number].append(token)
    return [t for token in visible for t in (runs.get(token, []) if is_sentinel(token) else [token])]


@given(texts, st.data())
def test_merging_visible_and_target_gives_the_text_back(ids: list[int], data: st.DataObject):
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))), bool)
    visible, target = mask_spans(ids, kept)
    assert merged(visible.tolist(), target.tolist()) == ids
    runs = int(((~kept) & np.concatenate([[True], kept[:-1]])).sum())
    assert target[-1] == sentinel(runs + 1)


@given(texts, st.integers(1, 40), st.integers(0, 40), st.sampled_from(["random", "all", "binary"]), seeds)
def test_texts_stay_within_their_budgets(ids: list[int], inputs: int, targets: int, keep: str, seed: int):
    visible, target = mask_text(ids, inputs, targets, keep, np.random.default_rng(seed))  # type: ignore[arg-type]
    assert 1 <= len(visible) <= inputs and len(target) <= targets
    assert set(visible.tolist()) <= {*ids, *(sentinel(i) for i in range(1, 70))}
    if keep == "all" and len(ids) <= inputs:
        assert visible.tolist() == ids


def test_resolutions_are_addressed_without_their_sizes():
    alphas = {"high:tok_rgb": 1.0, "low:*": 2.0, "tok_rgb": 3.0, "*": 4.0, "tok_clip@448": 5.0, "high:tok_*": 6.0}
    expected = {
        "rgb@224": 2.0,
        "rgb@448": 4.0,
        "tok_rgb@224": 3.0,
        "tok_rgb@448": 1.0,
        "tok_clip@448": 5.0,
        "tok_depth@448": 6.0,
        "caption": 4.0,
    }
    both = modality_table(224, 16, {"rgb": 16384, "depth": 8192, "clip": 8192}, 30_000, 448, ("rgb", "depth", "clip"))
    names = resolution_names(list(both.values()))
    assert {name: alpha_of(alphas, name, names.get(name, "")) for name in expected} == expected
    # Which of them was tokenized first plays no part.
    assert resolution_names(list(modality_table(448, 16, {"rgb": 9}, 9, 224, ("rgb",)).values()))["rgb@448"] == "high"
    assert resolution_names(MODALITIES) == {}
    with pytest.raises(ValidationError, match="a resolution is low or high"):
        MixtureComponent(input_alphas={"hgh:tok_rgb": 1.0}, target_alphas={"*": 1.0})


def test_a_superres_mixture_needs_two_resolutions_and_predicts_the_higher():
    labels = {"rgb": 16384, "depth": 8192, "normal": 8192, "semseg": 4096, "clip": 8192}
    both = modality_table(224, 16, labels, 30_000, 448, tuple(labels))
    mixture = Mixture(fourm_superres_b().masking, sorted(both.values(), key=lambda m: m.name))
    assert mixture.predicted == sorted(f"tok_{label}@448" for label in labels)
    visible = [m.name for m, a in zip(mixture.modalities, mixture.components[0].input_alphas, strict=True) if a == 5.0]
    assert visible == ["tok_rgb@224", "tok_rgb@448"]
    with pytest.raises(MaskingError, match="one resolution: low: and high: name none of them"):
        Mixture(fourm_superres_b().masking, MODALITIES)


@given(seeds)
def test_a_second_resolution_that_takes_no_part_changes_no_draw(seed: int):
    both = modality_table(224, 16, {"rgb": 16384, "depth": 8192, "clip": 8192}, 30_000, 448, ("rgb",))
    base = [m for m in both.values() if m.px != 448]
    config = fourm_b_cc12m().masking
    one = Mixture(config, MODALITIES).draw(np.random.default_rng(seed))
    other = Mixture(config, sorted(base, key=lambda m: m.name)).draw(np.random.default_rng(seed))
    assert np.array_equal(one.inputs, other.inputs) and np.array_equal(one.targets, other.targets)


@given(texts, st.integers(1, 60), seeds)
def test_a_cut_target_starts_with_a_sentinel_and_uses_its_budget_or_ends_where_the_whole_does(ids, budget, seed):
    rng = np.random.default_rng(seed)
    _, whole = mask_spans(ids, rng.random(len(ids)) < 0.5)
    cut = cut_target(whole, budget, rng)
    assert cut[0] < FIRST_WORD_PIECE and cut[0] != EOS
    assert len(cut) == budget or cut[-1] == whole[-1]


@given(st.integers(0, 196), st.integers(0, 196), seeds)
def test_image_masks_are_disjoint_and_ascend(inputs: int, targets: int, seed: int):
    seen, hidden = mask_image(196, inputs, min(targets, 196 - inputs), np.random.default_rng(seed))
    assert (len(seen), len(hidden)) == (inputs, min(targets, 196 - inputs))
    assert not set(seen.tolist()) & set(hidden.tolist())
    assert seen.tolist() == sorted(seen.tolist()) and hidden.tolist() == sorted(hidden.tolist())


@given(st.integers(0, 300), st.lists(st.sampled_from([0.0, 0.01, 0.5, 1000.0]), min_size=1, max_size=8), seeds)
def test_budgets_add_up_and_leave_out_alpha_zero(budget: int, alphas: list[float], seed: int):
    if not any(alphas):
        alphas[0] = 1.0
    counts = split_budget(budget, np.array(alphas), np.random.default_rng(seed))
    assert counts.sum() == budget and counts.min() >= 0
    assert not counts[np.array(alphas) == 0].any()


@given(seeds)
def test_no_modality_gets_more_than_it_has(seed: int):
    mixture = Mixture(fourm_b_cc12m().masking, MODALITIES)
    budgets = mixture.draw(np.random.default_rng(seed))
    caps = np.array([m.max_tokens for m in MODALITIES])
    is_image = np.array([m.kind != "text" for m in MODALITIES])
    assert (budgets.inputs <= caps).all() and budgets.inputs.sum() <= 128
    assert (budgets.targets + budgets.inputs * is_image <= caps).all() and budgets.targets.sum() <= 128
    assert budgets.targets[[m.kind == "pixels" for m in MODALITIES]].sum() == 0


def test_half_of_the_papers_samples_see_pixels_only():
    mixture = Mixture(fourm_b_cc12m().masking, MODALITIES)
    pixels = [m.name for m in MODALITIES].index("rgb@224")
    drawn = [mixture.draw(np.random.default_rng([7, i])).inputs for i in range(400)]
    only = sum(counts[pixels] == counts.sum() for counts in drawn)
    assert 160 < only < 260


def test_masks_depend_on_the_generator_alone():
    mixture = Mixture(fourm_demo(10).masking, MODALITIES)
    one, other = (mixture.draw(np.random.default_rng([1, 2, 3])) for _ in range(2))
    assert one.inputs.tolist() == other.inputs.tolist() and one.targets.tolist() == other.targets.tolist()


def test_the_most_precise_name_decides_the_alpha():
    alphas = {"*": 1.0, "tok_*": 2.0, "tok_rgb": 3.0, "tok_rgb@448": 4.0}
    found = [alpha_of(alphas, name) for name in ("caption", "tok_depth@224", "tok_rgb@224", "tok_rgb@448")]
    assert found == [1.0, 2.0, 3.0, 4.0]
    assert alpha_of({"tok_rgb": 1.0}, "rgb@224") == 0.0


def test_a_mixture_without_targets_is_refused():
    component = MixtureComponent(input_alphas={"*": 1.0}, target_alphas={"rgb": 1.0})
    with pytest.raises(MaskingError, match="component 0 of the mixture has no target"):
        Mixture(MaskingConfig(components=(component,)), MODALITIES)
