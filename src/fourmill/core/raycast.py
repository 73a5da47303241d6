"""A small ray caster: one ray a pixel, lambertian light and shadows, and the exact labels of what the ray meets.

World and camera frames have x to the right, y up; the world's z points forward, a normal's z towards the camera.
"""

# N rays (H*W), 3 world coordinates; t distance along a ray, inf where it meets nothing

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourmill.core.labels import Box
from fourmill.core.solids import CLASS_IDS, CLASS_NAMES, COLOURS, GROUND_ID, SKY_ID, Scene, Solid

Floats = NDArray[np.float64]

NEAR_M = 1.0  # depth is 1 - NEAR_M / z: affine in inverse distance, 0 at one metre, 1 for the sky
_FOCAL = 1.5  # of half the picture's width: about 67 degrees
_MIN_BOX_SHARE = 12 / 64**2  # of the picture's pixels; less of a solid is not worth a box
_BIAS = 1e-4


class Rendering:
    """A picture and its labels, each drawn when it is first asked for: the shadows of a picture cost more than its labels."""

    def __init__(self, scene: Scene, size_px: int) -> None:
        """Cast the rays."""
        self._scene, self._size_px = scene, size_px
        self._origin, self._rays = _camera(scene, size_px)
        hits = [_meet(solid, self._origin, self._rays) for solid in scene.solids]
        ground = _meet_ground(self._origin, self._rays)
        distances = np.stack([ground[0], *(t for t, _ in hits)])
        self._nearest = distances.argmin(0)
        self._t = distances.min(0)
        self._seen = np.isfinite(self._t)
        self._normals = np.stack([ground[1], *(n for _, n in hits)])[self._nearest, np.arange(len(self._rays))]

    @cached_property
    def rgb_HWC(self) -> NDArray[np.uint8]:
        """The picture."""
        points = self._origin + np.where(self._seen, self._t, 0)[:, None] * self._rays
        colours = _surface_colours(self._scene, self._nearest, points)
        lit = colours * _light(self._scene, points, self._normals)[:, None]
        rgb = np.where(self._seen[:, None], lit, _sky(self._scene, self._rays))
        return self._square(np.rint(np.clip(rgb, 0, 1) * 255).astype(np.uint8))

    @cached_property
    def depth_HW(self) -> NDArray[np.float32]:
        """[0, 1], near small, the sky 1."""
        with np.errstate(divide="ignore"):
            depth = 1 - NEAR_M / np.where(self._seen, np.maximum(self._t, NEAR_M), np.inf)
        return self._square(np.clip(depth, 0, 1).astype(np.float32))

    @cached_property
    def normal_HWC(self) -> NDArray[np.float32]:
        """Unit vectors in the camera's frame; the sky faces the camera."""
        up, forward = _axes(self._scene)
        normals = self._normals
        turned = np.stack([normals[:, 0], normals @ up, -(normals @ forward)], -1)
        turned = np.where(self._seen[:, None], turned, np.array([0.0, 0.0, 1.0]))
        return self._square((turned / np.linalg.norm(turned, axis=-1, keepdims=True)).astype(np.float32))

    @cached_property
    def classes_HW(self) -> NDArray[np.uint8]:
        """Raw COCO panoptic ids."""
        ids = np.array([GROUND_ID, *(CLASS_IDS[s.shape] for s in self._scene.solids)], np.uint8)[self._nearest]
        return self._square(np.where(self._seen, ids, np.uint8(SKY_ID)))

    @cached_property
    def boxes(self) -> list[Box]:
        """Around the visible pixels of each solid, in the scene's order."""
        visible = [(self._nearest == i + 1) & self._seen for i in range(len(self._scene.solids))]
        found = [_box(s, pixels, self._size_px) for s, pixels in zip(self._scene.solids, visible, strict=True)]
        return [box for box in found if box is not None]

    def _square(self, values: NDArray[Any]) -> NDArray[Any]:
        return values.reshape(self._size_px, self._size_px, *values.shape[1:])


def render(scene: Scene, size_px: int) -> Rendering:
    """Draw a scene as a square picture with all labels."""
    return Rendering(scene, size_px)


def _axes(scene: Scene) -> tuple[Floats, Floats]:
    """The camera's up and forward in the world; its right is the world's."""
    cos, sin = np.cos(scene.pitch), np.sin(scene.pitch)
    return np.array([0.0, cos, sin]), np.array([0.0, -sin, cos])


def _camera(scene: Scene, size_px: int) -> tuple[Floats, Floats]:
    up, forward = _axes(scene)
    at = (np.arange(size_px) + 0.5) / size_px * 2 - 1
    u, v = np.meshgrid(at / _FOCAL, -at / _FOCAL)
    rays = forward + u.reshape(-1, 1) * np.array([1.0, 0, 0]) + v.reshape(-1, 1) * up
    # Not unit length: the part along the camera's axis is 1, so t is the z-distance that depth means.
    return np.array([0.0, scene.camera_height, 0.0]), rays


def _meet_ground(origin: Floats, rays: Floats) -> tuple[Floats, Floats]:
    with np.errstate(divide="ignore"):
        t = np.where(rays[:, 1] < -1e-9, -origin[..., 1] / rays[:, 1], np.inf)
    return np.where(t > _BIAS, t, np.inf), np.broadcast_to(np.array([0.0, 1.0, 0.0]), rays.shape)


