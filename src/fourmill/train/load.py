"""4M in the store: `models/{name}/{digest}/` with model.safetensors, config.json and card.md."""

import json
from dataclasses import asdict
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fourmill.core.modality import Modality
from fourmill.core.store import Store
from fourmill.core.weights import key_problems, shapes, shown_problems, weights_digest
from fourmill.train.config import ModelConfig
from fourmill.train.model import FourM


class ModelError(ValueError):
    """A model that cannot be loaded: which key or value, found and expected."""


def save_fourm(store: Store, name: str, model: FourM, training: dict[str, Any], card: str) -> tuple[str, str]:
    """Publish a model, config and card first, weights last.

    Args:
        model: shared tensors are written under each of their names.
        training: what it was trained from; kept in config.json.
        card: Markdown; `{digest}` in it is replaced.

    Returns:
        Its digest (of weights and config) and its folder.
    """
    weights = save({key: value.detach().cpu().clone() for key, value in sorted(model.state_dict().items())})
    config: dict[str, Any] = {
        "model": model.config.model_dump(mode="json"),
        "patch_px": model.patch_px,
        "modalities": [asdict(modality) for modality in model.modalities],
        "predicted": list(model.decoder_embeddings),
        "training": training,
    }
    digest = weights_digest(weights, config)
    folder = f"models/{name}/{digest}"
    store.write(f"{folder}/config.json", json.dumps(config, indent=1).encode())
    store.write(f"{folder}/card.md", card.replace("{digest}", digest).encode())
    store.write(f"{folder}/model.safetensors", weights)
    return digest, folder


def load_fourm(store: Store, folder: str, device: str = "cpu") -> FourM:
    """A trained model, in evaluation mode.

    Args:
        folder: store path of `models/{name}/{digest}`.

    Raises:
        ModelError: a file is missing or damaged, weights do not fit the config, where every wrong key is named, or the two are
            not those that the folder's digest is of.
    """
    try:
        text, data = store.read(f"{folder}/config.json"), store.read(f"{folder}/model.safetensors")
    except FileNotFoundError as error:
        raise ModelError(f"no model at {folder}: {error.filename} is missing; train it first") from error
    try:
        values = json.loads(text)
        config = ModelConfig.model_validate(values["model"])
        modalities, patch_px = [Modality(**m) for m in values["modalities"]], int(values["patch_px"])
        predicted = [str(name) for name in values["predicted"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder}/config.json is not a 4M config: {error}") from error
    try:
        state = load(data)
    except SafetensorError as error:
        raise ModelError(f"{folder}/model.safetensors is damaged: {error}; copy it again") from error
    model = FourM(config, modalities, patch_px, predicted)
    load_weights(model, state, folder)
    found = weights_digest(data, values)
    if found != folder.rpartition("/")[2]:
        raise ModelError(
            f"{folder} holds weights or a config of another digest, {found[:12]}: what is made with it would bear the wrong name. "
            "Copy it again, or train it again"
        )
    return model.to(device).eval()


def load_weights(model: FourM, state: dict[str, torch.Tensor], where: str) -> None:
    """Copy weights into a model that has exactly their keys and shapes.

    Raises:
        ModelError: unknown, missing or wrongly shaped keys, by name; or two copies of a shared tensor that differ.
    """
    problems = key_problems(state, shapes(model.state_dict()))
    if problems:
        raise ModelError(f"{where}: weights do not fit the config: {shown_problems(problems)}")
    for one, other in shared_names(model):
        if not torch.equal(state[one], state[other]):
            raise ModelError(
                f"{where}: {one} and {other} differ, this model shares them; the file is of an untied model"
            )
    model.load_state_dict(state)


def shared_names(model: FourM) -> list[tuple[str, str]]:
    """Pairs of state-dict names that are one tensor in the model."""
    names = list(model.decoder_embeddings)
    return [
        *((f"encoder_embeddings.{n}.mod_emb", f"decoder_embeddings.{n}.mod_emb") for n in names),
        *((f"decoder_embeddings.{n}.token_emb.weight", f"decoder_embeddings.{n}.to_logits.weight") for n in names),
    ]
