import io
import json

import numpy as np
import pytest

from fourmill.core.crops import centre_crop, crop_rgb
from fourmill.core.labels import Box, decode_boxes, decode_image, encode_boxes, encode_depth
from fourmill.core.names import SampleKey, Split
from fourmill.core.sequences import TextTokenizer
from fourmill.core.shards import (
    Item,
    MissingShardError,
    Recipe,
    ShardPlace,
    finished,
    need,
    read_members,
    read_receipt,
    read_rows,
    write_shard,
)
from fourmill.core.work import ShardJob, no_progress
from fourmill.tokenize.config import TextTokenizerConfig, TrainSetConfig
from fourmill.tokenize.freshness import StaleLabelsError
from fourmill.tokenize.load import load_image_tokenizer
from fourmill.tokenize.train import train_tokenizer
from fourmill.tokenize.train_set import TrainSetError, build_train_set, read_label, unpack
from fourmill.tokenize.wordpiece import fit_wordpiece
from fourmill.tokenize.worker import TokenWorker, label_of, token_recipe


def _trained(spec, read_report, label):
    report = read_report(train_tokenizer(spec(label, steps=2), no_progress))
    return report["path"], report["digest"]


def _text(store):
    report = json.loads(
        store.read(fit_wordpiece(store, ["a bottle on the floor"], TextTokenizerConfig(vocab_size=4400)))
    )
    return report["path"], report["digest"]


def _run(store, dataset, modality, path, digest, features=None, split: Split = "train", shard=1, px=64):
    recipe = token_recipe(store, dataset, split, shard, modality, digest, px)
    worker = TokenWorker(store.root, dataset, modality, path, px, features)
    place = ShardPlace(dataset, split, f"_tokens/{modality}", shard)
    assert finished(store, place, recipe) is None
    receipt = worker.run(ShardJob(split, shard, recipe, "run"))
    assert finished(store, place, recipe) == receipt
    return place, receipt


@pytest.mark.parametrize("label", ["rgb", "depth", "clip"])
def test_a_shard_of_labels_becomes_a_shard_of_tokens(store, tiny, spec, read_report, label):
    path, digest = _trained(spec, read_report, label)
    features = tiny.features if label == "clip" else None
    place, receipt = _run(store, tiny.dataset, f"tok_{label}@64", path, digest, features)
    members = dict(read_members(store, place))
    keys = [k for k, _ in read_members(store, ShardPlace(tiny.dataset, "train", "images", 1))]
    assert list(members) == keys and receipt.counts == {"ok": len(keys)}
    tokens = {k: np.load(io.BytesIO(v), allow_pickle=False) for k, v in members.items()}
    assert all(t.shape == (1, 64) and t.dtype == np.int16 for t in tokens.values())
    assert set(read_rows(store, place)["num_tokens"].to_pylist()) == {64}
    # The packed training set holds the same crops: a tokenizer meets the same pixels in both.
    crops = unpack(read_label(store, tiny.train_set.path, tiny.train_set.digest, label).train, label)
    first = [k for s in range(4) for k, _ in read_members(store, ShardPlace(tiny.dataset, "train", "images", s))]
    again = load_image_tokenizer(store, path).tokenize(crops)[first.index(keys[0])]
    assert np.mean(again == tokens[keys[0]][0]) > (0.9 if label == "depth" else 0.99)
    assert receipt.tar_sha256 == _run_again(store, tiny, label, path, digest, features)


def _run_again(store, tiny, label, path, digest, features):
    recipe = token_recipe(store, tiny.dataset, "train", 1, f"tok_{label}@64", digest, 64)
    worker = TokenWorker(store.root, tiny.dataset, f"tok_{label}@64", path, 64, features)
    return worker.run(ShardJob("train", 1, recipe, "later")).tar_sha256


def test_a_second_resolution_is_the_same_crop_at_another_size(store, tiny, spec, read_report):
    path, digest = _trained(spec, read_report, "rgb")
    large, _ = _run(store, tiny.dataset, "tok_rgb@64", path, digest)
    small, receipt = _run(store, tiny.dataset, "tok_rgb@32", path, digest, px=32)
    other = read_receipt(store, large)
    assert other is not None and receipt.recipe.config != other.recipe.config
    tokens = {k: np.load(io.BytesIO(v), allow_pickle=False) for k, v in read_members(store, small)}
    assert list(tokens) == [k for k, _ in read_members(store, large)]
    assert all(t.shape == (1, 16) and t.dtype == np.int16 for t in tokens.values())
    key, data = next(read_members(store, ShardPlace(tiny.dataset, "train", "images", 1)))
    image = decode_image(data).rgb_HWC
    crop = crop_rgb(image, centre_crop(image.shape[1], image.shape[0]), 32)
    assert np.array_equal(load_image_tokenizer(store, path).tokenize(crop[None]), tokens[key])
    with pytest.raises(ValueError, match="rgb crops of 36 pixels"):
        TokenWorker(store.root, tiny.dataset, "tok_rgb@36", path, 36)


