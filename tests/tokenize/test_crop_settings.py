"""Several crops a sample, and the settings that all its modalities are cropped by."""

import io
from typing import Any

import numpy as np
import pytest

from fourmill.core.crops import CROPPERS, CropConfig, crop_rows
from fourmill.core.labels import decode_image
from fourmill.core.modality import modality_table
from fourmill.core.names import SampleKey
from fourmill.core.shards import (
    Item,
    Recipe,
    ShardPlace,
    parquet_bytes,
    parquet_table,
    read_members,
    read_rows,
    write_shard,
)
from fourmill.core.store import Store
from fourmill.core.work import ShardJob
from fourmill.tokenize.align import AlignWorker, align_recipe, token_folder
from fourmill.tokenize.checks import token_problems
from fourmill.tokenize.config import TokenizingConfig
from fourmill.tokenize.crop_settings import crop_settings, settings_path
from fourmill.tokenize.image_tokenizer import ImageTokenizer
from fourmill.tokenize.load import load_image_tokenizer
from fourmill.tokenize.samples import FOLDERS
from fourmill.tokenize.worker import TokenWorker

CROPS = TokenizingConfig(crops=CropConfig(num=3, seed=4))
PLAIN = TokenizingConfig()
LABELS = ("rgb", "depth", "normal", "semseg")


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("px", [64, 32])
def test_row_j_of_the_tokens_is_row_j_of_the_crop_settings(
    store: Store, tiny: Any, chain: Any, label: str, px: int
) -> None:
    path, digest = chain.tokenizer(label)
    modality = f"tok_{label}@{px}"
    worker = TokenWorker(store.root, tiny.dataset, modality, path, px, config=CROPS)
    worker.run(chain.job(modality, digest, CROPS, 1, "train"))
    worker.close()
    folder = "images" if label == "rgb" else label
    model, found = load_image_tokenizer(store, path), chain.tokens_of(modality, 1)
    for key, data in read_members(store, ShardPlace(tiny.dataset, "train", folder, 1)):
        rows = crop_rows(key, 80, 72, CROPS.crops)
        crops = [CROPPERS[label](chain.decode(label, data), row, px) for row in rows]
        assert found[key].shape == (3, (px // 8) ** 2) and found[key].dtype == np.int16
        assert np.array_equal(found[key], model.tokenize(np.stack(crops)))


def test_crops_of_images_become_features_and_then_tokens(store: Store, tiny: Any, chain: Any) -> None:
    path, digest = chain.tokenizer("clip")
    worker = TokenWorker(store.root, tiny.dataset, "tok_clip@64", path, 64, tiny.features, CROPS)
    worker.run(chain.job("tok_clip@64", digest, CROPS, 0, "train"))
    worker.close()
    found = chain.tokens_of("tok_clip@64", 0)
    key, data = next(read_members(store, ShardPlace(tiny.dataset, "train", "images", 0)))
    crops = np.stack([CROPPERS["rgb"](decode_image(data).rgb_HWC, r, 64) for r in crop_rows(key, 80, 72, CROPS.crops)])
    features = tiny.features(crops).astype(np.float16).astype(np.float32)
    assert np.array_equal(found[key], load_image_tokenizer(store, path).tokenize(features))


def test_a_block_of_tokens_has_as_many_rows_a_sample_as_crops(store: Store, tiny: Any, chain: Any) -> None:
    labels = {"semseg": chain.tokenizer("semseg")}
    for shard in (0, 1):
        chain.tokenized(CROPS, labels, shard)
    place = (store, tiny.dataset, tiny.layout, "block_00", modality_table(64, 8, {"semseg": 64}, 4400)["tok_semseg@64"])
    assert token_problems(*place, 3) == []
    assert "int16 (3, 64), expected int16 (1, 64)" in token_problems(*place)[0]


def test_all_modalities_share_the_crops_that_are_written_beside_them(store: Store, tiny: Any, chain: Any) -> None:
    labels = {label: chain.tokenizer(label) for label in ("rgb", "semseg")}
    chain.aligned(CROPS, labels, 1)
    members = read_members(store, ShardPlace(tiny.dataset, "train", "crop_settings", 1))
    settings = {key: np.load(io.BytesIO(data), allow_pickle=False) for key, data in members}
    for key, rows in settings.items():
        assert rows.shape == (3, 5) and rows.dtype == np.int64
        assert rows.tolist() == [list(row) for row in crop_rows(SampleKey(key), 80, 72, CROPS.crops)]
        assert rows[0].tolist() == [0, 4, 72, 72, 0]
    for label in labels:
        assert chain.tokens_of(f"tok_{label}@64", 1).keys() == settings.keys()


@pytest.mark.parametrize("config", [PLAIN, CROPS])
def test_crop_settings_are_there_before_the_first_token_of_a_shard(
    store: Store, tiny: Any, chain: Any, config: TokenizingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, digest = chain.tokenizer("rgb")
    places = [ShardPlace(tiny.dataset, "train", token_folder("tok_rgb@64"), shard) for shard in (0, 1)]

    def killed(*_: Any) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.setattr(ImageTokenizer, "tokenize", killed)
    worker = TokenWorker(store.root, tiny.dataset, "tok_rgb@64", path, 64, config=config)
    with pytest.raises(KeyboardInterrupt):
        worker.run_together([chain.job("tok_rgb@64", digest, config, s, "train") for s in (0, 1)])
    worker.close()
    for place in places:
        assert not store.exists(place.tar) and store.exists(settings_path(place))
        written = store.read(settings_path(place))
        images = dict(read_members(store, ShardPlace(tiny.dataset, "train", "images", place.shard)))
        assert crop_settings(store, place, config.crops) == {
            key: crop_rows(key, 80, 72, config.crops) for key in images
        }
        assert store.read(settings_path(place)) == written


def test_every_modality_is_cropped_by_the_settings_that_are_written(store: Store, tiny: Any, chain: Any) -> None:
    place, other = ShardPlace(tiny.dataset, "train", "images", 1), CropConfig(num=3, seed=5)
    drawn = crop_settings(store, place, other)  # the file has them; only its own word says that they are seed 4's
    table = parquet_table(store.read(settings_path(place)))
    crop_settings(store, place, CROPS.crops)
    metadata = parquet_table(store.read(settings_path(place))).schema.metadata
    kept = {key.decode(): value.decode() for key, value in metadata.items() if key.startswith(b"fourmill")}
    store.write(settings_path(place), parquet_bytes(table.replace_schema_metadata(None), kept))
    labels = {label: chain.tokenizer(label) for label in ("rgb", "semseg")}
    chain.aligned(CROPS, labels, 1)
    for label, (path, _) in labels.items():
        model, found = load_image_tokenizer(store, path), chain.tokens_of(f"tok_{label}@64", 1)
        for key, data in read_members(store, ShardPlace(tiny.dataset, "train", FOLDERS[label], 1)):
            crops = [CROPPERS[label](chain.decode(label, data), row, 64) for row in drawn[key]]
            assert np.array_equal(found[key], model.tokenize(np.stack(crops)))
    published = dict(read_members(store, ShardPlace(tiny.dataset, "train", "crop_settings", 1)))
    rows = {key: np.load(io.BytesIO(data), allow_pickle=False).tolist() for key, data in published.items()}
    assert rows == {key: [list(row) for row in rows] for key, rows in drawn.items()}


def test_crop_settings_of_other_crops_or_images_and_damaged_ones_are_written_again(
    store: Store, tiny: Any, chain: Any
) -> None:
    place = ShardPlace(tiny.dataset, "train", "images", 1)
    other = CropConfig(num=3, seed=5)
    first = crop_settings(store, place, CROPS.crops)
    assert crop_settings(store, place, other) != first == crop_settings(store, place, CROPS.crops)
    store.write(settings_path(place), b"PAR1, but not really")
    assert crop_settings(store, place, CROPS.crops) == first
    members, size = list(read_members(store, place)), {"width": 60, "height": 72}
    items = [Item(key, ext="png", data=data, extra=size) for key, data in members[:-1]]
    write_shard(store, place, Recipe(stage="images", code_version="2"), items, "r", tiny.label_schema)
    again = crop_settings(store, place, CROPS.crops)
    assert again == {key: crop_rows(key, 60, 72, CROPS.crops) for key, _ in members[:-1]}
    path, digest = chain.tokenizer("depth")  # its labels are of the images before
    worker = TokenWorker(store.root, tiny.dataset, "tok_depth@64", path, 64, config=CROPS)
    worker.run(chain.job("tok_depth@64", digest, CROPS, 1, "train"))
    worker.close()
    made = read_rows(store, ShardPlace(tiny.dataset, "train", token_folder("tok_depth@64"), 1)).to_pylist()
    assert len(made) > 1  # the last one's image is gone, the others' are of another size now
    assert all(row["status"] == "bad_label" and "older than the images" in row["reason"] for row in made)


def test_tokens_of_other_crops_are_not_aligned(store: Store, tiny: Any, chain: Any) -> None:
    labels = {label: chain.tokenizer(label) for label in ("rgb", "semseg")}
    chain.aligned(PLAIN, labels, 1)
    recipe = align_recipe(store, tiny.dataset, "train", 1, ["tok_rgb@64", "tok_semseg@64"], 64, CROPS.crops)
    worker = AlignWorker(store.root, tiny.dataset, ["tok_rgb@64", "tok_semseg@64"], 64, CROPS.crops)
    with pytest.raises(ValueError, match=r"tok_rgb@64 of .* was made of other crops than the project's 3"):
        worker.run(ShardJob("train", 1, recipe, "run"))
