from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from fourmill.core.crops import centre_crop, crop_rgb, random_crop
from fourmill.core.ranks import Ranks
from fourmill.tokenize.batches import Ahead, Batches, batch_side
from fourmill.tokenize.config import ImageLabel, ImageTokenizerConfig, TrainSetConfig
from fourmill.tokenize.presets import smallest_tokenizers
from fourmill.tokenize.samples import Features
from fourmill.tokenize.squeezed import crop_squeezed
from fourmill.tokenize.train_set import (
    LabelArrays,
    TrainSetError,
    _clip_crop,
    build_train_set,
    read_label,
)

BOTH = ("block_00", "block_01")


@given(st.integers(0, 2**32), st.integers(8, 300), st.floats(0.05, 1), st.floats(0, 1))
def test_crops_lie_in_the_square_have_their_share_and_follow_from_the_seed(seed, side, low, width):
    scale = (low, low + (1 - low) * width)
    top, left, h, w, mirrored = random_crop(np.random.default_rng(seed), side, side, scale)
    assert 0 <= top <= top + h <= side and 0 <= left <= left + w <= side and not mirrored
    assert (top, left, h, w, 0) == random_crop(np.random.default_rng(seed), side, side, scale)
    if (h, w) != (side, side):
        slack = (h + w + 1) / side**2  # both lengths are rounded
        assert scale[0] - slack <= h * w / side**2 <= scale[1] + slack
        assert 0.75 - 2 / h <= w / h <= 4 / 3 + 2 / h


def test_crops_spread_over_the_square():
    rows = np.array([random_crop(np.random.default_rng(i), 100, 100, (0.2, 1.0)) for i in range(300)])
    assert (rows.max(0)[:4] > [40, 40, 90, 90]).all() and (rows.min(0)[:4] < [5, 5, 50, 50]).all()


def rgb_config(**training: Any) -> ImageTokenizerConfig:
    config = smallest_tokenizers()["rgb"]
    return config.model_copy(update={"training": config.training.model_copy(update=training)})


def places(num: int, width: int, height: int, side_px: int = 128) -> LabelArrays:
    """Images that say where each of their pixels is, red across and green down, squeezed to squares."""
    at = (np.arange(side_px) + 0.5) / side_px * 255
    square = np.stack([*np.meshgrid(at, at), np.zeros((side_px, side_px))], -1).round().astype(np.uint8)
    train = np.broadcast_to(square, (num, *square.shape))
    return LabelArrays(train, train, train[..., 0], num, squeezed_from=np.full((num, 2), (height, width), np.int64))


