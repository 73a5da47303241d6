"""The weights that a project's labellers name: pinned when a project is made, looked for before any work starts."""

from collections.abc import Iterable

from fourmill.core.store import open_store
from fourmill.pseudolabel.config import AnyLabellerConfig
from fourmill.pseudolabel.named_weights import pinned, require_weights, verify_weights
from fourmill.pseudolabel.stored import WeightsMissingError
from fourmill.runtime.project import Project


def pinned_labellers(project: Project) -> Project:
    """The project with the digests of the stored weights that serve now, where it names weights without one."""
    store = open_store(project.store)
    labellers = {label: pinned(config, store) for label, config in project.labellers.items()}
    return project if labellers == project.labellers else project.model_copy(update={"labellers": labellers})


def missing_weights(project: Project, is_thorough: bool = False) -> dict[str, str]:
    """By label: what is missing for its labeller, and the command that mends it.

    Args:
        is_thorough: read stored weights whole, as far as they are there, and see whether they are damaged.
    """
    store = open_store(project.store)
    found: dict[str, str] = {}
    for label, config in project.labellers.items():
        try:
            require_weights(label, config, store)
            if is_thorough:
                verify_weights(config, store)
        except WeightsMissingError as error:
            found[label] = str(error)
    return found


def require_labellers(project: Project, labels: Iterable[str]) -> None:
    """See that labellers can be made, before the first of them takes a GPU.

    Raises:
        WeightsMissingError: some have no weights; with the command for each.
    """
    missing = missing_weights(project)
    lacking = [missing[label] for label in labels if label in missing]
    if lacking:
        raise WeightsMissingError("\n".join(lacking))


def with_weights(project: Project, name: str, weights: str) -> Project:
    """The project with the labellers that name these weights, in whichever version, on this one."""
    changed: dict[str, AnyLabellerConfig] = {}
    for label, config in project.labellers.items():
        named = getattr(config, "weights", "")
        if named != weights and (named == f"stored:{name}" or named.startswith(f"stored:{name}/")):
            changed[label] = config.model_copy(update={"weights": weights})
    return project.model_copy(update={"labellers": {**project.labellers, **changed}}) if changed else project
