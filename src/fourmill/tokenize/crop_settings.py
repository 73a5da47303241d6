"""Crop settings of a shard's images: written before its first token, and read by every modality that is cropped.

One Parquet file a shard and split, which appears whole or not at all and says what it was made of. It has no receipt on purpose:
several modalities' workers may come to a shard at a time, and one that writes the file again puts the same bytes in its
place. `align` publishes the settings of the samples that all modalities have, in the public layout.
"""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from fourmill.core.crops import CropConfig, CropRow, crop_rows
from fourmill.core.digest import digest_json
from fourmill.core.modality import CROPS, IMAGES
from fourmill.core.names import SampleKey, shard_name
from fourmill.core.shards import ShardPlace, need, parquet_bytes, parquet_table
from fourmill.core.store import Store
from fourmill.tokenize.freshness import image_sizes

FOLDER = f"_tokens/{CROPS}"
VERSION = "1"  # of the file
_MADE_OF = "fourmill.made_of"  # key of the file's metadata
# Crops one after the other, five values each.
_SCHEMA = pa.schema([("key", pa.string()), ("crops", pa.list_(pa.int64()))])

Settings = dict[SampleKey, list[CropRow]]


def settings_path(place: ShardPlace) -> str:
    """Where the settings of a shard lie, whatever folder `place` is of."""
    return f"{place.dataset}/{place.split}/{FOLDER}/{shard_name(place.shard)}.parquet"


def crop_settings(store: Store, place: ShardPlace, config: CropConfig) -> Settings:
    """The crops of a shard's images, of all that are there: read, or drawn and written where nobody has done so yet.

    Args:
        place: any stage's shard.

    Returns:
        Rows (top, left, height, width, mirrored) in pixels of the image, by sample; `config.num` each, the centre square first.

    Raises:
        MissingShardError: the images are not there.
    """
    images = ShardPlace(place.dataset, place.split, IMAGES, place.shard)
    made_of = digest_json([VERSION, config.digest, need(store, images, f"{place.dataset}/images").content])
    path = settings_path(place)
    found = _read(store, path, made_of)
    if found is None:
        store.write(path, _file(_drawn(store, images, config), made_of))
        found = _read(store, path, made_of)  # what others will read, not what was drawn here
    if found is None:
        raise ValueError(
            f"{path} was written by another run with other crops or images meanwhile: let one run end, then start the other again"
        )
    return found


def _drawn(store: Store, images: ShardPlace, config: CropConfig) -> Settings:
    sizes = image_sizes(store, images)
    return {key: crop_rows(key, width, height, config) for key, (width, height) in sizes.items()}


def _file(settings: Settings, made_of: str) -> bytes:
    crops = [np.ravel(rows).tolist() for rows in settings.values()]
    return parquet_bytes(pa.table([list(settings), crops], schema=_SCHEMA), {_MADE_OF: made_of})


def _read(store: Store, path: str, made_of: str) -> Settings | None:
    """Settings that were made of the same; None where there are none, or those of other crops, other images, or no settings."""
    try:
        table = parquet_table(store.read(path))
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    if (table.schema.metadata or {}).get(_MADE_OF.encode()) != made_of.encode():
        return None
    keys, crops = table["key"].to_pylist(), table["crops"].to_pylist()
    return {SampleKey(key): _rows(flat) for key, flat in zip(keys, crops, strict=True)}


def _rows(flat: Iterable[int]) -> list[CropRow]:
    values = iter(flat)
    return list(zip(values, values, values, values, values, strict=True))
