"""Which model serves: a pointer a name, beside the models kept under their digests."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fourmill.core.store import Store

FOURM_ASSETS = {"fourm": "fourm/pretrain", "text2im": "fourm/text2im", "superres": "fourm/superres"}
"""The asset that trains each model of 4M, by the model's name."""


class ModelMissingError(ValueError):
    """No model by that name; says which asset trains it."""


class ModelRef(BaseModel):
    """A model in the store: `models/{name}/{digest}/...`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    digest: str
    path: str
    report: dict[str, Any] = {}


def pointer_path(dataset: str, name: str) -> str:
    """Where the pointer of a name is kept."""
    return f"{dataset}/models/{name}.json"


def set_current(store: Store, dataset: str, ref: ModelRef) -> None:
    """Let a model serve from now on."""
    store.write(pointer_path(dataset, ref.name), ref.model_dump_json(indent=1).encode())


def current(store: Store, dataset: str, name: str, asset: str) -> ModelRef:
    """The model that serves.

    Raises:
        ModelMissingError: none does yet, or the file that names it is damaged.
    """
    path = pointer_path(dataset, name)
    try:
        return ModelRef.model_validate_json(store.read(path))
    except ValidationError as error:
        raise ModelMissingError(f"{path} is damaged: materialize {asset} again") from error
    except FileNotFoundError:
        raise ModelMissingError(f"{dataset} has no {name} that serves yet: materialize {asset} first") from None
