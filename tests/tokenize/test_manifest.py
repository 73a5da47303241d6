"""What a manifest never mixes: tokenizers, and tokens or images of two ages."""

from typing import Any

import pytest

from fourmill.core.ledger import ledger_path, write_ledger
from fourmill.core.manifest import Manifest
from fourmill.core.modality import CROPS, modality_table
from fourmill.core.names import SPLITS, SampleKey
from fourmill.core.shards import (
    Item,
    MissingShardError,
    Recipe,
    ShardPlace,
    need,
    parquet_table,
    read_members,
    write_shard,
)
from fourmill.core.store import Store
from fourmill.tokenize.align import align_recipe, token_folder
from fourmill.tokenize.config import TokenizingConfig
from fourmill.tokenize.freshness import StaleLabelsError
from fourmill.tokenize.manifest import ManifestError, build_manifest

PLAIN = TokenizingConfig()


def all_aligned(chain: Any, made_by: tuple[str, str], label: str = "rgb") -> None:
    """Both shards of the first block, and the ledgers that a manifest counts in."""
    for shard in (0, 1):
        chain.aligned(PLAIN, {label: made_by}, shard)
    for folder in ("images", "_aligned"):
        write_ledger(chain.store, chain.tiny.dataset, folder, "block_00", range(2), folder, 0)


def manifest(chain: Any, digest: str, label: str = "rgb") -> Manifest:
    name = f"tok_{label}@64"
    table = {n: m for n, m in modality_table(64, 8, {label: 64}, 4400).items() if n == name}
    return build_manifest(
        chain.store, chain.tiny.dataset, chain.tiny.layout, ["block_00"], table, {name: digest}, "text", 64, 8, "source"
    )


def test_a_manifest_never_mixes_two_tokenizers(chain: Any) -> None:
    old, new = chain.tokenizer("rgb", seed=0), chain.tokenizer("rgb", seed=1)
    assert old[1] != new[1]
    all_aligned(chain, old)
    assert manifest(chain, old[1]).modalities["tok_rgb@64"].tokenizer == old[1]
    chain.aligned(PLAIN, {"rgb": new}, 1)
    for digest, wrong in ((old[1], new[1]), (new[1], old[1])):
        with pytest.raises(ManifestError, match=f"made by tokenizer {wrong[:12]}, the current one is {digest[:12]}"):
            manifest(chain, digest)


def test_the_ledger_of_tokens_names_the_tokenizer_of_every_shard(store: Store, tiny: Any, chain: Any) -> None:
    old, new = chain.tokenizer("rgb", seed=0), chain.tokenizer("rgb", seed=1)
    folder = token_folder("tok_rgb@64")
    versions: list[str] = []
    for made_by in ([old[1], old[1]], [old[1], new[1]], [new[1], new[1]]):
        for shard, digest in enumerate(made_by):
            chain.tokenized(PLAIN, {"rgb": old if digest == old[1] else new}, shard)
        versions.append(write_ledger(store, tiny.dataset, folder, "block_00", range(2), "tokens/rgb", 2).digest)
        for split in SPLITS:
            ledger = ledger_path(tiny.dataset, split, folder, "block_00").replace(".parquet", ".shards.parquet")
            rows = parquet_table(store.read(ledger)).to_pylist()
            assert [(row["shard"], row["weights"]) for row in rows] == [*enumerate(made_by)]
            tars = [need(store, ShardPlace(tiny.dataset, split, folder, shard), "tokens/rgb") for shard in (0, 1)]
            assert [tar.recipe.weights for tar in tars] == made_by
    assert len(set(versions)) == 3  # what is made of them is stale


def test_a_manifest_of_no_block_is_refused(chain: Any) -> None:
    nothing = (chain.store, chain.tiny.dataset, chain.tiny.layout, [], {}, {}, "text", 64, 8, "source")
    with pytest.raises(ManifestError, match="a manifest of no block of tiny, expected at least one of 2"):
        build_manifest(*nothing)


@pytest.mark.parametrize(("folder", "asset"), [("images", "tiny/images"), ("_aligned", "tokens/shards")])
def test_a_withdrawn_ledger_is_told_by_the_asset_that_writes_it(chain: Any, folder: str, asset: str) -> None:
    made_by = chain.tokenizer("rgb")
    all_aligned(chain, made_by)
    chain.store.delete(ledger_path(chain.tiny.dataset, "val", folder, "block_00"))
    with pytest.raises(ManifestError, match=f"{asset} has no val ledger .* Materialize {asset} for block_00 and look"):
        manifest(chain, made_by[1])


