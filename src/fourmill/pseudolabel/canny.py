"""Edges by Canny's detector: a label that needs no weights, and the example of a label that stands in one file.

Edges (H, W) uint8, 255 on an edge, 0 elsewhere. Grey values are smoothed, gradients thinned to ridges; a ridge counts where
it is stronger than `high`, and as far as it stays stronger than `low` from there (Canny 1986).
"""

from collections.abc import Sequence
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from fourmill.core.digest import Json
from fourmill.core.labels import Picture, decode_grey, encode_grey
from fourmill.core.pictures import nearest_pixels
from fourmill.pseudolabel.format import RGB, Figures, LabelFormat, OwnConfig, OwnLabel
from fourmill.pseudolabel.labeller import Answer
from fourmill.pseudolabel.statistics import Statistics

_VERSION = "1"
_EDGE = 255


class CannyConfig(OwnConfig):
    """Edges of the grey image."""

    kind: str = Field(default="canny", pattern="^canny$")
    sigma_px: Annotated[float, Field(ge=0)] = Field(default=1.0, description="Smoothing before; 0 for none.")
    low: Annotated[float, Field(gt=0)] = Field(
        default=50.0, description="Gradient (Sobel, L2) at which an edge goes on."
    )
    high: Annotated[float, Field(gt=0)] = Field(default=100.0, description="Gradient at which an edge begins.")

    @model_validator(mode="after")
    def _low_is_lower(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}: edges begin at high and go on down to low")
        return self


class CannyLabeller:
    """Edges of any image."""

    label = "canny"

    def __init__(self, config: CannyConfig) -> None:
        import cv2

        cv2.setNumThreads(1)  # actors share the machine among them already
        self.batch_size = config.batch_size
        self.weights_digest = config.weights_digest
        self._config = config

    def bucket(self, picture: Picture) -> tuple[int, int]:
        """All the same: images are worked on one by one."""
        return (0, 0)

    def label_pictures(self, pictures: Sequence[Picture]) -> Sequence[Answer]:
        """Edges (H, W) uint8, 0 or 255, of each image's size."""
        return [self._edges(picture.rgb_HWC) for picture in pictures]

    def _edges(self, rgb_HWC: RGB) -> NDArray[np.uint8]:
        import cv2

        grey = cv2.cvtColor(np.ascontiguousarray(rgb_HWC), cv2.COLOR_RGB2GRAY)
        if self._config.sigma_px:
            grey = cv2.GaussianBlur(grey, (0, 0), self._config.sigma_px)
        return np.asarray(cv2.Canny(grey, self._config.low, self._config.high, L2gradient=True), np.uint8)


def encode_edges(edges_HW: NDArray[np.uint8]) -> bytes:
    """8-bit grey PNG of an edge map, (H, W) uint8, 0 or 255. Raises ValueError for anything else."""
    data = encode_grey(edges_HW, "edge map")
    _check(edges_HW)
    return data


def decode_edges(data: bytes) -> NDArray[np.uint8]:
    """Edge map (H, W) uint8, 0 or 255, of an 8-bit grey PNG. Raises ValueError."""
    edges_HW = decode_grey(data, "edge map")
    _check(edges_HW)
    return edges_HW


def _check(edges_HW: NDArray[np.uint8]) -> None:
    wrong = (edges_HW != 0) & (edges_HW != _EDGE)
    if wrong.any():
        raise ValueError(f"edge map holds {int(edges_HW[wrong][0])}, expected 0, or {_EDGE} on an edge")


def _figures(edges_HW: NDArray[np.uint8]) -> Figures:
    return {"edges": float((edges_HW == _EDGE).mean())}


def _summarise(found: Statistics) -> dict[str, Json]:
    edges = found.figures["edges"]
    return {"share of edges": round(found.mean("edges"), 5), "images without edges": edges.num - edges.nonzero}


def _show(shown: RGB, edges_HW: Any, cell_px: int) -> list[RGB]:
    """As large as the image is shown; an edge is white in every pixel that it touches, lest thin ones vanish."""
    height, width = shown.shape[:2]
    if height > edges_HW.shape[0]:
        sized = nearest_pixels(edges_HW, height, width)
    else:
        rows = np.arange(edges_HW.shape[0]) * height // edges_HW.shape[0]
        columns = np.arange(edges_HW.shape[1]) * width // edges_HW.shape[1]
        sized = np.zeros((height, width), np.uint8)
        np.maximum.at(sized, (rows[:, None], columns), edges_HW)
    return [np.repeat(sized[..., None], 3, 2)]


LABEL = OwnLabel(
    version=_VERSION,
    format=LabelFormat(
        folder="canny",
        ext="png",
        about="Edges of every image by Canny's detector, 255 on an edge, 0 elsewhere.",
        encode=encode_edges,
        decode=decode_edges,
        figures=_figures,
        summarise=_summarise,
        titles=("edges",),
        show=_show,
    ),
    config=CannyConfig,
    make=CannyLabeller,
)
