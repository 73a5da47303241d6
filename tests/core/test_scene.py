"""Scenes: text in, picture and exact labels out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourmill.core.scene import CLASS_IDS, GROUND_ID, SKY_ID, Scene, Solid, caption, render, sample_scene

LONE_BALL = Scene(
    solids=(Solid(shape="ball", colour="red", x=0, z=3, size=0.8, height=1.6, yaw=0),),
    camera_height=1.5,
    pitch=0.25,
    light=(0.0, 1.0, 0.0),
    ground=(0.5, 0.5, 0.5),
    sky=(0.4, 0.6, 0.9),
)


@given(st.integers(0, 2**32 - 1))
def test_a_scene_survives_its_own_text(seed: int) -> None:
    scene = sample_scene(np.random.default_rng(seed))
    assert Scene.model_validate_json(scene.model_dump_json()) == scene


@pytest.mark.parametrize("seed", range(8))
def test_labels_are_complete_and_in_range(seed: int) -> None:
    drawn = render(sample_scene(np.random.default_rng(seed)), 48)
    assert drawn.rgb_HWC.shape == (48, 48, 3)
    assert set(np.unique(drawn.classes_HW)) <= {GROUND_ID, SKY_ID, *CLASS_IDS.values()}
    assert drawn.depth_HW.min() >= 0
    assert drawn.depth_HW.max() <= 1
    assert np.allclose(np.linalg.norm(drawn.normal_HWC, axis=-1), 1, atol=1e-5)
    assert (drawn.depth_HW[drawn.classes_HW == SKY_ID] == 1).all()


def test_the_nearest_point_of_a_ball_faces_the_camera() -> None:
    drawn = render(LONE_BALL, 64)
    ball = drawn.classes_HW == CLASS_IDS["ball"]
    row, column = np.argwhere(ball)[drawn.normal_HWC[ball][:, 2].argmax()]
    assert drawn.normal_HWC[row, column, 2] > 0.98
    assert drawn.depth_HW[row, column] < np.median(drawn.depth_HW[ball])
    left, right = np.argwhere(ball)[:, 1].min(), np.argwhere(ball)[:, 1].max()
    middle = int(np.argwhere(ball)[:, 0].mean())
    assert drawn.normal_HWC[middle, left + 1, 0] < -0.5 < 0.5 < drawn.normal_HWC[middle, right - 1, 0]


def test_a_box_is_tight_around_what_is_seen() -> None:
    drawn = render(LONE_BALL, 64)
    (box,) = drawn.boxes
    rows, columns = np.nonzero(drawn.classes_HW == CLASS_IDS["ball"])
    assert (box.xmin * 64, box.xmax * 64) == (columns.min(), columns.max() + 1)
    assert (box.ymin * 64, box.ymax * 64) == (rows.min(), rows.max() + 1)
    assert box.class_name == "sports ball"


def test_a_hidden_solid_has_no_box() -> None:
    behind = LONE_BALL.solids[0].model_copy(update={"z": 6.0, "size": 0.2})
    drawn = render(LONE_BALL.model_copy(update={"solids": (LONE_BALL.solids[0], behind)}), 64)
    assert len(drawn.boxes) == 1


@given(st.integers(0, 2**32 - 1), st.integers(0, 100))
def test_a_caption_names_every_solid(seed: int, variant: int) -> None:
    scene = sample_scene(np.random.default_rng(seed))
    text = caption(scene, variant)
    assert all(solid.colour in text for solid in scene.solids)
    assert "\t" not in text
    assert text == caption(scene, variant)
