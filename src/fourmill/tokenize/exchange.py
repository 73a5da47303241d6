"""Tokenizers in and out: the public 4M's files to the store, verified; ours to files that the public 4M reads.

Public files are a folder with model.safetensors and config.json, as on the hub, a .safetensors file with its config in its
metadata, or a `.pth` of the public training program, of which only arrays and arguments are read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from fourmill.core.digest import digest_bytes, digest_file
from fourmill.core.safe_load import read_checkpoint
from fourmill.core.sequences import TextTokenizer
from fourmill.core.store import LocalStore, Store
from fourmill.tokenize.card import imported_card, imported_text_card, is_of_fitted_text
from fourmill.tokenize.image_tokenizer import ImageTokenizer
from fourmill.tokenize.load import ModelError, StoredConfig, load_image_tokenizer, make_tokenizer, save_image_tokenizer
from fourmill.tokenize.public import OURS, PublicConfigError, from_arguments, from_metadata, from_public, to_public
from fourmill.tokenize.released import TEXT, TEXT_FILE, label_of_name

WEIGHTS, CONFIG, CARD, ORIGIN = "model.safetensors", "config.json", "card.md", "origin.json"
_DEPTH_SPAN = (-4.0, 4.0)  # of standardised depth, for weights that do not say theirs


@dataclass(frozen=True)
class Origin:
    """Where an imported tokenizer is from; kept beside it as origin.json."""

    source: str
    licence: str


@dataclass(frozen=True)
class Imported:
    """A tokenizer that was imported."""

    name: str
    digest: str
    path: str  # store folder


def import_image_tokenizer(store: Store, name: str, source: Path, origin: Origin) -> Imported:
    """Verify a public tokenizer and keep it under its digest; equal weights and config give equal digests.

    Args:
        name: `tokenizer_rgb`, `_depth`, `_normal`, `_semseg` or `_clip`.
        source: a folder, or a file of weights.

    Raises:
        PublicConfigError: its config has values that no network here computes, by name.
        ModelError: weights that are not exactly the config's, by key, or are not finite.
        UnsafeFileError: a pickle that asks for more than arrays.
        FileNotFoundError: nothing there.
    """
    label = label_of_name(name)
    state, values, file = read_public(source)
    config = from_public(values, label, str(source))
    known = values.get(OURS)
    span = known.get("depth_span") if isinstance(known, Mapping) else None
    model = make_tokenizer(StoredConfig(config, _span(span, source)), _as_floats(state), str(file))
    card = imported_card(name, config, digest_file(file), _origin_lines(origin))
    digest, folder = save_image_tokenizer(store, name, model, card)
    _keep_origin(store, folder, origin)
    return Imported(name, digest, folder)


def import_text_tokenizer(store: Store, source: Path, origin: Origin) -> Imported:
    """Verify a WordPiece file, the public one or one of ours, and keep it under its digest.

    Raises:
        SequenceError: it does not follow 4M's layout of ids.
        FileNotFoundError: no file.
    """
    if source.is_dir():
        source /= TEXT_FILE  # as `export_text_tokenizer` calls it
    data = source.read_bytes()
    size = TextTokenizer(data).vocab_size
    digest = digest_bytes(data)
    folder = f"models/{TEXT}/{digest}"
    card = f"{folder}/{CARD}"
    keeps_its_own = store.exists(card) and is_of_fitted_text(store.read(card).decode())  # it was fitted here
    if not keeps_its_own:
        store.write(f"{folder}/{CARD}", imported_text_card(digest, size, _origin_lines(origin)).encode())
    store.write(f"{folder}/{TEXT_FILE}", data)
    _keep_origin(store, folder, origin)
    return Imported(TEXT, digest, folder)


def export_image_tokenizer(store: Store, folder: str, target: Path) -> None:
    """Write a stored tokenizer as the public classes load it: model.safetensors, with its config in it too, and config.json.

    Raises:
        ModelError: no such tokenizer.
        FileExistsError: the target is a file, or holds other files or another label's tokenizer.
    """
    model = load_image_tokenizer(store, folder)
    values = to_public(model.config, _stored_px(model), model.depth_span)
    state = {key: value.contiguous() for key, value in sorted(model.state_dict().items())}
    weights = save(state, {name: str(value) for name, value in values.items()})
    files = {WEIGHTS: weights, CONFIG: json.dumps(values, indent=1).encode(), CARD: store.read(f"{folder}/{CARD}")}
    _write_files(target, files)


def export_text_tokenizer(store: Store, folder: str, target: Path) -> None:
    """Write a stored vocabulary as the tokenizers library, and so the public 4M, loads it: tokenizer.json.

    Raises:
        FileExistsError: as of an image tokenizer.
    """
    _write_files(target, {name: store.read(f"{folder}/{name}") for name in (TEXT_FILE, CARD)})


def _write_files(target: Path, files: Mapping[str, bytes]) -> None:
    """Into a folder that is new, or holds an earlier export of the same kind."""
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; give a new folder")
    others = {p.name for p in target.iterdir()} - files.keys() if target.exists() else set()
    if others or _title(target / CARD) not in (None, _title_of(files[CARD])):
        raise FileExistsError(
            f"{target} holds {', '.join(sorted(others)[:3]) or 'another tokenizer'}; give a new folder"
        )
    target.mkdir(parents=True, exist_ok=True)
    # Whole or not at all, and as readable as other files: safetensors' are their owner's alone.
    written = LocalStore(target)
    for name, data in files.items():
        written.write(name, data)


def _title(card: Path) -> bytes | None:
    return _title_of(card.read_bytes()) if card.is_file() else None


def _title_of(card: bytes) -> bytes:
    return card.partition(b"\n")[0]


def read_origin(store: Store, folder: str) -> Origin | None:
    """Where a tokenizer was imported from; None for those that were trained here."""
    try:
        return Origin(**json.loads(store.read(f"{folder}/{ORIGIN}")))
    except FileNotFoundError:
        return None


def read_public(source: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], Path]:
    """Weights, config values and file of weights of a public tokenizer, as they are.

    Raises:
        FileNotFoundError: no file of weights.
        PublicConfigError: no config.
    """
    folder, file = (source, source / WEIGHTS) if source.is_dir() else (source.parent, source)
    checkpoint = read_checkpoint(file)
    if file.suffix == ".safetensors" and (folder / CONFIG).is_file():
        values = _read_json(folder / CONFIG)
    elif file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            values = from_metadata(opened.metadata() or {})
    else:
        values = from_arguments(checkpoint.arguments)
        values |= _sides_of_input(checkpoint.weights)
    if not isinstance(values, dict) or not values:
        raise PublicConfigError(f"{source} has no config: neither {CONFIG}, nor metadata or arguments in {file.name}")
    has_unet = any(key.startswith("decoder.input_blocks.") for key in checkpoint.weights)
    return checkpoint.weights, {"dec_type": "unet_patched" if has_unet else "vit_b_dec", **values}, file


def _read_json(file: Path) -> Any:
    try:
        values = json.loads(file.read_bytes())
    except ValueError as error:
        raise PublicConfigError(f"{file} is no JSON: {error}") from error
    return values.get("config", values) if isinstance(values, dict) else values


def _sides_of_input(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What the public loader reads off the weights, since the training program's arguments do not say it."""
    if "cls_emb.weight" in state:
        classes, channels = state["cls_emb.weight"].shape
        return {"n_labels": classes, "n_channels": channels}
    proj = state.get("encoder.proj.weight")
    return {} if proj is None or proj.ndim < 2 else {"n_channels": proj.shape[1]}


