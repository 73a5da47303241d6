"""Two resolutions: pretraining sees the base alone, a fine-tune starts from it and knows both."""

import io
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fourmill.core.manifest import ModalityEntry, read_manifest, write_manifest
from fourmill.core.modality import Modality, modality_table
from fourmill.core.shards import Item, Recipe, ShardPlace, read_members, write_shard
from fourmill.core.store import LocalStore
from fourmill.core.work import no_progress
from fourmill.train.config import MaskingConfig, MixtureComponent, PretrainConfig, TrainSpec
from fourmill.train.data import Loader, read_samples
from fourmill.train.finetune import start_from
from fourmill.train.load import ModelError, load_fourm
from fourmill.train.loop import start, train_fourm
from fourmill.train.masking import Mixture
from fourmill.train.model import FourM

Make = Callable[..., TrainSpec]
SECOND = "tok_depth@16"


@pytest.fixture
def both(store: tuple[LocalStore, str]) -> tuple[LocalStore, str]:
    """The store with depth tokenized at 16 pixels too, 2 x 2 tokens, and the path of a manifest that says so."""
    manifest = read_manifest(*store)
    splits = {}
    for split, entries in manifest.splits.items():
        splits[split] = [_with_second(store[0], split, entry) for entry in entries]
    entry = ModalityEntry(kind="tokens", folder=SECOND, ext="npy", grid=2, vocab_size=12, tokenizer=None)
    modalities = {**manifest.modalities, SECOND: entry}
    manifest = manifest.model_copy(update={"modalities": modalities, "splits": splits})
    return store[0], write_manifest(store[0], manifest)


def _with_second(store, split, entry):
    keys = [key for key, _ in read_members(store, ShardPlace("cc12m", split, "tok_depth@32", entry.shard))]
    items = [Item(key, ext="npy", data=_npy(np.full((1, 4), int(key) % 12, np.int16))) for key in keys]
    place = ShardPlace("cc12m", split, SECOND, entry.shard)
    receipt = write_shard(store, place, Recipe(stage="second", code_version="1"), items, "test")
    return entry.model_copy(update={"tars": {**entry.tars, SECOND: receipt.tar_sha256}})


def _npy(array: np.ndarray) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()


@pytest.fixture
def superres(config: PretrainConfig) -> PretrainConfig:
    """A fine-tune from depth at 16 pixels to depth at 32."""
    component = MixtureComponent(input_alphas={"tok_depth": 1.0}, target_alphas={"high:tok_depth": 1.0})
    masking = MaskingConfig(components=(component,), num_input_tokens=(4, 12), num_target_tokens=(8, 8))
    return config.model_copy(update={"masking": masking, "resolutions": "both"})


def _report(spec: TrainSpec, path: str) -> dict:
    return json.loads(LocalStore(spec.store).read(path))


def _base(make_spec: Make, manifest: str) -> str:
    spec = make_spec(manifest=manifest)
    return _report(spec, train_fourm(spec, no_progress))["path"]


def test_pretraining_is_the_same_with_and_without_a_second_resolution(make_spec: Make, both, store):
    models = [load_fourm(both[0], _base(make_spec, path)) for path in (store[1], both[1])]
    one, other = (model.state_dict() for model in models)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert SECOND not in models[1].by_name


def test_folders_that_take_no_part_are_not_read(both, config: PretrainConfig):
    manifest = read_manifest(*both)
    for split, entries in manifest.splits.items():
        for entry in entries:
            both[0].delete(ShardPlace("cc12m", split, SECOND, entry.shard).tar)
    samples = read_samples(both[0], manifest, "train", modalities=manifest.at("base"))
    assert SECOND not in samples.tokens and len(samples) == 18
    modalities = sorted(manifest.at("base"), key=lambda m: m.name)
    assert Loader(samples, Mixture(config.masking, modalities), 4, 0, 8).batch(0)


def test_a_superres_fine_tune_knows_both_and_predicts_the_higher(make_spec: Make, both, superres: PretrainConfig):
    base = _base(make_spec, both[1])
    spec = make_spec(run="sr", name="superres", config=superres, manifest=both[1], init_from=base)
    report = _report(spec, train_fourm(spec, no_progress))
    assert set(report["losses"]) == {"tok_depth@32"} and report["name"] == "superres"
    model = load_fourm(both[0], report["path"])
    assert set(model.by_name) == {"tok_depth@32", SECOND}  # those of its mixture
    assert list(model.decoder_embeddings) == ["tok_depth@32"]


