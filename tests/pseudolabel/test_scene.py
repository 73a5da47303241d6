import numpy as np
import pytest

from fourmill.core.labels import Picture
from fourmill.core.scene import Scene, render
from fourmill.pseudolabel.config import SceneConfig
from fourmill.pseudolabel.labeller import NotASceneError
from fourmill.pseudolabel.make import make_labeller


def test_each_label_is_the_renderers_own(scene: Scene, scene_picture: Picture) -> None:
    truth = render(scene, 48)
    expected = {"depth": truth.depth_HW, "normal": truth.normal_HWC, "semseg": truth.classes_HW, "det": truth.boxes}
    for label, right in expected.items():
        (found,) = make_labeller(label, SceneConfig()).label_pictures([scene_picture])
        assert type(found) is type(right)
        assert np.array_equal(found, right) if isinstance(found, np.ndarray) else found == right


def test_pictures_of_several_sizes_are_labelled_in_order(scene: Scene) -> None:
    pictures = [Picture(render(scene, px).rgb_HWC, scene.model_dump_json()) for px in (16, 40, 24)]
    found = make_labeller("semseg", SceneConfig()).label_pictures(pictures)
    assert [label.shape for label in found if isinstance(label, np.ndarray)] == [(16, 16), (40, 40), (24, 24)]


@pytest.mark.parametrize("label", ["depth", "normal", "semseg", "det"])
@pytest.mark.parametrize("description", [None, "Made with a camera", "{}", '{"solids": []}'])
def test_any_other_image_is_refused_with_the_choices(label: str, description: str | None) -> None:
    photo = Picture(np.zeros((20, 20, 3), np.uint8), description)
    with pytest.raises(NotASceneError, match=r"not one of the demo's generated scenes.*--labellers seeded"):
        make_labeller(label, SceneConfig()).label_pictures([photo])


def test_a_scene_that_is_no_longer_square_is_refused(scene_picture: Picture) -> None:
    cut = Picture(scene_picture.rgb_HWC[:30], scene_picture.description)
    with pytest.raises(NotASceneError, match="48 x 30 pixels"):
        make_labeller("depth", SceneConfig()).label_pictures([cut])