def _as_floats(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    wrong = [key for key, value in state.items() if not value.is_floating_point() or not bool(value.isfinite().all())]
    if wrong:
        raise ModelError(f"weights that are no finite numbers: {', '.join(sorted(wrong)[:8])}; take the file again")
    return {key: value.float() for key, value in state.items()}


def _span(found: object, source: Path) -> tuple[float, float]:
    if found is None:
        return _DEPTH_SPAN
    if isinstance(found, list | tuple) and len(found) == 2 and all(isinstance(v, int | float) for v in found):
        return float(found[0]), float(found[1])
    raise PublicConfigError(f"{source}: {OURS}.depth_span is {found!r}, expected two numbers")


def _stored_px(model: ImageTokenizer) -> int:
    """Side in pixels that positions are stored for: not that of the crops that are tokenized."""
    positions = model.state_dict().get("encoder.pos_emb", model.state_dict().get("decoder.pos_emb"))
    return model.config.input_px if positions is None else positions.shape[-1] * model.config.patch_px


def _keep_origin(store: Store, folder: str, origin: Origin) -> None:
    store.write(f"{folder}/{ORIGIN}", json.dumps({"source": origin.source, "licence": origin.licence}).encode())


def _origin_lines(origin: Origin) -> list[str]:
    return [f"- origin: {origin.source}", f"- licence: {origin.licence}"]
