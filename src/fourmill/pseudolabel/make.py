"""From a label's name and config to its labeller. Each network's libraries are imported only when it is made."""

from typing import Literal, cast

from fourmill.core.store import Store
from fourmill.pseudolabel.config import (
    AnyLabellerConfig,
    ClipConfig,
    DetectorConfig,
    DptConfig,
    Mask2FormerConfig,
    SceneConfig,
    VitDetConfig,
)
from fourmill.pseudolabel.format import OwnConfig
from fourmill.pseudolabel.labeller import FeatureExtractor, Labeller
from fourmill.pseudolabel.members import OWN
from fourmill.pseudolabel.named_weights import at_hand, require_weights


def make_labeller(label: str, config: AnyLabellerConfig, store: Store | None = None) -> Labeller:
    """Load the labeller of a label; slow, since weights are read.

    Args:
        store: where stored weights are.

    Raises:
        ValueError: the config's network does not make this label.
        WeightsMissingError: its weights are not there.
        NetworkError: its weights are of another network.
    """
    require_weights(label, config, store)
    config = at_hand(config, store)
    match config:
        case OwnConfig():
            return OWN[label].make(config)
        case SceneConfig():
            from fourmill.pseudolabel.scene import SceneLabeller

            return SceneLabeller(label, config)
        case DptConfig():
            from fourmill.pseudolabel.dpt import DptLabeller

            return DptLabeller(cast(Literal["depth", "normal"], label), config)
        case Mask2FormerConfig():
            from fourmill.pseudolabel.mask2former import Mask2FormerLabeller

            return Mask2FormerLabeller(config)
        case DetectorConfig():
            from fourmill.pseudolabel.detector import DetectorLabeller

            return DetectorLabeller(config)
        case VitDetConfig():
            from fourmill.pseudolabel.vitdet import VitDetLabeller

            return VitDetLabeller(config)
        case ClipConfig():
            raise ValueError("the clip labeller makes features, which are never stored: make_features gives it")


def make_features(config: AnyLabellerConfig, store: Store | None = None) -> FeatureExtractor:
    """Load the CLIP labeller: crops (B, S, S, 3) uint8 to features (B, h, w, C) float32.

    Args:
        store: where stored weights are.

    Raises:
        ValueError: the config is not a CLIP labeller's.
        WeightsMissingError: its weights are not there.
        NetworkError: its weights are of another network.
    """
    require_weights("clip", config, store)
    if not isinstance(config, ClipConfig):
        raise ValueError(f"a {config.kind} labeller makes no features")
    from fourmill.pseudolabel.clip import ClipFeatures

    return ClipFeatures(at_hand(config, store))
