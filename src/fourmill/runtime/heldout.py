"""Held-out samples with all that is known of them: what figures are computed on and pages are made from."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fourmill.core.crops import CROPPERS, centre_crop
from fourmill.core.labels import DECODERS, Box, decode_boxes, decode_image
from fourmill.core.manifest import Manifest, ShardEntry
from fourmill.core.modality import Modality, tokens_name
from fourmill.core.names import SampleKey
from fourmill.core.sequences import detection_text, parse_detection
from fourmill.core.shards import ShardPlace, need, needed_members
from fourmill.core.store import Store
from fourmill.tokenize.align import token_folder

_MAPS = ("depth", "normal", "semseg")


@dataclass(frozen=True)
class View:
    """The same samples at one resolution: their images, and their tokens as the shards hold them."""

    px: int
    rgb_BHWC: NDArray[np.uint8]
    tokens: dict[str, NDArray[np.int16]]  # by label: (B, L)


@dataclass(frozen=True)
class HeldOut:
    """Samples of the validation split, cropped as the model sees them. B samples of S x S pixels."""

    keys: list[SampleKey]
    maps: dict[str, NDArray]  # rgb uint8 (B,S,S,3), depth (B,S,S), normal (B,S,S,3), semseg ids (B,S,S)
    boxes: list[list[Box]]  # inside the crop
    captions: list[str]
    views: list[View]  # the lowest resolution first; maps and boxes are of the base one
    base_px: int

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def tokens(self) -> dict[str, NDArray[np.int16]]:
        """Tokens of the base resolution by label."""
        return next(view.tokens for view in self.views if view.px == self.base_px)


def read_heldout(store: Store, manifest: Manifest, number: int) -> HeldOut:
    """The first samples of the manifest's validation split.

    Raises:
        ValueError: the split is empty, or what is to be read is not what the manifest was made of.
    """
    samples = [sample for _, sample in zip(range(number), _samples(store, manifest), strict=False)]
    if not samples:
        raise ValueError(f"{manifest.dataset} has no validation sample; raise source.val_fraction and rebuild the list")
    return HeldOut(
        keys=[s["key"] for s in samples],
        maps={name: np.stack([s[name] for s in samples]) for name in ("rgb", *_MAPS)},
        boxes=[s["boxes"] for s in samples],
        captions=[s["caption"] for s in samples],
        views=[
            View(
                px,
                np.stack([s[f"rgb {px}"] for s in samples]),
                {_label(m): np.stack([s[m.name] for s in samples]) for m in _tokens(manifest) if m.px == px},
            )
            for px in _sides(manifest)
        ],
        base_px=manifest.input_px,
    )


def _tokens(manifest: Manifest) -> list[Modality]:
    return [m for m in manifest.at("both") if m.kind == "tokens"]


def _label(modality: Modality) -> str:
    return modality.label.removeprefix("tok_")


def _sides(manifest: Manifest) -> list[int]:
    return sorted({m.px for m in manifest.at("both") if m.px is not None})


def _samples(store: Store, manifest: Manifest) -> Iterator[dict]:
    for entry in manifest.splits["val"]:
        yield from _shard(store, manifest, entry)


def _shard(store: Store, manifest: Manifest, entry: ShardEntry) -> Iterator[dict]:
    def members(folder: str) -> dict[SampleKey, bytes]:
        place = ShardPlace(manifest.dataset, "val", folder, entry.shard)
        _check_listed(store, manifest, place, entry)
        return dict(needed_members(store, place, _asset(folder)))

    rgb, det, caption = members("rgb"), members("det"), members("caption")
    labels = {name: members(name) for name in _MAPS}
    tokens = {m.name: members(m.folder) for m in _tokens(manifest)}
    for key, data in rgb.items():
        image = decode_image(data).rgb_HWC
        height, width = image.shape[:2]
        row = centre_crop(width, height)
        yield {
            "key": key,
            "rgb": CROPPERS["rgb"](image, row, manifest.input_px),
            **{name: CROPPERS[name](DECODERS[name](labels[name][key]), row, manifest.input_px) for name in _MAPS},
            "boxes": parse_detection(detection_text(decode_boxes(det[key]), width, height, row)),
            "caption": caption[key].decode(),
            **{f"rgb {px}": CROPPERS["rgb"](image, row, px) for px in _sides(manifest)},
            **{name: np.load(io.BytesIO(found[key]), allow_pickle=False)[0] for name, found in tokens.items()},
        }


def _asset(folder: str) -> str:
    return f"labels/{folder}" if folder in _MAPS else "tokens/shards"


def _check_listed(store: Store, manifest: Manifest, place: ShardPlace, entry: ShardEntry) -> None:
    """A tar is the one that the manifest names, or the label that the tokens it names were made of."""
    found = need(store, place, _asset(place.folder))
    if place.folder in _MAPS:
        tokens = replace(place, folder=token_folder(tokens_name(place.folder, manifest.input_px)))
        made_of = need(store, tokens, f"tokens/{place.folder}").recipe.inputs.get(place.folder)
        is_listed = found.content == made_of
    else:
        is_listed = found.tar_sha256 == entry.tars.get(place.folder)
    if not is_listed:
        raise ValueError(
            f"{place.tar} is not what the manifest {manifest.digest[:12]} was made of: bring its tokens, tokens/shards and "
            "tokens/manifest up to date"
        )