def test_unfit_labels_are_rejected_with_their_reason_and_the_others_pass(store, tiny, spec, read_report):
    path, digest = _trained(spec, read_report, "depth")
    good = encode_depth(np.full((72, 80), 0.5, np.float32))
    members = {
        12: good,
        13: encode_depth(np.full((70, 80), 0.5, np.float32)),
        14: b"not an image",
        16: good,
    }
    size = {"width": 80, "height": 72}
    items = [Item(SampleKey(f"{k:09d}"), ext="png", data=d, extra=size) for k, d in members.items()]
    place = ShardPlace(tiny.dataset, "train", "depth", 1)
    write_shard(store, place, Recipe(stage="depth", code_version="2"), items, "r", tiny.label_schema)
    tokens, receipt = _run(store, tiny.dataset, "tok_depth@64", path, digest)
    assert receipt.counts == {"bad_label": 2, "ok": 2}
    rows = {row["key"]: row for row in read_rows(store, tokens).to_pylist()}
    assert rows["000000013"]["reason"] == "depth has 80 x 70 pixels, its image has 80 x 72"
    assert "not a readable depth map" in rows["000000014"]["reason"]


def test_captions_and_boxes_pass_as_they_are_once_they_encode(store, tiny):
    path, digest = _text(store)
    captions, _ = _run(store, tiny.dataset, "caption", path, digest)
    tokenizer = TextTokenizer(store.read(f"{path}/tokenizer.json"))
    assert {data for _, data in read_members(store, captions)} == {b"a bottle on the floor"}
    assert set(read_rows(store, captions)["num_tokens"].to_pylist()) == {len(tokenizer.encode("a bottle on the floor"))}
    boxes, _ = _run(store, tiny.dataset, "det", path, digest)
    assert all(decode_boxes(data)[0].class_name == "bottle" for _, data in read_members(store, boxes))
    assert set(read_rows(store, boxes)["num_tokens"].to_pylist()) == {6}


def test_boxes_of_unknown_classes_are_rejected(store, tiny):
    path, digest = _text(store)
    data = {12: encode_boxes([Box(0, 0, 1, 1, 0.9, "unicorn")]), 13: b"{}", 14: encode_boxes([])}
    items = [
        Item(SampleKey(f"{k:09d}"), ext="json", data=d, extra={"width": 80, "height": 72}) for k, d in data.items()
    ]
    place = ShardPlace(tiny.dataset, "train", "boxes", 1)
    write_shard(store, place, Recipe(stage="det", code_version="2"), items, "r", tiny.label_schema)
    tokens, receipt = _run(store, tiny.dataset, "det", path, digest)
    assert receipt.counts == {"bad_label": 2, "ok": 1}
    rows = read_rows(store, tokens).to_pylist()
    assert "unicorn" in rows[0]["reason"] and "not a detection file" in rows[1]["reason"]
    assert rows[2]["num_tokens"] == 1


def test_a_changed_label_or_tokenizer_stops_the_work(store, tiny, spec, read_report):
    path, digest = _trained(spec, read_report, "semseg")
    worker = TokenWorker(store.root, tiny.dataset, "tok_semseg@64", path, 64)
    recipe = token_recipe(store, tiny.dataset, "val", 0, "tok_semseg@64", digest, 64)
    for wrong in ({"inputs": {"semseg": "0"}}, {"weights": "0" * 64}):
        with pytest.raises(ValueError, match="start the run again"):
            worker.run(ShardJob("val", 0, recipe.model_copy(update=wrong), "run"))
    with pytest.raises(ValueError, match="is a tokenizer of semseg, needed is one of rgb"):
        TokenWorker(store.root, tiny.dataset, "tok_rgb@64", path, 64)
    with pytest.raises(ValueError, match="clip needs them"):
        TokenWorker(store.root, tiny.dataset, "tok_clip@64", path, 64)


def test_the_recipe_names_what_is_missing(store, tiny):
    with pytest.raises(MissingShardError, match="materialize labels/depth"):
        token_recipe(store, tiny.dataset, "train", 9, "tok_depth@64", "0", 64)
    depth = token_recipe(store, tiny.dataset, "train", 0, "tok_depth@64", "0", 64)
    assert list(depth.inputs) == ["depth"] and depth.weights == "0"
    assert depth != token_recipe(store, tiny.dataset, "train", 0, "tok_depth@64", "1", 64)
    with pytest.raises(ValueError, match="not tokenized"):
        label_of("tok_edges@64")


