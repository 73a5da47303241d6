"""What must be true of tokens before training may see them, and the figures a person looks at."""

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from fourmill.core.labels import decode_boxes, decode_image
from fourmill.core.metrics import perplexity
from fourmill.core.modality import CROPS, IMAGES, Modality
from fourmill.core.names import SPLITS, Layout, SampleKey
from fourmill.core.shards import ShardPlace, damage_of, places_of, read_members, read_receipt, read_rows
from fourmill.core.sheet import grid_png
from fourmill.core.store import Store
from fourmill.core.tar import TarError
from fourmill.tokenize.align import source_asset, source_folders, token_folder

_MAX_PROBLEMS = 20
_UNREADABLE = (FileNotFoundError, TarError)  # a tar that is gone, or damaged


def token_problems(
    store: Store, dataset: str, layout: Layout, block: str, modality: Modality, num_crops: int = 1
) -> list[str]:
    """What is wrong with one modality's tokens of a block; empty when nothing is.

    Args:
        num_crops: rows that every sample's tokens have; texts have none.
    """
    problems: list[str] = []
    for place in places_of(dataset, layout, block, token_folder(modality.name)):
        problems += _shard_problems(store, place, modality, num_crops)
        if len(problems) >= _MAX_PROBLEMS:
            break
    return problems


def _shard_problems(store: Store, place: ShardPlace, modality: Modality, num_crops: int) -> list[str]:
    try:
        members = list(read_members(store, place))
    except _UNREADABLE as error:
        return [damage_of(place, error)]
    problems: list[str] = []
    for key, data in members:
        is_text = modality.kind == "text"
        problem = _text_problem(modality, data) if is_text else _grid_problem(modality, data, num_crops)
        if problem:
            problems.append(f"{place.tar} {key}: {problem}")
    receipt = read_receipt(store, place)
    if receipt is not None and len(members) != receipt.num_ok:
        problems.append(f"{place.tar} holds {len(members)} samples, its receipt says {receipt.num_ok}")
    return problems


def _grid_problem(modality: Modality, data: bytes, num_crops: int) -> str | None:
    try:
        tokens = np.load(io.BytesIO(data), allow_pickle=False)
    except (EOFError, ValueError) as error:
        return f"not a readable array ({error}), expected int16 ({num_crops}, {modality.max_tokens})"
    if tokens.dtype != np.int16 or tokens.shape != (num_crops, modality.max_tokens):
        return f"{tokens.dtype} {tokens.shape}, expected int16 ({num_crops}, {modality.max_tokens})"
    if tokens.min() < 0 or tokens.max() >= (modality.vocab_size or 0):
        return f"ids {tokens.min()}..{tokens.max()}, expected 0..{(modality.vocab_size or 0) - 1}"
    return None


def _text_problem(modality: Modality, data: bytes) -> str | None:
    try:
        _ = data.decode() if modality.ext == "txt" else decode_boxes(data)
    except ValueError as error:
        return str(error)
    return None


def token_figures(store: Store, dataset: str, layout: Layout, block: str, modality: Modality) -> dict[str, Any]:
    """How the vocabulary is used in a block: share of ids seen and perplexity, or tokens a text.

    For tokens in which `token_problems` finds nothing: ids outside the vocabulary cannot be counted in it.
    """
    folder = token_folder(modality.name)
    if modality.kind == "text":
        lengths = [
            n
            for place in places_of(dataset, layout, block, folder)
            for n in read_rows(store, place)["num_tokens"].to_pylist()
            if n is not None
        ]
        return {
            "tokens_per_text": round(float(np.mean(lengths)), 2) if lengths else 0.0,
            "longest": max(lengths, default=0),
        }
    counts = np.zeros(modality.vocab_size or 0, np.int64)
    for place in places_of(dataset, layout, block, folder):
        for _, data in read_members(store, place):
            counts += np.bincount(np.load(io.BytesIO(data), allow_pickle=False).ravel(), minlength=len(counts))
    return {"ids_seen": round(float((counts > 0).mean()), 4), "perplexity": round(perplexity(counts), 1)}


def token_preview(
    store: Store, dataset: str, layout: Layout, block: str, modality: Modality, num: int = 8
) -> bytes | None:
    """Images of a block beside their token ids as colours; None for texts and empty blocks.

    For tokens in which `token_problems` finds nothing: what is no grid has no picture.
    """
    if modality.kind == "text":
        return None
    for place in places_of(dataset, layout, block, token_folder(modality.name)):
        tokens = dict(_first(read_members(store, place), num))
        if tokens:
            images = ShardPlace(dataset, place.split, IMAGES, place.shard)
            pictures = {k: decode_image(d).rgb_HWC for k, d in read_members(store, images) if k in tokens}
            grids = [_id_colours(np.load(io.BytesIO(d), allow_pickle=False)[0], modality) for d in tokens.values()]
            return grid_png([[pictures[k] for k in tokens], grids], list(tokens), ["image", "token ids"], cell_px=72)
    return None


def _first(members: Iterator[tuple[SampleKey, bytes]], num: int) -> Iterator[tuple[SampleKey, bytes]]:
    for _, member in zip(range(num), members, strict=False):
        yield member


def _id_colours(ids_L: np.ndarray, modality: Modality) -> np.ndarray:
    """Ids as colours: equal ids alike, near ids not (multiplication by odd numbers spreads them)."""
    ids = ids_L.astype(np.int64).reshape(modality.grid, modality.grid)
    return np.stack([(ids * k % 251).astype(np.uint8) for k in (37, 101, 199)], axis=-1)


def aligned_problems(
    store: Store, dataset: str, layout: Layout, block: str, folders: Iterable[str], base_px: int
) -> list[str]:
    """Read the aligned tars of a block back: same keys in the same order in every folder, bytes as the receipts say.

    Args:
        base_px: side of the crops of the base resolution.
    """
    problems: list[str] = []
    folders = list(folders)
    for shard in layout.shards_of(block):
        for split in SPLITS:
            problems += _unaligned(store, [ShardPlace(dataset, split, folder, shard) for folder in folders], base_px)
    return problems[:_MAX_PROBLEMS]


def _unaligned(store: Store, places: Sequence[ShardPlace], base_px: int) -> list[str]:
    """What is wrong with one shard in its public folders; keys are compared among those that can be read."""
    problems: list[str] = []
    keys: dict[str, list[SampleKey]] = {}
    for place in places:
        try:
            keys[place.folder] = [key for key, _ in read_members(store, place)]
        except _UNREADABLE as error:
            problems.append(damage_of(place, error) + _source_damage(store, place, base_px))
    first, expected = next(iter(keys.items()), ("", []))
    problems += [
        f"{places[0].split} shard {places[0].shard:05d}: {folder} has {len(found)} keys, {first} has {len(expected)}, or in another order"
        for folder, found in keys.items()
        if found != expected
    ]
    return problems


def _source_damage(store: Store, place: ShardPlace, base_px: int) -> str:
    """What else is to be done about a public tar that was linked to one which is damaged too: it would be linked again."""
    if place.folder == CROPS:
        return ""
    sources = source_folders([place.folder] if place.folder != "rgb" else [])
    source = ShardPlace(place.dataset, place.split, sources[place.folder], place.shard)
    try:
        for _ in read_members(store, source):
            pass
    except _UNREADABLE as error:
        asset = source_asset(place.dataset, place.folder, base_px)
        return f". It is made of {asset}, which comes first: {damage_of(source, error)}"
    return ""
