"""The demo's scenes in one import: what a scene is (`core.solids`) and how it looks (`core.raycast`)."""

from fourmill.core.raycast import Rendering, render
from fourmill.core.solids import CLASS_IDS, GROUND_ID, SCENE_VERSION, SKY_ID, Scene, Solid, caption, sample_scene

__all__ = [
    "CLASS_IDS",
    "GROUND_ID",
    "SCENE_VERSION",
    "SKY_ID",
    "Rendering",
    "Scene",
    "Solid",
    "caption",
    "render",
    "sample_scene",
]