def test_a_training_set_depends_on_its_blocks_only_and_takes_the_first_samples(store, tiny):
    one_block = TrainSetConfig(num_samples=5, num_eval=2, blocks=("block_00",))
    made = build_train_set(store, tiny.dataset, tiny.layout, one_block, 64)
    assert (made.num_train, made.num_eval) == (5, 2)
    assert made == build_train_set(store, tiny.dataset, tiny.layout, one_block, 64)
    labels = read_label(store, made.path, made.digest, "semseg")
    assert labels.train.shape == (5, 64, 64) and set(np.unique(labels.train)) == {39, 122}
    assert np.abs(unpack(read_label(store, made.path, made.digest, "normal").train, "normal")).max() <= 1
    with pytest.raises(TrainSetError, match="no clip"):
        read_label(store, made.path, made.digest, "clip")
    with pytest.raises(MissingShardError, match="tiny/images"):
        wide = tiny.layout.model_copy(update={"num_blocks": 3})
        blocks = TrainSetConfig(num_samples=500, num_eval=2, blocks=("block_02",))
        build_train_set(store, tiny.dataset, wide, blocks, 64)


def test_a_sample_without_one_label_is_not_in_the_training_set(store, tiny):
    place = ShardPlace(tiny.dataset, "train", "normal", 0)
    write_shard(store, place, Recipe(stage="normal", code_version="2"), [], "r", tiny.label_schema)
    one_block = TrainSetConfig(num_samples=50, num_eval=2, blocks=("block_00",))
    made = build_train_set(store, tiny.dataset, tiny.layout, one_block, 64)
    others = [k for k, _ in read_members(store, ShardPlace(tiny.dataset, "train", "images", 1))]
    assert made.num_train == len(others)


@pytest.mark.parametrize("folder", ["depth", "normal", "semseg"])
def test_a_training_set_never_pairs_images_with_labels_of_older_ones(store, tiny, folder):
    images, labels = (ShardPlace(tiny.dataset, "train", name, 1) for name in ("images", folder))
    first = need(store, images, "images").content
    _made_again(store, tiny, labels, {"images": first})
    config = TrainSetConfig(num_samples=50, num_eval=2, blocks=("block_00",))
    assert build_train_set(store, tiny.dataset, tiny.layout, config, 64).num_train > 0
    _made_again(store, tiny, images)  # the same keys and sizes, other pictures
    assert need(store, images, "images").content != first
    stale = rf"labels/{folder}, train shard 00001: made of images .* materialize labels/{folder} for its block again"
    with pytest.raises(StaleLabelsError, match=stale):
        build_train_set(store, tiny.dataset, tiny.layout, config, 64)


def _made_again(store, tiny, place, inputs=None):
    """A shard whose members have changed places."""
    keys, members = zip(*read_members(store, place), strict=True)
    size, ext = {"width": 80, "height": 72}, "jpg" if place.folder == "images" else "png"
    items = [Item(key, ext=ext, data=data, extra=size) for key, data in zip(keys, members[::-1], strict=True)]
    recipe = Recipe(stage=place.folder, code_version="2", inputs=inputs or {})
    write_shard(store, place, recipe, items, "r", tiny.label_schema)


@pytest.mark.parametrize("folder", ["images", "semseg"])
def test_a_tar_that_is_gone_under_a_training_set_says_what_to_make(store, tiny, folder):
    place = ShardPlace(tiny.dataset, "train", folder, 1)
    store.delete(place.tar)
    one_block = TrainSetConfig(num_samples=50, num_eval=2, blocks=("block_00",))
    asset = f"{tiny.dataset}/{'images' if folder == 'images' else 'labels/semseg'}"
    again = f"materialize {asset} for its block again"
    with pytest.raises(MissingShardError, match=f"{place.tar} is gone, though its receipt is there: {again}"):
        build_train_set(store, tiny.dataset, tiny.layout, one_block, 64, labels=f"{tiny.dataset}/labels")


def test_boxes_whose_tar_is_gone_say_what_to_make(store, tiny):
    path, digest = _text(store)
    store.delete(ShardPlace(tiny.dataset, "train", "boxes", 1).tar)
    with pytest.raises(MissingShardError, match="is gone, though its receipt is there"):
        _run(store, tiny.dataset, "det", path, digest)


def test_tokens_of_features_depend_on_the_weights_that_made_them(store, tiny):
    place = (store, tiny.dataset, "train", 0, "tok_clip@64", "t" * 64, 64)
    first, other, again = (token_recipe(*place, features_digest=digest * 64) for digest in "aba")
    assert first.digest != other.digest and first.digest == again.digest
