"""The sets of labellers that one can choose: the demo's, the paper's, tiny seeded ones, a folder of networks."""

from pathlib import Path
from typing import Any, Literal

from fourmill.core.store import Store
from fourmill.pseudolabel.config import (
    ClipConfig,
    DetectorConfig,
    DptConfig,
    LabellerConfig,
    Mask2FormerConfig,
    SceneConfig,
    VitDetConfig,
    seed_of,
)
from fourmill.pseudolabel.folders import facts_in, read_facts
from fourmill.pseudolabel.named_weights import pinned, require_weights
from fourmill.pseudolabel.stored import CONFIG_FILE, WeightsMissingError, stored_ref

Detector = Literal["vitdet", "detector"]
Precision = Literal["fp32", "bf16"]


def demo_labellers() -> dict[str, LabellerConfig]:
    """The demo's: exact labels of generated scenes, and a tiny seeded CLIP of 8x8x64 features for 64-pixel crops."""
    return {**{label: SceneConfig() for label in ("depth", "normal", "semseg", "det")}, "clip": _demo_clip("seeded:0")}


def paper_labellers(
    folder: Path | None = None,
    *,
    detector: Detector = "vitdet",
    precision: Precision = "fp32",
) -> dict[str, LabellerConfig]:
    """The paper's networks and sizes (appendix B.1).

    Args:
        folder: holds each network in the folder of its label; None: `fourmill weights add` puts them into the store.
        detector: the paper's ViTDet, or a transformers one in its place.
        precision: bf16 with channels last, for GPUs.
    """

    def weights(name: str) -> str:
        label = "det" if name == "vitdet" else name
        return f"stored:{name}" if folder is None else str(folder / label)

    how: Any = {} if precision == "fp32" else {"precision": precision, "channels_last": True}
    det = VitDetConfig(weights=weights("vitdet"), **how)
    return {
        "depth": DptConfig(weights=weights("depth"), **how),
        "normal": DptConfig(weights=weights("normal"), **how),
        "semseg": Mask2FormerConfig(weights=weights("semseg"), **how),
        "det": det if detector == "vitdet" else DetectorConfig(weights=weights("det"), **how),
        "clip": ClipConfig(weights=weights("clip"), **how),
    }


def seeded_labellers(seed: int = 0) -> dict[str, LabellerConfig]:
    """Tiny random networks at small sizes: labels of no meaning, for any image, in some milliseconds each."""
    weights = f"seeded:{seed}"
    return {
        "depth": DptConfig(weights=weights, longer_px=256),
        "normal": DptConfig(weights=weights, longer_px=256),
        "semseg": Mask2FormerConfig(weights=weights, shorter_px=128, longer_px=256),
        "det": DetectorConfig(weights=weights, input_px=160),
        "clip": _demo_clip(weights),
    }


def labellers_from(
    choice: str,
    grid: int = 8,
    store: Store | None = None,
    *,
    detector: Detector = "detector",
    precision: Precision = "fp32",
) -> dict[str, LabellerConfig]:
    """The labellers behind `--labellers`: `scene`, `seeded`, `seeded:N`, `stored`, or a folder with one network a label.

    Args:
        choice: what was written on the command line.
        grid: tokens along a side of a crop; a real CLIP network gets crops of as many of its own patches.
        store: where `stored` weights are.
        detector: which of the stored ones; that of a folder is what its config.json says.
        precision: of real networks, see `paper_labellers`.

    Raises:
        WeightsMissingError: one of the networks is not there.
    """
    if choice == "scene":
        return demo_labellers()
    if choice == "seeded":
        return seeded_labellers()
    if choice == "stored":
        return _stored_labellers(grid, store, detector, precision)
    seed = seed_of(choice)
    if seed is not None:
        return seeded_labellers(seed)
    return _folder_labellers(Path(choice).expanduser().resolve(), grid, precision)


def _stored_labellers(
    grid: int, store: Store | None, detector: Detector, precision: Precision
) -> dict[str, LabellerConfig]:
    if store is None:
        raise WeightsMissingError("the labellers are in a store; say which")
    named = paper_labellers(detector=detector, precision=precision)
    made: dict[str, Any] = {label: pinned(config, store) for label, config in named.items()}
    for label, config in made.items():
        require_weights(label, config, store)
    clip = stored_ref(made["clip"].weights)
    assert clip is not None
    facts = facts_in(store.read(f"{clip.folder}/{CONFIG_FILE}"))
    return {**made, "clip": _fitting_clip(made["clip"], facts, grid)}


def _folder_labellers(folder: Path, grid: int, precision: Precision) -> dict[str, LabellerConfig]:
    detector: Detector = "vitdet" if (read_facts(folder / "det") or {}).get("model_type") == "vitdet" else "detector"
    made: dict[str, Any] = dict(paper_labellers(folder, detector=detector, precision=precision))
    for label, config in made.items():
        require_weights(label, config)
    facts = read_facts(folder / "clip")
    return {**made, "clip": _fitting_clip(made["clip"], facts, grid)}


def _fitting_clip(named: ClipConfig, facts: dict[str, Any] | None, grid: int) -> ClipConfig:
    """The config of a CLIP network, with precision and batches as named."""
    sizes = clip_config(named.weights, facts, grid).model_dump(include={"input_px", "patch_px", "channels"})
    return named.model_copy(update=sizes)


def _demo_clip(weights: str) -> ClipConfig:
    return ClipConfig(weights=weights, patch_px=8, channels=64)


def clip_config(weights: str, facts: dict[str, Any] | None, grid: int) -> ClipConfig:
    """The config of a CLIP network.

    Args:
        weights: where it is.
        facts: its config.json; None where that is no object.
        grid: patches along a side of what it is fed.

    Raises:
        WeightsMissingError: the facts are no CLIP network's.
    """
    facts = facts or {}
    nested = facts.get("vision_config")  # of a whole CLIP model
    vision: dict[str, Any] = nested if isinstance(nested, dict) else facts
    patch_px, channels = vision.get("patch_size"), vision.get("projection_dim", facts.get("projection_dim"))
    if not isinstance(patch_px, int) or not isinstance(channels, int):
        raise WeightsMissingError(
            f"clip labeller: {CONFIG_FILE} of {weights} gives patch_size {patch_px} and projection_dim {channels}; expected "
            "the config of a CLIPVisionModelWithProjection"
        )
    return ClipConfig(weights=weights, input_px=grid * patch_px, patch_px=patch_px, channels=channels)
