"""The weights that a labeller's config names: whether they are there, undamaged and of the right network, and where they lie.

No torch: definitions load this.
"""

from pathlib import Path
from typing import TypeVar, get_args

from fourmill.core.store import Store
from fourmill.pseudolabel.cached import local_folder
from fourmill.pseudolabel.config import (
    AnyLabellerConfig,
    DetectorConfig,
    NetworkConfig,
    NetworkSettings,
    SceneConfig,
    VitDetConfig,
)
from fourmill.pseudolabel.folders import facts_in, folder_problem, read_facts
from fourmill.pseudolabel.format import OwnConfig, OwnNetworkConfig
from fourmill.pseudolabel.members import own_label
from fourmill.pseudolabel.stored import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    WeightsMissingError,
    add_command,
    name_of,
    read_pointer,
    require_fitting,
    require_stored,
    require_undamaged,
    seed_of,
    stored_ref,
)

_SEEDED_DETECTOR = "rt_detr_v2"  # as `detector` builds it


def architecture(config: AnyLabellerConfig, store: Store) -> str | None:
    """Which network makes a label, as its config.json says: `dpt`, of detectors `rt_detr_v2`; None: no network, or no word."""
    if isinstance(config, OwnConfig | SceneConfig):
        return None
    if not isinstance(config, DetectorConfig):
        return config.kind
    if seed_of(config.weights) is not None:
        return _SEEDED_DETECTOR
    stored = stored_ref(config.weights)
    if stored is None:
        found = read_facts(Path(config.weights))
    else:
        try:
            found = facts_in(store.read(f"{stored.folder}/{CONFIG_FILE}"))
        except OSError:
            return None
    kind = (found or {}).get("model_type")
    return kind if isinstance(kind, str) else None


def network_name(config: AnyLabellerConfig, store: Store) -> str:
    """What makes a label, for people: its kind, and of a detector which one: `detector rt_detr_v2`."""
    if not isinstance(config, DetectorConfig):
        return config.kind
    return f"{config.kind} {architecture(config, store) or 'of an unknown type'}"


def require_weights(label: str, config: AnyLabellerConfig, store: Store | None = None) -> None:
    """Make sure that a labeller can be made, before any work starts.

    Args:
        store: where stored weights are looked for; without it only their name is checked.

    Raises:
        ValueError: the config's network does not make this label.
        WeightsMissingError: its weights are not there; with the command that puts them there.
    """
    if isinstance(config, OwnConfig):
        if own_label(config) != label:
            raise ValueError(f"a {config.kind} labeller does not make {label}; it makes {own_label(config)}")
    elif label not in config.labels:
        kinds = [one.model_fields["kind"].default for one in get_args(NetworkConfig) if label in one.labels]
        raise ValueError(
            f"a {config.kind} labeller does not make {label}; {' or '.join(kinds) or 'no network here'} does"
        )
    if not isinstance(config, NetworkSettings | OwnNetworkConfig):
        return
    stored = stored_ref(config.weights)
    if stored is not None:
        require_fitting(label, config.kind, stored)
        require_stored(label, stored, store)
    elif seed_of(config.weights) is None:
        _require_folder(label, config.kind, config, Path(config.weights))
    elif isinstance(config, VitDetConfig):
        raise WeightsMissingError("det labeller: there is no seeded vitdet; choose a detector, or add ViTDet's weights")


def _require_folder(label: str, kind: str, config: NetworkSettings | OwnNetworkConfig, folder: Path) -> None:
    found = folder_problem(folder, config.model_types, config.weight_files)
    if found is None:
        return
    expected = f"model_type {' or '.join(config.model_types)}" if config.model_types else f"of a {kind} network"
    name = name_of(label, kind)
    stored = f"or put weights into the store, `{add_command(name)}`, and choose --labellers stored; " if name else ""
    raise WeightsMissingError(
        f"{label} labeller: {found} at {folder}, expected a folder with {CONFIG_FILE} ({expected}) and {WEIGHTS_FILE}. Put it "
        f"there; {stored}or choose --labellers seeded to try the chain with tiny random networks"
    )


def verify_weights(config: AnyLabellerConfig, store: Store) -> None:
    """Read stored weights whole, and see that they are still those of their digest; others have none to compare with.

    Raises:
        WeightsMissingError: they are damaged.
    """
    if not isinstance(config, NetworkSettings | OwnNetworkConfig):
        return
    stored = stored_ref(config.weights)
    if stored is not None:
        require_undamaged(stored, store)


def pinned(config: AnyLabellerConfig, store: Store) -> AnyLabellerConfig:
    """The config with the digest of the stored weights that serve by its name now; as it is where that says nothing."""
    if not isinstance(config, NetworkSettings | OwnNetworkConfig):
        return config
    stored = stored_ref(config.weights)
    if stored is None or stored.digest is not None:
        return config
    pointer = read_pointer(store, stored.name)
    return config if pointer is None else config.model_copy(update={"weights": f"{config.weights}/{pointer.digest}"})


Config = TypeVar("Config", bound=AnyLabellerConfig)


def at_hand(config: Config, store: Store | None) -> Config:
    """The config with a local folder in the place of stored weights, fetched and verified.

    Raises:
        WeightsMissingError: they are not in the store, or are damaged.
    """
    if not isinstance(config, NetworkSettings | OwnNetworkConfig):
        return config
    stored = stored_ref(config.weights)
    return config if stored is None else config.model_copy(update={"weights": str(local_folder(stored, store))})
