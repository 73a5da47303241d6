"""Tokenizers in the store: `models/{name}/{digest}/` with model.safetensors, config.json and card.md."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fourmill.core.store import Store
from fourmill.core.weights import key_problems, shapes, shown_problems, weights_digest
from fourmill.tokenize.config import ImageTokenizerConfig
from fourmill.tokenize.image_tokenizer import ImageTokenizer


class ModelError(ValueError):
    """A tokenizer that cannot be loaded: which key or value, found and expected."""


@dataclass(frozen=True)
class StoredConfig:
    """config.json of a tokenizer."""

    tokenizer: ImageTokenizerConfig
    depth_span: tuple[float, float]  # standardised depth that is given back as 0 and as 1


def save_image_tokenizer(store: Store, name: str, model: ImageTokenizer, card: str) -> tuple[str, str]:
    """Publish a tokenizer, config and card first, weights last.

    Args:
        card: `{digest}` in it becomes the digest.

    Returns:
        Its digest (of weights and config) and its folder.
    """
    weights = save({key: value.contiguous() for key, value in sorted(model.state_dict().items())})
    config: dict[str, Any] = {"tokenizer": model.config.model_dump(mode="json"), "depth_span": list(model.depth_span)}
    digest = weights_digest(weights, config)
    folder = f"models/{name}/{digest}"
    store.write(f"{folder}/config.json", json.dumps(config, indent=1).encode())
    store.write(f"{folder}/card.md", card.replace("{digest}", digest).encode())
    store.write(f"{folder}/model.safetensors", weights)
    return digest, folder


def load_image_tokenizer(store: Store, folder: str, device: str = "cpu", with_decoder: bool = True) -> ImageTokenizer:
    """A trained tokenizer, in evaluation mode.

    Args:
        folder: store path of `models/{name}/{digest}`.
        with_decoder: without it only the encoder's weights and the codebook are kept: tokens can be made, not decoded.

    Raises:
        ModelError: a file is missing or damaged, weights do not fit the config, where every wrong key is named, or the two are
            not those that the folder's digest is of.
    """
    (known, config), weights = _read_config(store, folder), _read(store, folder, "model.safetensors")
    try:
        state = load(weights)
    except SafetensorError as error:
        raise ModelError(f"{folder}/model.safetensors is damaged: {error}; copy it again") from error
    model = make_tokenizer(known, state, folder, with_decoder)
    found = weights_digest(weights, config)
    if found != folder.rpartition("/")[2]:
        raise ModelError(
            f"{folder} holds weights or a config of another digest, {found[:12]}: tokens would bear the wrong name. "
            "Copy it again, or train or import it"
        )
    return model.to_device(torch.device(device)).eval()


def read_config(store: Store, folder: str) -> ImageTokenizerConfig:
    """What a stored tokenizer is; its weights are not read. Raises ModelError."""
    return _read_config(store, folder)[0].tokenizer


def _read_config(store: Store, folder: str) -> tuple[StoredConfig, dict[str, Any]]:
    """A config, and its values as the file has them, which the digest is of."""
    text = _read(store, folder, "config.json")
    try:
        values = json.loads(text)
        config = ImageTokenizerConfig.model_validate(values["tokenizer"])
        low, high = (float(value) for value in values["depth_span"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder}/config.json is not a tokenizer's config: {error}") from error
    return StoredConfig(config, (low, high)), values


def make_tokenizer(
    known: StoredConfig, state: Mapping[str, torch.Tensor], where: str, with_decoder: bool = True
) -> ImageTokenizer:
    """A tokenizer of exactly these weights.

    Args:
        where: they are from, for messages.
        with_decoder: else the decoder's weights are looked at and left.

    Raises:
        ModelError: unknown, missing or wrongly shaped keys, by name.
    """
    with torch.device("meta"):
        check_keys(state, ImageTokenizer(known.tokenizer), where)
    model = ImageTokenizer(known.tokenizer, known.depth_span, with_decoder)
    model.load_state_dict({key: state[key] for key in model.state_dict()})
    return model


def check_keys(state: Mapping[str, torch.Tensor], model: torch.nn.Module, where: str) -> None:
    """See that weights are exactly those of a model.

    Raises:
        ModelError: unknown, missing or wrongly shaped keys, by name.
    """
    problems = key_problems(state, shapes(model.state_dict()))
    if problems:
        raise ModelError(f"{where}: weights do not fit the config: {shown_problems(problems)}")


def _read(store: Store, folder: str, name: str) -> bytes:
    try:
        return store.read(f"{folder}/{name}")
    except FileNotFoundError as error:
        raise ModelError(f"no tokenizer at {folder}: {error.filename} is missing; train or import it first") from error