def shown(batch_BCHW: torch.Tensor, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """From where to where the crops of a batch of `places` reach along an axis (0 across, 1 down), as shares of the image."""
    line = (batch_BCHW[:, axis].mean(1 if axis == 0 else 2).numpy() + 1) / 2
    first, last, num = 8, line.shape[1] - 9, line.shape[1]  # the filter does not reach over the edge there
    slope = (line[:, last] - line[:, first]) / (last - first)
    return line[:, first] - slope * (first + 0.5), line[:, first] + slope * (num - first - 0.5)


@settings(max_examples=15)
@given(
    size=st.sampled_from([(400, 300), (300, 400), (300, 300), (640, 360), (768, 97)]),
    draw=st.integers(0, 1000),
    low=st.sampled_from([0.2, 0.5, 0.8]),
)
def test_crops_in_a_batch_have_the_share_and_ratio_of_what_is_drawn_on_the_image(size, draw, low):
    (width, height), config = size, rgb_config(crop_scale=(low, 1.0), hflip=False, batch_size=4)
    batches = Batches(places(8, width, height), config)
    (left, right), (top, bottom) = (shown(batches(draw), axis) for axis in (0, 1))
    drawn = [random_crop(np.random.default_rng([0, draw, 2, row]), width, height, (low, 1.0)) for row in range(4)]
    wanted = np.array([[x / width, y / height, (x + w) / width, (y + h) / height] for y, x, h, w, _ in drawn])
    assert np.abs(np.stack([left, top, right, bottom], 1) - wanted).max() < 0.01


def test_the_edges_of_an_image_that_is_no_square_come_up_in_batches():
    for width, height in ((400, 300), (300, 400)):
        batches = Batches(places(16, width, height), rgb_config(crop_scale=(0.8, 1.0), hflip=False))
        reach = np.stack([np.stack(shown(batches(draw), int(width < height)), 1) for draw in range(20)]).reshape(-1, 2)
        assert reach[:, 0].min() < 0.02 and reach[:, 1].max() > 0.98
        assert (reach[:, 0] > 0.1).any()  # the centre square begins at an eighth


def test_a_stage_without_crops_sees_the_centre_square_of_whole_images():
    for width, height in ((400, 300), (300, 400), (300, 300)):
        x = Batches(places(4, width, height), rgb_config(hflip=False))(3)
        (left, right), (top, bottom) = (shown(x, axis) for axis in (0, 1))
        first, start, side = centre_crop(width, height)[:3]
        wanted = [start / width, first / height, (start + side) / width, (first + side) / height]
        assert np.abs(np.stack([left, top, right, bottom], 1) - wanted).max() < 0.01


@pytest.mark.parametrize("num", [1, 4])
def test_batches_made_ahead_are_those_of_their_draws_whatever_order_they_are_asked_in(spec, store, num):
    one = spec("rgb", sides_px=(32, 64))
    batches = Batches(read_label(store, one.train_set, one.train_set_digest, "rgb"), one.config)
    ahead = Ahead(batches, num)
    draws = [0, 1, 2, 9, 10, 4, 4, 5]  # on the way, and after ways back
    taken = [ahead.take(draw, left) for draw, left in zip(draws, [7, 6, 0, 4, 3, 2, 1, 0], strict=True)]
    ahead.close()
    assert all(torch.equal(x, batches(draw)) for x, draw in zip(taken, draws, strict=True))


def test_processes_share_the_crops_of_whole_images(spec, store, tiny, put_images):
    put_images(0, [(120, 40), (40, 120), (1000, 3), (3, 1000)])
    config = TrainSetConfig(num_samples=20, num_eval=4, blocks=BOTH, side_px=96)
    made = build_train_set(store, tiny.dataset, tiny.layout, config, 64)
    for label in ("rgb", "depth", "normal", "semseg"):
        one = spec(label, crop_scale=(0.3, 1.0)).config
        labels = [read_label(store, made.path, made.digest, label) for _ in range(3)]
        whole = Batches(labels[0], one)(7)
        parts = [Batches(labels[1 + rank], one, Ranks(rank, 2))(7) for rank in (0, 1)]
        assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole)
        assert torch.isfinite(whole).all() and whole.shape[-1] == 64


def test_batches_are_crops_at_the_drawn_side_and_equal_for_every_process(spec, store, tiny):
    packed = TrainSetConfig(num_samples=20, num_eval=4, blocks=BOTH, side_px=72)
    made = build_train_set(store, tiny.dataset, tiny.layout, packed, 64, tiny.features)
    arrays = load(store.read(made.path))
    assert arrays["train/rgb"].shape == (20, 72, 72, 3) and arrays["eval/rgb"].shape == (4, 64, 64, 3)
    for label in ("rgb", "semseg"):
        one = spec(label, sides_px=(32, 64, 96), crop_scale=(0.8, 1.0), hflip=False)
        labels = read_label(store, made.path, made.digest, label)
        batches = Batches(labels, one.config)
        sides = [batches(draw).shape[-1] for draw in range(12)]
        assert set(sides) == {32, 64, 96} and sides == [batch_side((32, 64, 96), 0, draw) for draw in range(12)]
        parts = [Batches(labels, one.config, Ranks(rank, 2))(5) for rank in (0, 1)]
        assert torch.equal(torch.stack(parts, 1).flatten(0, 1), batches(5))
        if label == "semseg":
            assert set(batches(5).unique().tolist()) <= {40, 123}  # the nearest pixel's, as they are packed
        assert torch.equal(batches(5), batches(5)) and batches(5).shape[-1] == parts[0].shape[-1]


