"""Several crops a sample, batches over shards, half precision, and what must never be mixed."""

import io
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fourmill.core.crops import CROPPERS, CropConfig, crop_rows
from fourmill.core.labels import decode_depth, decode_image, decode_normal, decode_semseg, encode_semseg
from fourmill.core.ledger import write_ledger
from fourmill.core.manifest import Manifest
from fourmill.core.modality import modality_table
from fourmill.core.names import SPLITS, SampleKey
from fourmill.core.shards import (
    Item,
    MissingShardError,
    Recipe,
    ShardPlace,
    parquet_bytes,
    parquet_table,
    read_members,
    read_receipt,
    read_rows,
    write_shard,
)
from fourmill.core.store import Store
from fourmill.core.work import GroupWorker, ShardJob
from fourmill.tokenize.align import AlignWorker, align_recipe, token_folder
from fourmill.tokenize.checks import token_problems
from fourmill.tokenize.config import MOST_DIFFERENT, ImageTokenizerConfig, TokenizingConfig
from fourmill.tokenize.crop_settings import crop_settings, settings_path
from fourmill.tokenize.image_tokenizer import ImageTokenizer
from fourmill.tokenize.load import load_image_tokenizer, save_image_tokenizer
from fourmill.tokenize.manifest import ManifestError, build_manifest
from fourmill.tokenize.presets import smallest_tokenizers
from fourmill.tokenize.samples import FOLDERS
from fourmill.tokenize.worker import InParts, TokenWorker, token_recipe

CROPS = TokenizingConfig(crops=CropConfig(num=3, seed=4))
PLAIN = TokenizingConfig()
SMALL = smallest_tokenizers(feature_dim=12)
DECODERS: dict[str, Any] = {
    "rgb": lambda data: decode_image(data).rgb_HWC,
    "depth": decode_depth,
    "normal": decode_normal,
    "semseg": decode_semseg,
}
LABELS = ("rgb", "depth", "normal", "semseg")


def tokenizer(store: Store, label: str, seed: int = 0, px: int = 64) -> tuple[str, str]:
    """Folder and digest of a tiny tokenizer with weights of its own."""
    values = SMALL[label].model_dump()
    values["encoder"] |= {"kind": "vit", "width": 32, "depth": 1, "heads": 2}
    values["quantizer"] |= {"codebook_size": 64}
    if values["decoder"]["kind"] == "vit":
        values["decoder"] |= {"width": 32, "depth": 1, "heads": 2}
    torch.manual_seed(seed)
    model = ImageTokenizer(ImageTokenizerConfig.model_validate(values)).eval()
    digest, folder = save_image_tokenizer(store, f"tokenizer_{label}", model, "card")
    return folder, digest


def job(
    store: Store, dataset: str, modality: str, digest: str, config: TokenizingConfig, shard: int, split: Any
) -> ShardJob:
    px = int(modality.partition("@")[2])
    return ShardJob(split, shard, token_recipe(store, dataset, split, shard, modality, digest, px, "", config), "run")


