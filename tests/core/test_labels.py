import io
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from fourmill.core.coco import COCO_PANOPTIC, COCO_THINGS
from fourmill.core.labels import (
    Box,
    Picture,
    clipped_box,
    decode_boxes,
    decode_depth,
    decode_image,
    decode_normal,
    decode_semseg,
    encode_boxes,
    encode_depth,
    encode_normal,
    encode_semseg,
)

SIDES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)
shares = st.floats(0, 1, width=32)


def jpeg(rgb: np.ndarray, **options: Any) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(rgb).save(sink, "JPEG", **options)
    return sink.getvalue()


@given(hnp.arrays(np.float32, SIDES, elements=shares))
def test_depth_comes_back_within_half_a_step(depth: np.ndarray) -> None:
    again = decode_depth(encode_depth(depth))
    assert again.dtype == np.float32 and again.shape == depth.shape
    assert np.abs(again - depth).max() <= 0.5 / 65535 + 1e-7


@given(hnp.arrays(np.uint16, SIDES))
def test_a_stored_depth_keeps_its_bytes(steps: np.ndarray) -> None:
    data = encode_depth((steps / 65535).astype(np.float32))
    assert encode_depth(decode_depth(data)) == data
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), steps)


@given(
    hnp.arrays(
        np.float32, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3)), elements=st.floats(-1, 1, width=32)
    )
)
def test_normals_come_back_within_half_a_step(normal: np.ndarray) -> None:
    again = decode_normal(encode_normal(normal))
    assert again.dtype == np.float32 and again.shape == normal.shape
    assert np.abs(again - normal).max() <= 1 / 255 + 1e-6
    assert encode_normal(again) == encode_normal(normal)


@given(hnp.arrays(np.uint8, SIDES, elements=st.one_of(st.integers(0, 132), st.just(255))))
def test_class_maps_come_back_exactly(ids: np.ndarray) -> None:
    data = encode_semseg(ids)
    assert np.array_equal(decode_semseg(data), ids)
    assert Image.open(io.BytesIO(data)).mode == "L"


boxes = st.builds(
    lambda xs, ys, score, name: Box(min(xs), min(ys), max(xs), max(ys), score, name),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    st.floats(0, 1),
    st.sampled_from(COCO_THINGS),
)


@given(st.lists(boxes, max_size=5))
def test_boxes_come_back_exactly_and_in_order(found: list[Box]) -> None:
    assert decode_boxes(encode_boxes(found)) == found


def test_boxes_are_the_public_json() -> None:
    data = encode_boxes([Box(0.25, 0.5, 0.75, 1.0, 0.875, "cat")])
    assert data == b'{"instances": [{"boxes": [0.25, 0.5, 0.75, 1.0], "score": 0.875, "class_name": "cat"}]}'


@pytest.mark.parametrize("corners", [(0.5, 0, 0.4, 1), (-0.1, 0, 1, 1), (0, 0, 1.01, 1), (0, float("nan"), 1, 1)])
def test_a_box_outside_the_image_is_refused(corners: tuple[float, float, float, float]) -> None:
    with pytest.raises(ValueError, match="fractions of the image"):
        Box(*corners, score=0.5, class_name="cat")


def test_a_box_over_the_border_is_clipped_and_one_of_which_nothing_is_left_is_none() -> None:
    assert clipped_box((-0.5, 0.1234567, 0.25, 1.5), 1.0000001, "cat") == Box(0, 0.123457, 0.25, 1, 1, "cat")
    for corners in ((1.1, 0, 1.2, 1), (0.5, 0, 0.4, 1), (0.5, 0.2, 0.5000001, 1), (0, 0.3, 1, 0.3)):
        assert clipped_box(corners, 0.9, "cat") is None


@pytest.mark.parametrize(
    "data", [b"", b"[]", b'{"instances": [{"boxes": [0, 0, 1], "score": 1, "class_name": "cat"}]}']
)
def test_what_is_not_a_detection_file_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a detection file"):
        decode_boxes(data)


@pytest.mark.parametrize(
    "depth", [np.full((2, 2), 1.5), np.full((2, 2), np.nan), np.zeros((2, 2, 1)), np.zeros((2, 2), int)]
)
def test_depth_out_of_its_range_or_shape_is_refused(depth: np.ndarray) -> None:
    with pytest.raises(ValueError, match="depth map"):
        encode_depth(depth)