def test_packing_tells_how_far_it_is(store, tiny):
    config = TrainSetConfig(num_samples=20, num_eval=4, blocks=BOTH, side_px=72, clip_crops=3)
    heard: list[tuple[int, int, str]] = []

    def hear(done: int, total: int, note: str) -> None:
        heard.append((done, total, note))

    build_train_set(store, tiny.dataset, tiny.layout, config, 64, tiny.features, progress=hear)
    total = 20 + 4 + 3 * 20 + 4 + 1
    assert {event[1] for event in heard} == {total} and heard[-1] == (total, total, "published")
    assert [event[0] for event in heard].count(total) == 1
    assert [event[0] for event in heard] == sorted(event[0] for event in heard)
    assert {event[2].split()[0] for event in heard} == {"train", "eval", "crops", "published"}


def test_all_labels_of_a_sample_are_cropped_alike(spec, store, tiny):
    packed = TrainSetConfig(num_samples=20, num_eval=4, blocks=BOTH, side_px=72)
    made = build_train_set(store, tiny.dataset, tiny.layout, packed, 64, tiny.features)

    def batch(label: ImageLabel) -> torch.Tensor:
        one = spec(label, crop_scale=(0.3, 0.6))
        return Batches(read_label(store, made.path, made.digest, label), one.config)(1)

    bottle = batch("semseg") == 40  # the conftest's bottle has depth 0.3 and points to the right
    normal = batch("normal").abs()
    assert ((normal[:, 0] > normal[:, 2]) == bottle).float().mean() > 0.97
    assert 0.02 < bottle.float().mean() < 0.9


def test_clip_features_are_packed_of_several_crops(spec, store, tiny):
    config = TrainSetConfig(num_samples=10, num_eval=4, blocks=BOTH)
    plain = build_train_set(store, tiny.dataset, tiny.layout, config, 64, tiny.features)
    more = build_train_set(
        store, tiny.dataset, tiny.layout, config.model_copy(update={"clip_crops": 3}), 64, tiny.features
    )
    once, thrice = (load(store.read(made.path))["train/clip"] for made in (plain, more))
    assert len(thrice) == 3 * len(once) and np.array_equal(thrice[:10], once)
    assert read_label(store, more.path, more.digest, "clip").num_samples == 10
    packed = load(store.read(more.path))["train/rgb"], load(store.read(more.path))["train/keys"]
    rows = [[_clip_crop(int(key), number, 64, 64, config) for key in packed[1]] for number in range(3)]
    assert rows[0] == [(0, 0, 64, 64, 0)] * 10 and {row[4] for row in rows[1] + rows[2]} == {0, 1}
    images = [[crop_rgb(one, row, 64) for one, row in zip(packed[0], some, strict=True)] for some in rows]
    assert np.array_equal(thrice, np.concatenate([tiny.features(np.stack(some)) for some in images]).astype(np.float16))
    assert not np.allclose(thrice[10:20], once, atol=0.05) and not np.allclose(thrice[20:], thrice[10:20], atol=0.05)


def test_clip_features_are_of_crops_of_whole_images(store, tiny, put_images):
    put_images(0, [(120, 40), (40, 120), (1000, 3)])
    config = TrainSetConfig(num_samples=9, num_eval=4, blocks=BOTH, side_px=96, clip_crops=4)
    made = build_train_set(store, tiny.dataset, tiny.layout, config, 64, tiny.features)
    arrays = load(store.read(made.path))
    found = arrays["train/clip"].reshape(4, 9, 8, 8, 12)
    rows = list(zip(arrays["train/rgb"], arrays["train/keys"], arrays["train/size"].tolist(), strict=True))
    crops = [[_clip_crop(int(key), n, w, h, config) for _, key, (h, w) in rows] for n in range(4)]
    for number, drawn in enumerate(crops):
        pixels = [crop_squeezed("rgb", r[0], c, r[2][1], r[2][0], 64) for r, c in zip(rows, drawn, strict=True)]
        assert np.array_equal(found[number], tiny.features(np.stack(pixels)).astype(np.float16))
    assert crops[0] == [centre_crop(w, h) for _, _, (h, w) in rows]
    starts = {row[1] for some in crops[1:] for row, (_, _, (_, w)) in zip(some, rows, strict=True) if w == 120}
    assert min(starts) < 40 < max(starts)  # beyond the centre square, to both sides
    labels = read_label(store, made.path, made.digest, "clip")
    assert labels.train.shape == (36, 8, 8, 12) and labels.squeezed_from is None


