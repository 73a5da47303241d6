"""Exact labels of the demo's scenes: each file carries its scene's description, and the renderer knows the rest.

They stand in for networks on these scenes only. No other image can be labelled by them, and they say so.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from pydantic import ValidationError

from fourmill.core.labels import Picture
from fourmill.core.scene import Rendering, Scene, render
from fourmill.pseudolabel.config import SceneConfig, weights_digest
from fourmill.pseudolabel.labeller import Answer, Label, NotASceneError

_PARTS: Mapping[str, Callable[[Rendering], Label]] = {
    "depth": lambda r: r.depth_HW,
    "normal": lambda r: r.normal_HWC,
    "semseg": lambda r: r.classes_HW,
    "det": lambda r: r.boxes,
}


class SceneLabeller:
    """Depth, normals, classes or boxes of generated scenes."""

    def __init__(self, label: str, config: SceneConfig) -> None:
        self.label = label
        self.batch_size = config.batch_size
        self.weights_digest = weights_digest(config)
        self._part = _PARTS[label]

    def bucket(self, picture: Picture) -> tuple[int, int]:
        """All the same: scenes are drawn one by one."""
        return (0, 0)

    def label_pictures(self, pictures: Sequence[Picture]) -> Sequence[Answer]:
        """The labels of each scene at its image's size.

        Raises:
            NotASceneError: an image that is not a generated scene.
        """
        return [self._part(render(self._scene(p), p.rgb_HWC.shape[0])) for p in pictures]

    def _scene(self, picture: Picture) -> Scene:
        height, width = np.shape(picture.rgb_HWC)[:2]
        if picture.description is not None and height == width:
            try:
                return Scene.model_validate_json(picture.description)
            except ValidationError:
                pass  # some other program's comment
        raise NotASceneError(
            f"an image of {width} x {height} pixels is not one of the demo's generated scenes, and the scene labellers "
            f"know {self.label} of nothing else. Choose other labellers: --labellers FOLDER with the weights of real "
            "networks in FOLDER/depth, normal, semseg, det, clip, or --labellers seeded to try the chain with tiny "
            "random ones"
        )
