"""Tokenizers in the store: `models/{name}/{digest}/` with model.safetensors, config.json and card.md."""

import json
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from fourmill.core.digest import digest_bytes, digest_json
from fourmill.core.store import Store
from fourmill.core.weights import key_problems, shapes, shown_problems
from fourmill.tokenize.config import ImageTokenizerConfig
from fourmill.tokenize.image_tokenizer import ImageTokenizer


class ModelError(ValueError):
    """A tokenizer that cannot be loaded: which key or value, found and expected."""


def save_image_tokenizer(store: Store, name: str, model: ImageTokenizer, card: str) -> tuple[str, str]:
    """Publish a tokenizer, config and card first, weights last.

    Returns:
        Its digest (of weights and config) and its folder.
    """
    weights = save({key: value.contiguous() for key, value in sorted(model.state_dict().items())})
    config: dict[str, Any] = {"tokenizer": model.config.model_dump(mode="json"), "depth_span": list(model.depth_span)}
    digest = digest_json([digest_bytes(weights), config])
    folder = f"models/{name}/{digest}"
    store.write(f"{folder}/config.json", json.dumps(config, indent=1).encode())
    store.write(f"{folder}/card.md", card.replace("{digest}", digest).encode())
    store.write(f"{folder}/model.safetensors", weights)
    return digest, folder


def load_image_tokenizer(store: Store, folder: str, device: str = "cpu") -> ImageTokenizer:
    """A trained tokenizer, in evaluation mode.

    Args:
        folder: store path of `models/{name}/{digest}`.

    Raises:
        ModelError: a file is missing or damaged, or weights do not fit the config; every wrong key is named.
    """
    try:
        text, data = store.read(f"{folder}/config.json"), store.read(f"{folder}/model.safetensors")
    except FileNotFoundError as error:
        raise ModelError(f"no tokenizer at {folder}: {error.filename} is missing; train or import it first") from error
    try:
        values = json.loads(text)
        config = ImageTokenizerConfig.model_validate(values["tokenizer"])
        low, high = (float(value) for value in values["depth_span"])
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise ModelError(f"{folder}/config.json is not a tokenizer's config: {error}") from error
    try:
        state = load(data)
    except SafetensorError as error:
        raise ModelError(f"{folder}/model.safetensors is damaged: {error}; copy it again") from error
    with torch.device("meta"):
        check_keys(state, ImageTokenizer(config), folder)
    model = ImageTokenizer(config, (low, high))
    model.load_state_dict(state)
    return model.to_device(torch.device(device)).eval()


def check_keys(state: dict[str, torch.Tensor], model: torch.nn.Module, where: str) -> None:
    """See that weights are exactly those of a model.

    Raises:
        ModelError: unknown, missing or wrongly shaped keys, by name.
    """
    problems = key_problems(state, shapes(model.state_dict()))
    if problems:
        raise ModelError(f"{where}: weights do not fit the config: {shown_problems(problems)}")
