import io
from collections.abc import Callable

import numpy as np
import pytest

from fourmill.core.manifest import Manifest, read_manifest
from fourmill.core.sequences import EOS, TextTokenizer
from fourmill.core.shards import ShardPlace
from fourmill.core.store import LocalStore
from fourmill.core.tar import TarWriter
from fourmill.train.batch import Inputs, Targets
from fourmill.train.config import PretrainConfig
from fourmill.train.data import DataError, Loader, SampleSet, checked_manifest, read_samples
from fourmill.train.masking import Mixture


def _manifest(store: tuple[LocalStore, str]) -> Manifest:
    return checked_manifest(*store)


def _loader(samples: SampleSet, manifest: Manifest, config: PretrainConfig) -> Loader:
    modalities = sorted((manifest.modality(n) for n in manifest.modalities), key=lambda m: m.name)
    return Loader(samples, Mixture(config.masking, modalities), 4, 3, manifest.patch_px)


def test_samples_are_the_shards_in_order_cropped_and_encoded(store: tuple[LocalStore, str]):
    manifest = _manifest(store)
    samples = read_samples(store[0], manifest, "train")
    assert len(samples) == 18 and samples.keys == sorted(samples.keys)
    assert samples.pixels["rgb@32"].shape == (18, 16, 192) and samples.pixels["rgb@32"].dtype == np.uint8
    assert abs(int(samples.pixels["rgb@32"][9].mean()) - 10 * 12) <= 2
    assert samples.tokens["tok_depth@32"].shape == (18, 16)
    text = TextTokenizer(store[0].read(manifest.text_tokenizer))
    assert text.decode(samples.texts["det"][1].tolist()) == "v0=125 v1=100 v2=624 v3=899 bottle"
    assert samples.texts["det"][0].tolist() == [EOS]
    assert all(ids[-1] == EOS for ids in samples.texts["caption"])


def test_tokens_alone_are_read_without_images_and_texts(store: tuple[LocalStore, str]):
    manifest = _manifest(store)
    for folder in ("rgb", "caption", "det", "tok_semseg@32"):
        store[0].delete(ShardPlace("cc12m", "val", folder, 0).tar)
    chosen = [manifest.modality("tok_depth@32")]
    samples = read_samples(store[0], manifest, "val", modalities=chosen)
    assert samples.keys == ["000000009"] and not samples.pixels and not samples.texts
    assert samples.tokens["tok_depth@32"].shape == (1, 16)


def test_a_limit_reads_the_first_samples_only(store: tuple[LocalStore, str]):
    assert read_samples(store[0], _manifest(store), "train", 3).keys == ["000000000", "000000001", "000000002"]


def test_every_sample_is_seen_once_an_epoch(store: tuple[LocalStore, str], config: PretrainConfig):
    manifest = _manifest(store)
    loader = _loader(read_samples(store[0], manifest, "train"), manifest, config)
    seen = [i for step in range(9) for i in loader.indices(step)]  # 36 samples: two epochs, a batch spans both
    assert sorted(seen[:18]) == sorted(seen[18:]) == list(range(18))
    assert seen[:18] != seen[18:]


def test_a_batch_is_a_function_of_its_step(store: tuple[LocalStore, str], config: PretrainConfig):
    manifest = _manifest(store)
    samples = read_samples(store[0], manifest, "train")
    one, other = _loader(samples, manifest, config), _loader(samples, manifest, config)
    for step in (0, 7):
        one.batch(step)
    a, b = one.batch(3), other.batch(3)
    for x, y in ((a.inputs, b.inputs), (a.targets, b.targets)):
        assert all(np.array_equal(value, getattr(y, key)) for key, value in vars(x).items())
    assert not np.array_equal(a.targets.id_BM, other.batch(4).targets.id_BM)


