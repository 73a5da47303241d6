"""The demo's scenes: coloured solids on a ground plane, described in a few numbers, so that every label is known exactly.

A scene is text (it travels in its JPEG's comment) and `core.raycast.render` is a pure function of it: whoever holds the
file can compute its depth, normals, classes and boxes. Solids carry COCO's own class names, colour says nothing about
class, and solids hide each other and leave the picture, so the labels cannot be read from colour or place alone.
"""

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

SCENE_VERSION = "1"  # of the renderer: what is drawn from the same description

Shape = Literal["ball", "suitcase", "bottle"]
SHAPES: tuple[Shape, ...] = ("ball", "suitcase", "bottle")
CLASS_NAMES: dict[Shape, str] = {"ball": "sports ball", "suitcase": "suitcase", "bottle": "bottle"}
CLASS_IDS: dict[Shape, int] = {"ball": 32, "suitcase": 28, "bottle": 39}  # COCO panoptic, contiguous
GROUND_ID, SKY_ID = 122, 119  # floor-other-merged, sky-other-merged

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.15, 0.15),
    "orange": (0.95, 0.55, 0.1),
    "yellow": (0.95, 0.85, 0.2),
    "green": (0.2, 0.65, 0.25),
    "cyan": (0.2, 0.75, 0.8),
    "blue": (0.2, 0.35, 0.85),
    "purple": (0.55, 0.25, 0.7),
    "white": (0.92, 0.92, 0.9),
}
_NUM_SOLIDS = (1, 2, 2, 3, 3)
_TRIES = 20


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Solid(_Frozen):
    """One solid standing on the ground. Lengths in metres, angles in radians."""

    shape: Shape
    colour: str
    x: float  # right of the camera
    z: float  # in front of the camera
    size: float  # radius of a ball or bottle, half the width of a suitcase
    height: float  # of a suitcase or bottle; a ball's is twice its size
    yaw: float  # turn of a suitcase about its upright axis


class Scene(_Frozen):
    """All that a picture shows."""

    solids: tuple[Solid, ...]
    camera_height: float
    pitch: float  # downward tilt of the camera
    light: tuple[float, float, float]  # unit vector towards the light
    ground: tuple[float, float, float]  # colour, 0..1
    sky: tuple[float, float, float]  # colour overhead, 0..1; paler towards the horizon


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene: one to three solids that do not stand inside each other."""
    solids: list[Solid] = []
    wanted = int(rng.choice(_NUM_SOLIDS))
    for _ in range(_TRIES):
        solid = _sample_solid(rng)
        if all(np.hypot(solid.x - s.x, solid.z - s.z) > 1.1 * (solid.size + s.size) for s in solids):
            solids.append(solid)
        if len(solids) == wanted:
            break
    azimuth, elevation = rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 1.2)
    light = (np.cos(elevation) * np.cos(azimuth), np.sin(elevation), np.cos(elevation) * np.sin(azimuth))
    grey = rng.uniform(0.35, 0.65)
    return Scene(
        solids=tuple(solids),
        camera_height=_round(rng.uniform(1.2, 2.0)),
        pitch=_round(rng.uniform(0.12, 0.35)),
        light=_round3(light),
        ground=_round3(grey + rng.uniform(-0.12, 0.12, 3)),
        sky=_round3((rng.uniform(0.3, 0.55), rng.uniform(0.5, 0.7), rng.uniform(0.75, 0.98))),
    )


def _sample_solid(rng: np.random.Generator) -> Solid:
    shape = SHAPES[rng.integers(len(SHAPES))]
    z = rng.uniform(2.3, 4.2)
    size = {"ball": rng.uniform(0.6, 0.95), "suitcase": rng.uniform(0.6, 0.95), "bottle": rng.uniform(0.33, 0.55)}[
        shape
    ]
    height = {"ball": 2 * size, "suitcase": size * rng.uniform(1.2, 1.9), "bottle": rng.uniform(1.3, 2.3)}[shape]
    return Solid(
        shape=shape,
        colour=list(COLOURS)[rng.integers(len(COLOURS))],
        x=_round(rng.uniform(-0.5, 0.5) * z),
        z=_round(z),
        size=_round(size),
        height=_round(height),
        yaw=_round(rng.uniform(0, np.pi) if shape == "suitcase" else 0.0),
    )


def caption(scene: Scene, variant: int) -> str:
    """A sentence about a scene: what stands where, in colours and sizes. Equal arguments give equal sentences."""
    solids = sorted(scene.solids, key=lambda s: s.x / s.z)
    names = [f"{_adjective(s, variant)}{s.colour} {CLASS_NAMES[s.shape]}" for s in solids]
    phrases = [f"{_article(name)} {name}" for name in names]
    if len(phrases) == 1:
        return (
            f"{phrases[0]} on the floor",
            f"{phrases[0]} under the sky",
            f"a picture of {phrases[0]}",
            f"{phrases[0]} standing alone",
        )[variant % 4]
    if len(phrases) == 2:
        return (
            f"{phrases[0]} to the left of {phrases[1]}",
            f"{phrases[1]} to the right of {phrases[0]}",
            f"{phrases[0]} and {phrases[1]} on the floor",
            f"{phrases[0]} {_depth_word(solids[0], solids[1])} {phrases[1]}",
        )[variant % 4]
    joined = f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    return (
        f"from left to right: {joined}",
        f"{joined} under the sky",
        f"{phrases[1]} between {phrases[0]} and {phrases[2]}",
        f"{joined} standing on the floor",
    )[variant % 4]


def _adjective(solid: Solid, variant: int) -> str:
    large = solid.size * solid.height > 0.9
    return ("large " if large else "small ") if variant % 3 == 0 else ""


def _article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


def _depth_word(first: Solid, second: Solid) -> str:
    return "in front of" if first.z < second.z else "behind"


def _round(value: float) -> float:
    return round(float(value), 3)


def _round3(values: "tuple[float, float, float] | np.ndarray") -> tuple[float, float, float]:
    a, b, c = (_round(float(np.clip(v, -1, 1))) for v in values)
    return a, b, c