def test_a_manifest_never_takes_shards_that_were_aligned_from_older_tokens(chain: Any) -> None:
    old, new = chain.tokenizer("rgb", seed=0), chain.tokenizer("rgb", seed=1)
    all_aligned(chain, old)
    for shard in (0, 1):
        chain.tokenized(PLAIN, {"rgb": new}, shard)
    chain.aligned(PLAIN, {"rgb": new}, 0)
    stale = r"train aligned shard 00001 of tiny is stale: it was made of tokens/rgb .* materialize tokens/shards"
    with pytest.raises(ManifestError, match=stale):
        manifest(chain, new[1])
    chain.aligned(PLAIN, {"rgb": new}, 1)
    assert manifest(chain, new[1]).num_samples("train") > 0


def test_a_manifest_never_takes_shards_that_were_aligned_from_older_images(store: Store, tiny: Any, chain: Any) -> None:
    made_by = chain.tokenizer("semseg")  # whose tokens stay as they are
    all_aligned(chain, made_by, "semseg")
    place = ShardPlace(tiny.dataset, "val", "images", 1)
    size = {"width": 80, "height": 72}
    items = [Item(key, ext="png", data=data, extra=size) for key, data in read_members(store, place)]
    write_shard(store, place, Recipe(stage="images", code_version="2"), items[:-1], "r", tiny.label_schema)
    with pytest.raises(ManifestError, match="val aligned shard 00001 of tiny is stale: it was made of tiny/images"):
        manifest(chain, made_by[1], "semseg")


def test_a_manifest_never_mixes_tokens_made_with_unlike_settings(chain: Any) -> None:
    made_by = chain.tokenizer("rgb")
    all_aligned(chain, made_by)
    chain.aligned(TokenizingConfig(precision="bf16"), {"rgb": made_by}, 1)
    with pytest.raises(ManifestError, match=r"tok_rgb@64 shard 00001 was made with other settings .* than shard 00000"):
        manifest(chain, made_by[1])


def made_again(store: Store, tiny: Any, folder: str, inputs: dict[str, str] | None = None) -> None:
    """Shard 1 of the training split, its first sample left out."""
    place = ShardPlace(tiny.dataset, "train", folder, 1)
    size, ext = {"width": 80, "height": 72}, "jpg" if folder == "images" else "png"
    items = [Item(key, ext=ext, data=data, extra=size) for key, data in read_members(store, place)]
    recipe = Recipe(stage=folder, code_version="2", inputs=inputs or {})
    write_shard(store, place, recipe, items[1:], "r", tiny.label_schema)


def test_a_manifest_never_takes_tokens_of_older_labels_or_labels_of_older_images(
    store: Store, tiny: Any, chain: Any
) -> None:
    made_by = chain.tokenizer("semseg")
    all_aligned(chain, made_by, "semseg")
    images = need(store, ShardPlace(tiny.dataset, "train", "images", 1), "images").content
    made_again(store, tiny, "semseg", {"images": images})
    with pytest.raises(
        ManifestError, match=r"tok_semseg@64 shard 00001 was made of labels/semseg .* materialize tokens/semseg and"
    ):
        manifest(chain, made_by[1], "semseg")
    all_aligned(chain, made_by, "semseg")
    manifest(chain, made_by[1], "semseg")
    made_again(store, tiny, "images")
    with pytest.raises(ManifestError, match=r"labels/semseg, train shard 00001: made of images .* and then tokens/"):
        manifest(chain, made_by[1], "semseg")
    with pytest.raises(StaleLabelsError, match="materialize labels/semseg for its block again"):
        chain.tokenized(PLAIN, {"semseg": chain.tokenizer("semseg", seed=1)}, 1)


def test_what_cannot_be_aligned_names_the_images_of_its_own_data_set(store: Store, tiny: Any) -> None:
    with pytest.raises(MissingShardError, match="materialize tiny/images"):
        align_recipe(store, tiny.dataset, "train", 9, ["tok_rgb@64"], 64)


@pytest.mark.parametrize("folder", ["tok_rgb@64", CROPS])
@pytest.mark.parametrize("more", [-1, 1])
def test_a_manifest_never_takes_a_shard_with_fewer_or_more_samples_than_were_aligned(
    store: Store, tiny: Any, chain: Any, folder: str, more: int
) -> None:
    made_by = chain.tokenizer("rgb")
    all_aligned(chain, made_by)
    place = ShardPlace(tiny.dataset, "train", folder, 1)
    recipe = need(store, place, "tokens/shards").recipe
    items = [Item(key, ext="npy", data=data) for key, data in read_members(store, place)]
    odd = [*items, Item(SampleKey("000000999"), ext="npy", data=items[0].data)] if more > 0 else items[1:]
    write_shard(store, place, recipe, odd, "r")
    said = f"train {folder} shard 00001 holds {len(items) + more} samples, not {len(items)}"
    with pytest.raises(ManifestError, match=said):
        manifest(chain, made_by[1])