def test_a_normal_map_of_another_shape_or_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*expected floats of shape \(H, W, 3\)"):
        encode_normal(np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match=r"expected \[-1, 1\]"):
        encode_normal(np.full((2, 2, 3), -1.2, np.float32))


def test_ids_between_the_classes_and_invalid_are_refused() -> None:
    with pytest.raises(ValueError, match="id 133"):
        encode_semseg(np.array([[0, 133]], np.uint8))
    sink = io.BytesIO()
    Image.fromarray(np.array([[0, 254]], np.uint8)).save(sink, "PNG")
    with pytest.raises(ValueError, match="id 254"):
        decode_semseg(sink.getvalue())


def test_one_label_is_not_read_as_another() -> None:
    depth = encode_depth(np.zeros((2, 2), np.float32))
    for decode in (decode_normal, decode_semseg):
        with pytest.raises(ValueError, match="PIL mode"):
            decode(depth)
    with pytest.raises(ValueError, match="I;16"):
        decode_depth(encode_semseg(np.zeros((2, 2), np.uint8)))


def test_an_image_comes_with_its_comment() -> None:
    rgb = np.full((5, 7, 3), 90, np.uint8)
    assert decode_image(jpeg(rgb)).description is None
    picture = decode_image(jpeg(rgb, comment='{"ball": "rouge é"}'.encode()))
    assert picture.description == '{"ball": "rouge é"}'
    assert picture.rgb_HWC.shape == (5, 7, 3) and picture.rgb_HWC.dtype == np.uint8


def test_a_grey_image_becomes_rgb() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    sink = io.BytesIO()
    Image.fromarray(grey).save(sink, "PNG")
    assert np.array_equal(decode_image(sink.getvalue()).rgb_HWC, np.repeat(grey[..., None], 3, -1))


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 2, "quality": 30}, {"mode": "L"}]
)
def test_a_jpeg_is_decoded_as_pillow_decodes_it(options: dict[str, Any]) -> None:
    small = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((53, 41), Image.Resampling.BICUBIC).convert(options.pop("mode", "RGB"))
    sink = io.BytesIO()
    image.save(sink, "JPEG", **options)
    expected = np.asarray(Image.open(io.BytesIO(sink.getvalue())).convert("RGB"))
    found = decode_image(sink.getvalue()).rgb_HWC
    assert found.shape == (41, 53, 3) and np.array_equal(found, expected)


def test_a_jpeg_that_is_only_odd_is_decoded_all_the_same() -> None:
    whole = jpeg(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    odd = whole[:-2] + b"odd" * 20 + whole[-2:]
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(odd, "RGB", strict=True)
    assert np.array_equal(decode_image(odd).rgb_HWC, decode_image(whole).rgb_HWC)


def test_a_picture_at_another_size_is_pillows_and_made_once() -> None:
    picture = Picture(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    made = picture.at(45, 20)
    expected = Image.fromarray(picture.rgb_HWC).resize((20, 45), Image.Resampling.BILINEAR)
    assert np.array_equal(made, np.asarray(expected))
    assert picture.at(45, 20) is made and picture.at(30, 50) is picture.rgb_HWC
    assert picture.num_pixels == 30 * 50 + 45 * 20


@pytest.mark.parametrize("cut", [0, 10, 400, -30])
def test_a_cut_image_is_refused(cut: int) -> None:
    whole = jpeg(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="not a readable image"):
        decode_image(whole[:cut])


def test_an_image_that_ingest_would_not_have_stored_is_refused() -> None:
    sink = io.BytesIO()
    Image.new("RGBA", (4, 4)).save(sink, "PNG")
    with pytest.raises(ValueError, match="mode RGBA"):
        decode_image(sink.getvalue())


def test_the_class_lists_are_cocos() -> None:
    assert len(COCO_THINGS) == len(set(COCO_THINGS)) == 80
    assert len(COCO_PANOPTIC) == len(set(COCO_PANOPTIC)) == 133
    known = {0: "person", 28: "suitcase", 32: "sports ball", 39: "bottle", 79: "toothbrush", 80: "banner"}
    known |= {119: "sky-other-merged", 122: "floor-other-merged", 132: "rug-merged"}
    assert {i: COCO_PANOPTIC[i] for i in known} == known
