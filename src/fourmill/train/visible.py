"""What a generation has to look at so far: pixels, image tokens and texts of B samples, growing as tokens are decoded."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fourmill.train.assemble import Part, assemble_inputs
from fourmill.train.batch import Inputs, cut_patches
from fourmill.train.masking import text_positions_of
from fourmill.train.model import FourM


@dataclass
class Visible:
    """Visible parts of B samples, by modality name."""

    num_samples: int
    patches: dict[str, NDArray[np.uint8]] = field(default_factory=dict)  # (B, L, K), all of them visible
    tokens: dict[str, NDArray[np.int64]] = field(default_factory=dict)  # (B, L), -1 where not known yet
    texts: dict[str, list[list[int]]] = field(default_factory=dict)

    def rows(self, first: int, end: int) -> "Visible":
        """Some of the samples, as a copy."""
        return Visible(
            min(end, self.num_samples) - first,
            {name: values[first:end] for name, values in self.patches.items()},
            {name: values[first:end].copy() for name, values in self.tokens.items()},
            {name: values[first:end] for name, values in self.texts.items()},
        )


def visible_rgb(model: FourM, rgb_BHWC: NDArray[np.uint8]) -> Visible:
    """Images of a size that the model was trained on.

    Raises:
        ValueError: another size or type, or the model knows no pixels.
    """
    names = {m.grid * model.patch_px: m.name for m in model.modalities if m.kind == "pixels"}
    if not names:
        raise ValueError(f"this model sees no pixels, only {', '.join(model.by_name)}")
    side = rgb_BHWC.shape[1] if rgb_BHWC.ndim == 4 else 0
    if rgb_BHWC.dtype != np.uint8 or side not in names or rgb_BHWC.shape[1:] != (side, side, 3):
        takes = " or ".join(f"(B, {known}, {known}, 3)" for known in names)
        raise ValueError(f"images of {rgb_BHWC.dtype} {rgb_BHWC.shape}; this model takes uint8 {takes}")
    return Visible(len(rgb_BHWC), patches={names[side]: cut_patches(rgb_BHWC, model.patch_px)})


def visible_inputs(model: FourM, visible: Visible) -> Inputs:
    """The model's inputs; modalities in its order, unknown tokens left out."""
    rows: list[list[Part]] = [[] for _ in range(visible.num_samples)]
    for i, modality in enumerate(model.modalities):
        for row, parts in enumerate(rows):
            if modality.name in visible.patches:
                parts.append(Part(i, np.arange(modality.max_tokens), np.zeros(modality.max_tokens, np.int64)))
            elif modality.name in visible.tokens:
                tokens = visible.tokens[modality.name][row]
                known = np.flatnonzero(tokens >= 0)
                parts.append(Part(i, known, tokens[known]))
            elif modality.name in visible.texts:
                ids = np.array(visible.texts[modality.name][row], np.int64)
                parts.append(Part(i, text_positions_of(len(ids)), ids))
    width = max(1, max((sum(len(part.positions) for part in parts) for parts in rows), default=1))
    stacks = [visible.patches[m.name] for m in model.modalities if m.name in visible.patches]
    patches = np.concatenate(stacks, 1) if stacks else np.zeros((0, 1, model.patch_px**2 * 3), np.uint8)
    return assemble_inputs(rows, width, patches.reshape(-1, model.patch_px**2 * 3))
