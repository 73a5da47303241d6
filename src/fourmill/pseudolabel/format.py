"""What the store, the checks and the pictures need to know of one label; and of a label that stands in the table alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from fourmill.core.digest import Json, digest_json
from fourmill.pseudolabel.labeller import Labeller
from fourmill.pseudolabel.statistics import Statistics

Figures = dict[str, float]
RGB = NDArray[np.uint8]


def _nothing_wrong(found: Statistics) -> list[str]:
    return []


@dataclass(frozen=True)
class LabelFormat:
    """How one label is kept, counted and shown."""

    folder: str  # below {dataset}/{split}/
    ext: str  # of the tar members
    about: str  # a sentence for the asset's page
    encode: Callable[[Any], bytes]  # raises ValueError for values out of range
    decode: Callable[[bytes], Any]  # raises ValueError for bytes that are no such label
    figures: Callable[[Any], Figures]  # of one label, kept in its row
    summarise: Callable[[Statistics], dict[str, Json]]  # of a block with at least one label, for people
    titles: tuple[str, ...]  # of the pictures beside the image
    show: Callable[
        [RGB, Any, int], list[RGB]
    ]  # those pictures: of an image as shown, its label, a cell's side in pixels
    impossible: Callable[[Statistics], list[str]] = _nothing_wrong  # what no right network gives, in sentences


class OwnConfig(BaseModel):
    """Base of the config of an `OwnLabel`; all its settings but `batch_size` are part of the label's version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    batch_size: Annotated[int, Field(gt=0, description="Images at once.")] = 32

    @property
    def weights_digest(self) -> str:
        """Digest of the weights, 64 hex digits; of its name alone for a labeller that has none."""
        return digest_json(["own", self.kind])

    def require(self) -> None:
        """Raise `config.WeightsMissingError` when the labeller cannot be made."""


@dataclass(frozen=True)
class OwnLabel:
    """A label beside 4M's own: one file makes it, one entry of `members.OWN` adds its asset, checks and previews."""

    version: str  # of what the labeller makes of the same image, weights and config
    format: LabelFormat
    config: type[OwnConfig]
    make: Callable[[Any], Labeller]  # from the config; imports heavy libraries only here