@pytest.mark.parametrize("copy_tables", [False, True])
def test_what_is_shared_is_copied_and_what_is_new_starts_at_random_or_from_its_twin(
    make_spec: Make, both, superres: PretrainConfig, copy_tables: bool
):
    base = _base(make_spec, both[1])
    config = superres.model_copy(update={"copy_tables": copy_tables})
    made = start(both[0], read_manifest(*both), config, base).model.state_dict()
    old = load_fourm(both[0], base).state_dict()
    new = {key for key in made if key not in old}
    assert new == {f"encoder_embeddings.{SECOND}.{part}" for part in ("token_emb.weight", "mod_emb", "pos_emb")}
    assert all(torch.equal(made[key], old[key]) for key in made.keys() - new)
    left = {key.split(".")[1] for key in old.keys() - made.keys()}
    assert left == {"caption", "det", "tok_semseg@32", "rgb@32"}  # what takes no part
    twin = old["encoder_embeddings.tok_depth@32.token_emb.weight"]
    assert torch.equal(made[f"encoder_embeddings.{SECOND}.token_emb.weight"], twin) == copy_tables
    assert not torch.equal(
        made[f"encoder_embeddings.{SECOND}.mod_emb"], made["encoder_embeddings.tok_depth@32.mod_emb"]
    )
    again = start(both[0], read_manifest(*both), config, base).model.state_dict()
    assert all(torch.equal(made[key], again[key]) for key in made)


def test_a_second_resolution_above_the_base_gets_its_own_embeddings_and_head(config: PretrainConfig):
    def model(second_px: int | None) -> FourM:
        table = modality_table(32, 8, {"depth": 12}, 4292, second_px, () if second_px is None else ("depth",))
        return FourM(config.model, table.values(), 8)

    source, made = model(None), model(64)
    start_from(made, source, True, "base")
    state, old = made.state_dict(), source.state_dict()
    for side in ("encoder_embeddings", "decoder_embeddings"):
        table = state[f"{side}.tok_depth@64.token_emb.weight"]
        assert torch.equal(table, old[f"{side}.tok_depth@32.token_emb.weight"])
    assert torch.equal(
        state["decoder_embeddings.tok_depth@64.to_logits.weight"],
        old["decoder_embeddings.tok_depth@32.to_logits.weight"],
    )


def test_a_model_of_other_modalities_or_sizes_is_refused_by_name(config: PretrainConfig, table: dict[str, Modality]):
    source = FourM(config.model, table.values(), 8)
    other = modality_table(32, 8, {"depth": 13, "semseg": 12}, 4292)
    with pytest.raises(ModelError, match=r"tok_depth@32.*vocab_size=12.*vocab_size=13.*train it from this manifest"):
        start_from(FourM(config.model, other.values(), 8), source, False, "here")
    warmer = config.model.model_copy(update={"position_temperature": 20.0})
    with pytest.raises(ModelError, match=r"position_temperature is 10\.0, the config says 20\.0"):
        start_from(FourM(warmer, table.values(), 8), source, False, "here")
    with pytest.raises(ModelError, match="patch_px is 8, the manifest says 16"):
        start_from(FourM(config.model, table.values(), 16), source, False, "here")


def test_an_interrupted_superres_ends_with_the_same_weights(make_spec: Make, both, superres, monkeypatch):
    from fourmill.train import loop

    base = _base(make_spec, both[1])
    monkeypatch.setattr(loop, "_REPORT_EVERY_S", 0.0)

    def spec(run: str) -> TrainSpec:
        return make_spec(run=run, name="superres", config=superres, manifest=both[1], init_from=base)

    def stop(done: int, total: int, note: str) -> None:
        if done >= 3:
            raise KeyboardInterrupt

    path = train_fourm(spec("straight"), no_progress)
    expected = _report(spec("straight"), path)["digest"]
    both[0].delete(path)
    with pytest.raises(KeyboardInterrupt):
        train_fourm(spec("broken"), stop)
    assert _report(spec("broken"), train_fourm(spec("broken"), no_progress))["digest"] == expected