def _meet(solid: Solid, origin: Floats, rays: Floats) -> tuple[Floats, Floats]:
    """Distance (N,) to a solid and its outward normal (N, 3) there; origin is (3,) or (N, 3)."""
    if solid.shape == "ball":
        return _meet_ball(solid, origin, rays)
    return _meet_bottle(solid, origin, rays) if solid.shape == "bottle" else _meet_suitcase(solid, origin, rays)


def _meet_ball(solid: Solid, origin: Floats, rays: Floats) -> tuple[Floats, Floats]:
    centre = np.array([solid.x, solid.size, solid.z])
    t = _first_root(rays, np.broadcast_to(origin - centre, rays.shape), solid.size)
    return t, (origin + _finite(t) * rays - centre) / solid.size


def _first_root(rays: Floats, offset: Floats, radius: float) -> Floats:
    """Nearest t > 0 with |offset + t * ray| = radius, over however many axes are given."""
    a, b, c = (rays**2).sum(-1), (rays * offset).sum(-1), (offset**2).sum(-1) - radius**2
    inside = b**2 - a * c
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (-b - np.sqrt(np.maximum(inside, 0))) / a
    return np.where((inside > 0) & (t > _BIAS), t, np.inf)


def _meet_bottle(solid: Solid, origin: Floats, rays: Floats) -> tuple[Floats, Floats]:
    centre = np.array([solid.x, 0.0, solid.z])
    offset = np.broadcast_to(origin - centre, rays.shape)
    side = _first_root(rays[:, ::2], offset[:, ::2], solid.size)
    y = offset[:, 1] + _finite(side)[:, 0] * rays[:, 1]
    side = np.where((y >= 0) & (y <= solid.height), side, np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        top = (solid.height - offset[:, 1]) / rays[:, 1]
    at_top = offset + _finite(top) * rays
    on_lid = (top > _BIAS) & ((at_top[:, ::2] ** 2).sum(-1) <= solid.size**2)
    top = np.where(on_lid, top, np.inf)
    t = np.minimum(side, top)
    normal = (offset + _finite(t) * rays) * np.array([1.0, 0.0, 1.0]) / solid.size
    return t, np.where((top < side)[:, None], np.array([0.0, 1.0, 0.0]), normal)


def _meet_suitcase(solid: Solid, origin: Floats, rays: Floats) -> tuple[Floats, Floats]:
    cos, sin = np.cos(solid.yaw), np.sin(solid.yaw)
    turn = np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])  # world to the suitcase's own axes
    half = np.array([solid.size, solid.height / 2, solid.size * 0.6])
    centre = np.array([solid.x, solid.height / 2, solid.z])
    offset = np.broadcast_to(origin - centre, rays.shape) @ turn.T
    ray = rays @ turn.T
    safe = np.where(np.abs(ray) < 1e-12, 1e-12, ray)
    near, far = (-half * np.sign(safe) - offset) / safe, (half * np.sign(safe) - offset) / safe
    enter, leave = near.max(-1), far.min(-1)
    t = np.where((enter < leave) & (enter > _BIAS), enter, np.inf)
    axis = near.argmax(-1)
    own = np.zeros_like(rays)
    own[np.arange(len(rays)), axis] = -np.sign(safe[np.arange(len(rays)), axis])
    return t, own @ turn


def _finite(t: Floats) -> Floats:
    return np.where(np.isfinite(t), t, 0)[:, None]


def _surface_colours(scene: Scene, nearest: NDArray[np.intp], points: Floats) -> Floats:
    palette = np.array([scene.ground, *(COLOURS[s.colour] for s in scene.solids)])
    squares = (np.floor(points[:, 0]) + np.floor(points[:, 2])) % 2
    chequer = np.where(nearest == 0, 1 + 0.12 * (squares - 0.5), 1.0)
    return palette[nearest] * chequer[:, None]


def _light(scene: Scene, points: Floats, normals: Floats) -> Floats:
    light = np.array(scene.light)
    facing = np.clip(normals @ light, 0, None)
    start = points + normals * 1e-3
    shaded = np.zeros(len(points), bool)
    towards = np.broadcast_to(light, points.shape)
    for solid in scene.solids:
        shaded |= np.isfinite(_meet(solid, start, towards)[0])
    return 0.4 + 0.65 * np.where(shaded, 0, facing)


def _sky(scene: Scene, rays: Floats) -> Floats:
    height = np.clip(rays[:, 1] / np.linalg.norm(rays, axis=-1), 0, 1)[:, None]
    return np.array(scene.sky) * height**0.5 + (0.55 * np.array(scene.sky) + 0.4) * (1 - height**0.5)


def _box(solid: Solid, visible: NDArray[np.bool_], size_px: int) -> Box | None:
    if visible.sum() < _MIN_BOX_SHARE * size_px**2:
        return None
    rows, columns = np.nonzero(visible.reshape(size_px, size_px))
    left, right, top, bottom = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
    corners = [float(edge / size_px) for edge in (left, top, right, bottom)]
    return Box(corners[0], corners[1], corners[2], corners[3], 1.0, CLASS_NAMES[solid.shape])