def tokens_of(store: Store, dataset: str, modality: str, shard: int, split: str = "train") -> dict[str, np.ndarray]:
    place = ShardPlace(dataset, split, token_folder(modality), shard)  # type: ignore[arg-type]
    return {key: np.load(io.BytesIO(data), allow_pickle=False) for key, data in read_members(store, place)}


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("px", [64, 32])
def test_row_j_of_the_tokens_is_row_j_of_the_crop_settings(store: Store, tiny: Any, label: str, px: int) -> None:
    path, digest = tokenizer(store, label)
    modality = f"tok_{label}@{px}"
    worker = TokenWorker(store.root, tiny.dataset, modality, path, px, config=CROPS)
    worker.run(job(store, tiny.dataset, modality, digest, CROPS, 1, "train"))
    worker.close()
    folder = "images" if label == "rgb" else label
    model, found = load_image_tokenizer(store, path), tokens_of(store, tiny.dataset, modality, 1)
    for key, data in read_members(store, ShardPlace(tiny.dataset, "train", folder, 1)):
        rows = crop_rows(key, 80, 72, CROPS.crops)
        crops = [CROPPERS[label](DECODERS[label](data), row, px) for row in rows]
        assert found[key].shape == (3, (px // 8) ** 2) and found[key].dtype == np.int16
        assert np.array_equal(found[key], model.tokenize(np.stack(crops)))


def test_crops_of_images_become_features_and_then_tokens(store: Store, tiny: Any) -> None:
    path, digest = tokenizer(store, "clip")
    worker = TokenWorker(store.root, tiny.dataset, "tok_clip@64", path, 64, tiny.features, CROPS)
    worker.run(job(store, tiny.dataset, "tok_clip@64", digest, CROPS, 0, "train"))
    worker.close()
    found = tokens_of(store, tiny.dataset, "tok_clip@64", 0)
    key, data = next(read_members(store, ShardPlace(tiny.dataset, "train", "images", 0)))
    crops = np.stack([CROPPERS["rgb"](decode_image(data).rgb_HWC, r, 64) for r in crop_rows(key, 80, 72, CROPS.crops)])
    features = tiny.features(crops).astype(np.float16).astype(np.float32)
    assert np.array_equal(found[key], load_image_tokenizer(store, path).tokenize(features))


def tokenized(
    store: Store, tiny: Any, config: TokenizingConfig, labels: dict[str, tuple[str, str]], shard: int
) -> None:
    for label, (path, digest) in labels.items():
        worker = TokenWorker(store.root, tiny.dataset, f"tok_{label}@64", path, 64, config=config)
        worker.run_together([job(store, tiny.dataset, f"tok_{label}@64", digest, config, shard, s) for s in SPLITS])
        worker.close()


def aligned(store: Store, tiny: Any, config: TokenizingConfig, labels: dict[str, tuple[str, str]], shard: int) -> None:
    tokenized(store, tiny, config, labels, shard)
    modalities = [f"tok_{label}@64" for label in labels]
    for split in SPLITS:
        recipe = align_recipe(store, tiny.dataset, split, shard, modalities, config.crops)
        worker = AlignWorker(store.root, tiny.dataset, modalities, config.crops)
        worker.run(ShardJob(split, shard, recipe, "run"))


def test_a_block_of_tokens_has_as_many_rows_a_sample_as_crops(store: Store, tiny: Any) -> None:
    labels = {"semseg": tokenizer(store, "semseg")}
    for shard in (0, 1):
        tokenized(store, tiny, CROPS, labels, shard)
    place = (store, tiny.dataset, tiny.layout, "block_00", modality_table(64, 8, {"semseg": 64}, 4400)["tok_semseg@64"])
    assert token_problems(*place, 3) == []
    assert "int16 (3, 64), expected int16 (1, 64)" in token_problems(*place)[0]


def test_all_modalities_share_the_crops_that_are_written_beside_them(store: Store, tiny: Any) -> None:
    labels = {label: tokenizer(store, label) for label in ("rgb", "semseg")}
    aligned(store, tiny, CROPS, labels, 1)
    members = read_members(store, ShardPlace(tiny.dataset, "train", "crop_settings", 1))
    settings = {key: np.load(io.BytesIO(data), allow_pickle=False) for key, data in members}
    for key, rows in settings.items():
        assert rows.shape == (3, 5) and rows.dtype == np.int64
        assert rows.tolist() == [list(row) for row in crop_rows(SampleKey(key), 80, 72, CROPS.crops)]
        assert rows[0].tolist() == [0, 4, 72, 72, 0]
    for label in labels:
        assert tokens_of(store, tiny.dataset, f"tok_{label}@64", 1).keys() == settings.keys()


@pytest.mark.parametrize("config", [PLAIN, CROPS])
def test_crop_settings_are_there_before_the_first_token_of_a_shard(
    store: Store, tiny: Any, config: TokenizingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, digest = tokenizer(store, "rgb")
    places = [ShardPlace(tiny.dataset, "train", token_folder("tok_rgb@64"), shard) for shard in (0, 1)]

    def killed(*_: Any) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.setattr(ImageTokenizer, "tokenize", killed)
    worker = TokenWorker(store.root, tiny.dataset, "tok_rgb@64", path, 64, config=config)
    with pytest.raises(KeyboardInterrupt):
        worker.run_together([job(store, tiny.dataset, "tok_rgb@64", digest, config, s, "train") for s in (0, 1)])
    worker.close()
    for place in places:
        assert not store.exists(place.tar) and store.exists(settings_path(place))
        written = store.read(settings_path(place))
        images = dict(read_members(store, ShardPlace(tiny.dataset, "train", "images", place.shard)))
        assert crop_settings(store, place, config.crops) == {
            key: crop_rows(key, 80, 72, config.crops) for key in images
        }
        assert store.read(settings_path(place)) == written


def test_every_modality_is_cropped_by_the_settings_that_are_written(store: Store, tiny: Any) -> None:
    place, other = ShardPlace(tiny.dataset, "train", "images", 1), CropConfig(num=3, seed=5)
    drawn = crop_settings(store, place, other)  # the file has them; only its own word says that they are seed 4's
    table = parquet_table(store.read(settings_path(place)))
    crop_settings(store, place, CROPS.crops)
    metadata = parquet_table(store.read(settings_path(place))).schema.metadata
    kept = {key.decode(): value.decode() for key, value in metadata.items() if key.startswith(b"fourmill")}
    store.write(settings_path(place), parquet_bytes(table.replace_schema_metadata(None), kept))
    labels = {label: tokenizer(store, label) for label in ("rgb", "semseg")}
    aligned(store, tiny, CROPS, labels, 1)
    for label, (path, _) in labels.items():
        model, found = load_image_tokenizer(store, path), tokens_of(store, tiny.dataset, f"tok_{label}@64", 1)
        for key, data in read_members(store, ShardPlace(tiny.dataset, "train", FOLDERS[label], 1)):
            crops = [CROPPERS[label](DECODERS[label](data), row, 64) for row in drawn[key]]
            assert np.array_equal(found[key], model.tokenize(np.stack(crops)))
    published = dict(read_members(store, ShardPlace(tiny.dataset, "train", "crop_settings", 1)))
    rows = {key: np.load(io.BytesIO(data), allow_pickle=False).tolist() for key, data in published.items()}
    assert rows == {key: [list(row) for row in rows] for key, rows in drawn.items()}


def test_crop_settings_of_other_crops_or_images_and_damaged_ones_are_written_again(store: Store, tiny: Any) -> None:
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
    path, digest = tokenizer(store, "depth")  # its labels are of the images before
    worker = TokenWorker(store.root, tiny.dataset, "tok_depth@64", path, 64, config=CROPS)
    worker.run(job(store, tiny.dataset, "tok_depth@64", digest, CROPS, 1, "train"))
    worker.close()
    made = read_rows(store, ShardPlace(tiny.dataset, "train", token_folder("tok_depth@64"), 1)).to_pylist()
    assert made[-1]["status"] == "bad_label" and "older than the images" in made[-1]["reason"]


def test_tokens_of_other_crops_are_not_aligned(store: Store, tiny: Any) -> None:
    labels = {label: tokenizer(store, label) for label in ("rgb", "semseg")}
    aligned(store, tiny, PLAIN, labels, 1)
    recipe = align_recipe(store, tiny.dataset, "train", 1, ["tok_rgb@64", "tok_semseg@64"], CROPS.crops)
    worker = AlignWorker(store.root, tiny.dataset, ["tok_rgb@64", "tok_semseg@64"], CROPS.crops)
    with pytest.raises(ValueError, match=r"tok_rgb@64 of .* was made of other crops than the project's 3"):
        worker.run(ShardJob("train", 1, recipe, "run"))


def test_the_defaults_leave_recipes_as_they_were(store: Store, tiny: Any) -> None:
    plain = token_recipe(store, tiny.dataset, "train", 0, "tok_rgb@64", "0", 64)
    assert plain == token_recipe(store, tiny.dataset, "train", 0, "tok_rgb@64", "0", 64, "", PLAIN)
    together = TokenizingConfig(shards_together=1)
    assert plain == token_recipe(store, tiny.dataset, "train", 0, "tok_rgb@64", "0", 64, "", together)
    others = [CROPS, TokenizingConfig(precision="bf16"), TokenizingConfig(crops=CropConfig(num=3, seed=5))]
    found = [token_recipe(store, tiny.dataset, "train", 0, "tok_rgb@64", "0", 64, "", other) for other in others]
    assert len({recipe.digest for recipe in [plain, *found]}) == 4
    text = token_recipe(store, tiny.dataset, "train", 0, "caption", "0", 64)
    assert all(text == token_recipe(store, tiny.dataset, "train", 0, "caption", "0", 64, "", c) for c in others)


@pytest.mark.parametrize("config", [PLAIN, CROPS])
def test_shards_made_together_have_the_bytes_of_those_made_alone(
    store: Store, tiny: Any, config: TokenizingConfig
) -> None:
    path, digest = tokenizer(store, "depth")
    jobs = [
        job(store, tiny.dataset, "tok_depth@64", digest, config, shard, split) for shard in range(4) for split in SPLITS
    ]
    worker = TokenWorker(store.root, tiny.dataset, "tok_depth@64", path, 64, config=config)
    assert isinstance(worker, GroupWorker)
    alone = [worker.run(one) for one in jobs]
    for one in jobs:
        store.delete(ShardPlace(tiny.dataset, one.split, token_folder("tok_depth@64"), one.shard).receipt)
    worker.run(jobs[3])  # is there already and is left
    together = worker.run_together(jobs)
    worker.close()
    assert [r.content for r in together] == [r.content for r in alone]
    assert sum(r.num_ok for r in together) == 48


def test_batches_go_on_from_one_shard_to_the_next(store: Store, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, digest = tokenizer(store, "rgb")
    seen: list[tuple[int, str]] = []
    real = ImageTokenizer.tokenize

    def counted(self: ImageTokenizer, batch: np.ndarray, precision: Any = "fp32") -> np.ndarray:
        seen.append((len(batch), threading.current_thread().name))
        return real(self, batch, precision)

    monkeypatch.setattr(ImageTokenizer, "tokenize", counted)
    worker = TokenWorker(store.root, tiny.dataset, "tok_rgb@64", path, 64)
    worker.run_together(
        [job(store, tiny.dataset, "tok_rgb@64", digest, PLAIN, s, split) for s in range(4) for split in SPLITS]
    )
    worker.close()
    assert [num for num, _ in seen] == [48]  # of eight shards and splits
    assert threading.current_thread().name not in {name for _, name in seen}  # which writes meanwhile


def test_a_label_out_of_range_is_rejected_and_its_neighbours_in_the_batch_pass(store: Store, tiny: Any) -> None:
    path, digest = tokenizer(store, "semseg")
    good = encode_semseg(np.full((72, 80), 3, np.uint8))
    wrong = np.full((72, 80), 3, np.uint8)
    wrong[40, 40] = 200
    sink = io.BytesIO()
    Image.fromarray(wrong).save(sink, "PNG")
    members = {12: good, 13: sink.getvalue(), 14: good, 16: encode_semseg(np.full((20, 80), 3, np.uint8))}
    size = {"width": 80, "height": 72}
    items = [Item(SampleKey(f"{k:09d}"), ext="png", data=d, extra=size) for k, d in members.items()]
    place = ShardPlace(tiny.dataset, "train", "semseg", 1)
    write_shard(store, place, Recipe(stage="semseg", code_version="2"), items, "r", tiny.label_schema)
    worker = TokenWorker(store.root, tiny.dataset, "tok_semseg@64", path, 64, config=CROPS)
    receipt = worker.run(job(store, tiny.dataset, "tok_semseg@64", digest, CROPS, 1, "train"))
    worker.close()
    assert receipt.counts == {"bad_label": 2, "ok": 2}
    made = ShardPlace(tiny.dataset, "train", token_folder("tok_semseg@64"), 1)
    rows = {r["key"]: r["reason"] for r in read_rows(store, made).to_pylist()}
    assert "200" in rows["000000013"] and "80 x 20 pixels, its image has 80 x 72" in rows["000000016"]
    assert set(tokens_of(store, tiny.dataset, "tok_semseg@64", 1)) == {"000000012", "000000014"}


def test_a_shard_of_labels_that_is_gone_stops_the_work_and_says_what_to_make(store: Store, tiny: Any) -> None:
    path, digest = tokenizer(store, "normal")
    planned = job(store, tiny.dataset, "tok_normal@64", digest, PLAIN, 1, "train")
    place = ShardPlace(tiny.dataset, "train", "normal", 1)
    store.delete(place.tar)
    worker = TokenWorker(store.root, tiny.dataset, "tok_normal@64", path, 64)
    with pytest.raises(MissingShardError, match=r"is gone, though its receipt is there: delete .* and materialize"):
        worker.run(planned)
    assert read_receipt(store, ShardPlace(tiny.dataset, "train", token_folder("tok_normal@64"), 1)) is None
    store.delete(place.receipt)
    with pytest.raises(MissingShardError, match="is not there: materialize normal"):
        worker.run(planned)
    worker.close()


def test_a_manifest_never_mixes_two_tokenizers(store: Store, tiny: Any) -> None:
    old, new = tokenizer(store, "rgb", seed=0), tokenizer(store, "rgb", seed=1)
    assert old[1] != new[1]
    all_aligned(store, tiny, old)
    assert manifest(store, tiny, old[1]).modalities["tok_rgb@64"].tokenizer == old[1]
    aligned(store, tiny, PLAIN, {"rgb": new}, 1)
    for digest, wrong in ((old[1], new[1]), (new[1], old[1])):
        with pytest.raises(ManifestError, match=f"made by tokenizer {wrong[:12]}, the current one is {digest[:12]}"):
            manifest(store, tiny, digest)


def test_a_manifest_never_takes_shards_that_were_aligned_from_older_tokens(store: Store, tiny: Any) -> None:
    old, new = tokenizer(store, "rgb", seed=0), tokenizer(store, "rgb", seed=1)
    all_aligned(store, tiny, old)
    for shard in (0, 1):
        tokenized(store, tiny, PLAIN, {"rgb": new}, shard)
    aligned(store, tiny, PLAIN, {"rgb": new}, 0)
    stale = r"train aligned shard 00001 of tiny is stale: it was made of tokens/tok_rgb@64 .* materialize tokens/shards"
    with pytest.raises(ManifestError, match=stale):
        manifest(store, tiny, new[1])
    aligned(store, tiny, PLAIN, {"rgb": new}, 1)
    assert manifest(store, tiny, new[1]).num_samples("train") > 0


def test_a_manifest_never_takes_shards_that_were_aligned_from_older_images(store: Store, tiny: Any) -> None:
    made_by = tokenizer(store, "semseg")  # whose tokens stay as they are
    all_aligned(store, tiny, made_by, "semseg")
    place = ShardPlace(tiny.dataset, "val", "images", 1)
    size = {"width": 80, "height": 72}
    items = [Item(key, ext="png", data=data, extra=size) for key, data in read_members(store, place)]
    write_shard(store, place, Recipe(stage="images", code_version="2"), items[:-1], "r", tiny.label_schema)
    with pytest.raises(ManifestError, match="val aligned shard 00001 of tiny is stale: it was made of tiny/images"):
        manifest(store, tiny, made_by[1], "semseg")


def test_what_cannot_be_aligned_names_the_images_of_its_own_data_set(store: Store, tiny: Any) -> None:
    with pytest.raises(MissingShardError, match="materialize tiny/images"):
        align_recipe(store, tiny.dataset, "train", 9, ["tok_rgb@64"])


def all_aligned(store: Store, tiny: Any, made_by: tuple[str, str], label: str = "rgb") -> None:
    """Both shards of the first block, and the ledgers that a manifest counts in."""
    for shard in (0, 1):
        aligned(store, tiny, PLAIN, {label: made_by}, shard)
    for folder in ("images", "_aligned"):
        write_ledger(store, tiny.dataset, folder, "block_00", range(2), folder, 0)


def manifest(store: Store, tiny: Any, digest: str, label: str = "rgb") -> Manifest:
    name = f"tok_{label}@64"
    table = {n: m for n, m in modality_table(64, 8, {label: 64}, 4400).items() if n == name}
    return build_manifest(
        store, tiny.dataset, tiny.layout, ["block_00"], table, {name: digest}, "text", 64, 8, "source"
    )


@pytest.mark.parametrize("label", ["rgb", "depth", "normal", "semseg", "clip"])
def test_an_encoder_alone_gives_the_tokens_of_the_whole(store: Store, tiny: Any, label: str) -> None:
    path, _ = tokenizer(store, label)
    whole, encoder = load_image_tokenizer(store, path), load_image_tokenizer(store, path, with_decoder=False)
    kept = set(encoder.state_dict())
    assert kept < set(whole.state_dict()) and not any(k.startswith(("decoder.", "post_quant_proj.")) for k in kept)
    rng = np.random.default_rng(0)
    batches: dict[str, Callable[[], np.ndarray]] = {
        "rgb": lambda: rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8),
        "depth": lambda: rng.random((2, 64, 64), dtype=np.float32),
        "normal": lambda: np.full((2, 64, 64, 3), 0.5, np.float32),
        "semseg": lambda: rng.integers(0, 133, (2, 64, 64), dtype=np.uint8),
        "clip": lambda: rng.normal(size=(2, 8, 8, 12)).astype(np.float32),
    }
    batch = batches[label]()
    assert np.array_equal(encoder.tokenize(batch), whole.tokenize(batch))
    with pytest.raises(ValueError, match="without its decoder"):
        encoder.detokenize(whole.tokenize(batch))


def deep_encoder(label: str = "rgb") -> ImageTokenizer:
    """Of 12 blocks, untrained: its latents lie closer to the borders between codewords than a trained one's."""
    values = SMALL[label].model_dump()
    values["encoder"] |= {"kind": "vit", "width": 128, "depth": 12, "heads": 2}
    values["quantizer"] |= {"codebook_size": 512}
    torch.manual_seed(0)
    return ImageTokenizer(ImageTokenizerConfig.model_validate(values), with_decoder=False).eval()


def smooth_images(number: int) -> np.ndarray:
    return smooth("rgb", number)


def smooth(label: str, number: int) -> np.ndarray:
    """Maps of blocks of 4 pixels; features of one patch are noise."""
    rng = np.random.default_rng(0)
    drawn: dict[str, Callable[[], np.ndarray]] = {
        "rgb": lambda: rng.integers(0, 256, (number, 16, 16, 3), dtype=np.uint8),
        "depth": lambda: rng.random((number, 16, 16), dtype=np.float32),
        "normal": lambda: rng.uniform(-1, 1, (number, 16, 16, 3)).astype(np.float32),
        "semseg": lambda: rng.integers(0, 133, (number, 16, 16), dtype=np.uint8),
        "clip": lambda: rng.normal(size=(number, 8, 8, 12)).astype(np.float32),
    }
    found = drawn[label]()
    return found if label == "clip" else found.repeat(4, 1).repeat(4, 2)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])  # measured: up to 2.3 and 0.3 %
@pytest.mark.parametrize("label", SMALL)
def test_half_precision_disagrees_with_float32_on_few_tokens(label: str, precision: Any) -> None:
    model, x = deep_encoder(label), smooth(label, 8)
    full, half = model.tokenize(x), model.tokenize(x, precision)
    assert len(np.unique(full)) > 15
    different = float(np.mean(full != half))
    assert different <= MOST_DIFFERENT[precision]


def test_images_that_half_precision_cannot_hold_are_encoded_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = deep_encoder(), smooth_images(5)
    full, half = model.tokenize(x), model.tokenize(x, "bf16")
    one = int((full != half).any(1).argmax())
    assert not np.array_equal(half[one], full[one])
    real = type(model.encoder).forward

    def overflown(self: torch.nn.Module, x_BCHW: torch.Tensor) -> torch.Tensor:
        features = real(self, x_BCHW).clone()  # type: ignore[arg-type]
        if torch.is_autocast_enabled("cpu"):
            features[one, :, 2, 2] = torch.inf
        return features

    monkeypatch.setattr(type(model.encoder), "forward", overflown)
    found = model.tokenize(x, "bf16")
    assert np.array_equal(found[one], full[one])
    assert np.array_equal(np.delete(found, one, 0), np.delete(half, one, 0))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_damaged_weights_are_told_and_never_make_tokens(precision: Any) -> None:
    model = deep_encoder()
    with torch.no_grad():
        model.quant_proj.weight[0] = torch.nan
    with pytest.raises(ValueError, match="latents of the rgb tokenizer are no numbers"):
        model.tokenize(smooth_images(1), precision)


def test_a_stream_is_taken_part_by_part_and_parts_may_be_empty() -> None:
    parts = InParts(iter([(0, "a"), (0, "b"), (2, "c"), (3, "d")]))
    assert [list(parts.take(i)) for i in range(5)] == [["a", "b"], [], ["c"], ["d"], []]
    assert list(InParts(iter(())).take(0)) == []