def features_of_any_side(crops_BSSC: np.ndarray) -> np.ndarray:
    """A stand-in for CLIP whose features tell the side of the image that they are of."""
    grid = crops_BSSC.shape[1] // 8
    means = crops_BSSC.reshape(len(crops_BSSC), grid, 8, grid, 8, 3).astype(np.float32).mean((2, 4)) / 255
    return np.concatenate([*[means] * 3, np.full_like(means, grid)], -1)


def test_clip_features_at_several_sides_are_of_images_of_these_sides(spec, store, tiny):
    config = TrainSetConfig(num_samples=10, num_eval=4, blocks=BOTH, clip_px=(32, 64, 96), clip_crops=2, side_px=72)
    asked: list[int] = []

    def features_at(px: int) -> Features:
        asked.append(px)
        return features_of_any_side

    made = build_train_set(store, tiny.dataset, tiny.layout, config, 64, features_of_any_side, features_at)
    assert asked == [32, 64, 96]
    arrays = load(store.read(made.path))
    assert [arrays[f"train/clip_{px}"].shape for px in asked] == [(20, px // 8, px // 8, 12) for px in asked]
    assert arrays["eval/clip"].shape == (4, 8, 8, 12)
    centres = [crop_squeezed("rgb", one, centre_crop(80, 72), 80, 72, 32) for one in arrays["train/rgb"]]
    assert np.array_equal(arrays["train/clip_32"][:10], features_of_any_side(np.stack(centres)).astype(np.float16))
    labels = read_label(store, made.path, made.digest, "clip")
    assert labels.train.shape == arrays["train/clip_32"].shape and set(labels.at_side) == {32, 64, 96}
    batches = Batches(labels, spec("clip", sides_px=(32, 64, 96), hflip=False).config)
    for draw in range(12):
        x, grid = batches(draw), batch_side((32, 64, 96), 0, draw) // 8
        assert x.shape[-2:] == (grid, grid)
        assert (x[:, 9:] == grid).all()  # and none of them was shrunk from another
    parts = [Batches(labels, batches._config, Ranks(rank, 2))(5) for rank in (0, 1)]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), batches(5))
    with pytest.raises(TrainSetError, match="of images of 32, 64, 96 pixels, and stage base wants 48: put that"):
        Batches(labels, spec("clip", sides_px=(48,)).config)(0)


def test_clip_features_of_one_side_serve_no_other(spec, store, tiny):
    labels = read_label(store, tiny.train_set.path, tiny.train_set.digest, "clip")
    assert Batches(labels, spec("clip").config)(0).shape[-2:] == (8, 8)
    with pytest.raises(TrainSetError, match="of images of 64 pixels, and stage base wants 32"):
        Batches(labels, spec("clip", sides_px=(32,)).config)(0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sides_px": (64, 60)}, "sides_px of stage base holds 60: rgb takes multiples of 8"),
        ({"crop_scale": (0.9, 0.8)}, "the lower first"),
        ({"crop_scale": (0.9, 1.1)}, "scale up to 1"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"seed": 2**32}, "less than 4294967296"),  # 64 bits hold it beside the number of a step
    ],
)
def test_stages_that_cannot_work_are_refused(spec, change, reason):
    config = spec("rgb").config
    stage = config.training.model_dump() | change
    with pytest.raises(ValueError, match=reason):
        type(config).model_validate(config.model_dump() | {"training": stage})


def test_a_block_that_is_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="one of them is named twice"):
        TrainSetConfig(num_samples=1, num_eval=1, blocks=("block_00", "block_01", "block_00"))


def test_half_of_the_images_are_mirrored_where_the_stage_says_so():
    labels = places(16, 64, 64)
    mirrored, plain = (Batches(labels, rgb_config(batch_size=16, hflip=flip)).stored(0) for flip in (True, False))
    kinds = {
        "mirrored" if np.array_equal(a, b[:, ::-1]) else "plain" if np.array_equal(a, b) else "other"
        for a, b in zip(mirrored, plain, strict=True)
    }
    assert kinds == {"mirrored", "plain"}


def test_crops_have_the_ratio_that_the_stage_says():
    batches = Batches(places(8, 256, 64), rgb_config(crop_scale=(0.3, 0.3), crop_ratio=(2.0, 2.0)))
    for row in range(8):
        _, _, height, width, _ = batches._crop_row(0, row, 256, 64)
        assert width / height == pytest.approx(2, rel=0.05)
