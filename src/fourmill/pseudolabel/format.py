"""What the store, the checks and the pictures need to know of one label; and of a label that stands in the table alone."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from fourmill.core.digest import Json, digest_json
from fourmill.pseudolabel.labeller import Labeller
from fourmill.pseudolabel.statistics import Statistics
from fourmill.pseudolabel.stored import WEIGHTS_FILE, Origin, Weights, named_digest, seed_of

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


class OwnNetworkConfig(OwnConfig):
    """Base of the config of an `OwnLabel` that a network makes: its weights are named, stored and looked for as 4M's are.

    The labeller gets this with a folder in `weights`, which holds config.json and model.safetensors; or with `seeded:N`.
    """

    model_types: ClassVar[tuple[str, ...]] = ()  # one of which config.json says; any, where there are none
    weight_files: ClassVar[tuple[str, ...]] = (WEIGHTS_FILE,)

    weights: Weights

    @property
    def weights_digest(self) -> str:
        """Digest of the weights, 64 hex digits."""
        if seed_of(self.weights) is not None:
            return digest_json(["seeded", self.kind, self.weights])
        return named_digest(self.weights)


@dataclass(frozen=True)
class OwnWeights:
    """The public weights behind an `OwnLabel`, which `fourmill weights add LABEL` puts into a store."""

    origin: Origin
    convert: Callable[[Path, Path], None]
    """From what the authors publish (a file or folder) to a folder: writes config.json and model.safetensors.

    Raises NetworkError for what are not such weights.
    """


@dataclass(frozen=True)
class OwnLabel:
    """A label beside 4M's own: one file makes it, one entry of `members.OWN` adds its asset, checks and previews."""

    version: str  # of what the labeller makes of the same image, weights and config
    format: LabelFormat
    config: type[OwnConfig]
    make: Callable[[Any], Labeller]  # from the config; imports heavy libraries only here
    weights: OwnWeights | None = None