def _tokens(part: Inputs | Targets, row: int) -> list[tuple[int, int, int]]:
    fields = vars(part)
    columns = [next(v for k, v in fields.items() if k.startswith(name))[row] for name in ("modality", "position", "id")]
    return [(int(m), int(p), int(i)) for m, p, i in zip(*columns, strict=True)]


def test_a_batch_holds_the_tokens_of_its_samples(store: tuple[LocalStore, str], config: PretrainConfig):
    manifest = _manifest(store)
    samples = read_samples(store[0], manifest, "train")
    loader = _loader(samples, manifest, config)
    names = [m.name for m in loader.mixture.modalities]
    for step in range(5):
        batch, patch = loader.batch(step), 0
        for row, i in enumerate(loader.indices(step)):
            for m, place, token in _tokens(batch.inputs, row):
                if m >= 0 and names[m] == "rgb@32":
                    assert np.array_equal(batch.inputs.patches_PK[patch], samples.pixels["rgb@32"][i, place])
                    patch += 1
                elif m >= 0 and names[m].startswith("tok_"):
                    assert token == samples.tokens[names[m]][i, place]
            for m, place, token in _tokens(batch.targets, row):
                if m >= 0 and names[m].startswith("tok_"):
                    assert token == samples.tokens[names[m]][i, place]
        assert patch == len(batch.inputs.patches_PK)


def test_a_changed_tar_is_refused(store: tuple[LocalStore, str]):
    place = ShardPlace("cc12m", "train", "tok_depth@32", 1)
    data = bytearray(store[0].read(place.tar))
    data[600] ^= 1
    store[0].write(place.tar, bytes(data))
    with pytest.raises(DataError, match=r"tok_depth@32/shard-00001\.tar has digest .* the manifest names"):
        read_samples(store[0], _manifest(store), "train")


def test_a_missing_tar_says_what_to_materialize(store: tuple[LocalStore, str]):
    store[0].delete(ShardPlace("cc12m", "val", "det", 0).tar)
    with pytest.raises(DataError, match=r"det/shard-00000\.tar is missing: materialize tokens/shards"):
        read_samples(store[0], _manifest(store), "val")


def test_tokens_outside_the_vocabulary_are_refused(store: tuple[LocalStore, str]):
    manifest, place = _manifest(store), ShardPlace("cc12m", "val", "tok_depth@32", 0)
    member, tar = io.BytesIO(), io.BytesIO()
    np.save(member, np.full((1, 16), 12, np.int16))
    writer = TarWriter(tar)
    key = read_samples(store[0], manifest, "val").keys[0]
    writer.add(key, "npy", member.getvalue())
    sha = writer.close()
    store[0].write(place.tar, tar.getvalue())
    entry = manifest.splits["val"][0]
    entry = entry.model_copy(update={"tars": {**entry.tars, "tok_depth@32": sha}})
    manifest = manifest.model_copy(update={"splits": {**manifest.splits, "val": [entry]}})
    with pytest.raises(DataError, match=r"sample 000000009: tok_depth@32 .* ids 12\.\.12, expected 16 ids below 12"):
        read_samples(store[0], manifest, "val")


def test_a_manifest_that_is_not_what_its_name_says_is_refused(store: tuple[LocalStore, str]):
    manifest = read_manifest(*store)
    store[0].write(store[1], manifest.model_copy(update={"rows": 21}).model_dump_json().encode())
    with pytest.raises(DataError, match="not the one in its name"):
        _manifest(store)
    with pytest.raises(DataError, match="no manifest at"):
        checked_manifest(store[0], "cc12m/manifests/nothing.json")


def test_an_empty_split_cannot_be_trained_on(
    make_spec: Callable, store: tuple[LocalStore, str], config: PretrainConfig
):
    manifest = _manifest(store)
    empty = read_samples(store[0], manifest.model_copy(update={"splits": {"train": [], "val": []}}), "train")
    with pytest.raises(DataError, match="empty"):
        _loader(empty, manifest, config)
