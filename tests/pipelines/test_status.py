"""Staleness by block: what changed upstream makes exactly its own chain stale."""

from pathlib import Path

import dagster as dg

from fourmill.core.store import LocalStore
from fourmill.pipelines.status import read_status

BLOCKS = dg.StaticPartitionsDefinition(["block_00", "block_01"])


def definitions(versions: dict[str, str], depth_code: str = "1") -> dg.Definitions:
    """images -> depth, normal -> manifest, whose data versions are what the test says."""

    def block_asset(name: str, deps: list[str], code: str = "1") -> dg.AssetsDefinition:
        @dg.asset(name=name, deps=deps, partitions_def=BLOCKS, code_version=code)
        def made() -> dg.MaterializeResult:
            return dg.MaterializeResult(data_version=dg.DataVersion(versions[name]))

        return made

    @dg.asset(deps=["depth", "normal"], code_version="1")
    def manifest() -> dg.MaterializeResult:
        return dg.MaterializeResult(data_version=dg.DataVersion(versions["manifest"]))

    images = block_asset("images", [])
    return dg.Definitions(
        assets=[images, block_asset("depth", ["images"], depth_code), block_asset("normal", ["images"]), manifest]
    )


def states(defs: dg.Definitions, instance: dg.DagsterInstance, store: LocalStore) -> dict[str, str]:
    nodes = read_status(defs.resolve_asset_graph(), instance, store)
    return {" ".join(filter(None, [n.name, n.partition])): n.state for n in nodes}


def make(defs: dg.Definitions, instance: dg.DagsterInstance, names: list[str], partition: str | None) -> None:
    assets = [defs.resolve_assets_def(dg.AssetKey(name)) for name in ["images", "depth", "normal", "manifest"]]
    selection = dg.AssetSelection.assets(*[dg.AssetKey(name) for name in names])
    assert dg.materialize(assets, partition_key=partition, selection=selection, instance=instance).success


VERSIONS = {"images": "i", "depth": "d", "normal": "n", "manifest": "m"}


def test_from_missing_to_ok(tmp_path: Path) -> None:
    defs, store = definitions(VERSIONS), LocalStore(tmp_path)
    with dg.DagsterInstance.ephemeral() as instance:
        assert set(states(defs, instance, store).values()) == {"missing"}
        for block in BLOCKS.get_partition_keys():
            make(defs, instance, ["images", "depth", "normal"], block)
        make(defs, instance, ["manifest"], None)
        assert set(states(defs, instance, store).values()) == {"ok"}


def test_a_changed_block_makes_its_own_chain_stale(tmp_path: Path) -> None:
    defs, store = definitions(VERSIONS), LocalStore(tmp_path)
    with dg.DagsterInstance.ephemeral() as instance:
        for block in BLOCKS.get_partition_keys():
            make(defs, instance, ["images", "depth", "normal"], block)
        make(defs, instance, ["manifest"], None)
        make(definitions({**VERSIONS, "images": "other"}), instance, ["images"], "block_01")
        found = states(defs, instance, store)
    assert {name for name, state in found.items() if state != "ok"} == {"depth block_01", "normal block_01", "manifest"}
    assert found["depth block_01"] == "stale"
    assert found["manifest"] == "waiting"


def test_a_remade_block_of_equal_content_leaves_its_children_ok(tmp_path: Path) -> None:
    defs, store = definitions(VERSIONS), LocalStore(tmp_path)
    with dg.DagsterInstance.ephemeral() as instance:
        make(defs, instance, ["images", "depth", "normal"], "block_00")
        make(defs, instance, ["images"], "block_00")
        found = states(defs, instance, store)
    assert found["depth block_00"] == found["normal block_00"] == "ok"


def test_new_code_of_one_asset_makes_it_and_what_follows_stale(tmp_path: Path) -> None:
    defs, store = definitions(VERSIONS), LocalStore(tmp_path)
    with dg.DagsterInstance.ephemeral() as instance:
        for block in BLOCKS.get_partition_keys():
            make(defs, instance, ["images", "depth", "normal"], block)
        make(defs, instance, ["manifest"], None)
        found = states(definitions(VERSIONS, depth_code="2"), instance, store)
    assert found["depth block_00"] == found["depth block_01"] == "stale"
    assert found["normal block_00"] == "ok"
    assert found["manifest"] == "waiting"


def test_a_failed_check_is_failed_and_not_ok(tmp_path: Path) -> None:
    defs, store = definitions({**VERSIONS, "depth": "failed-run"}), LocalStore(tmp_path)
    with dg.DagsterInstance.ephemeral() as instance:
        make(defs, instance, ["images", "depth", "normal"], "block_00")
        assert states(defs, instance, store)["depth block_00"] == "failed"


def train_set_of(
    versions: dict[str, str], *named: str, deps: tuple[str, ...] = ("depth",)
) -> list[dg.AssetsDefinition]:
    """The blocks of `definitions`, and an asset that gathers those named alone."""
    mapping = dg.SpecificPartitionsPartitionMapping(list(named))

    @dg.asset(deps=[dg.AssetDep(dep, partition_mapping=mapping) for dep in deps], code_version="1")
    def train_set() -> dg.MaterializeResult:
        return dg.MaterializeResult(data_version=dg.DataVersion("t"))

    blocks = [definitions(versions).resolve_assets_def(dg.AssetKey(name)) for name in ("images", "depth", "normal")]
    return [*blocks, train_set]


def test_a_remade_block_of_equal_content_leaves_what_gathers_blocks_ok(tmp_path: Path) -> None:
    defs, store = definitions(VERSIONS), LocalStore(tmp_path)
    with dg.DagsterInstance.ephemeral() as instance:
        for block in BLOCKS.get_partition_keys():
            make(defs, instance, ["images", "depth", "normal"], block)
        make(defs, instance, ["manifest"], None)
        make(defs, instance, ["depth"], "block_00")
        assert states(defs, instance, store)["manifest"] == "ok"
        make(definitions({**VERSIONS, "depth": "other"}), instance, ["depth"], "block_00")
        assert states(defs, instance, store)["manifest"] == "stale"
        make(defs, instance, ["depth"], "block_00")
        assert states(defs, instance, store)["manifest"] == "ok"


def test_a_block_that_was_not_there_makes_what_gathers_blocks_stale(tmp_path: Path) -> None:
    defs, store = definitions(VERSIONS), LocalStore(tmp_path)
    with dg.DagsterInstance.ephemeral() as instance:
        make(defs, instance, ["images", "depth", "normal"], "block_00")
        make(defs, instance, ["manifest"], None)
        make(defs, instance, ["images", "depth", "normal"], "block_01")
        (manifest,) = (n for n in read_status(defs.resolve_asset_graph(), instance, store) if n.name == "manifest")
    assert (manifest.state, manifest.reason) == ("stale", "depth block_01 has changed")


def test_a_block_that_is_not_gathered_makes_nothing_stale(tmp_path: Path) -> None:
    assets, store = train_set_of(VERSIONS, "block_00"), LocalStore(tmp_path)
    defs = dg.Definitions(assets=assets)
    with dg.DagsterInstance.ephemeral() as instance:
        make(definitions(VERSIONS), instance, ["images", "depth", "normal"], "block_00")
        assert dg.materialize(assets, selection=["train_set"], instance=instance).success
        make(definitions(VERSIONS), instance, ["images", "depth", "normal"], "block_01")
        assert states(defs, instance, store)["train_set"] == "ok"
        make(definitions({**VERSIONS, "depth": "other"}), instance, ["depth"], "block_01")
        assert states(defs, instance, store)["train_set"] == "ok"
        make(definitions({**VERSIONS, "depth": "other"}), instance, ["depth"], "block_00")
        assert states(defs, instance, store)["train_set"] == "stale"


def test_a_new_input_makes_stale(tmp_path: Path) -> None:
    assets, store = train_set_of(VERSIONS, "block_00"), LocalStore(tmp_path)
    more = dg.Definitions(assets=train_set_of(VERSIONS, "block_00", deps=("depth", "normal")))
    with dg.DagsterInstance.ephemeral() as instance:
        make(definitions(VERSIONS), instance, ["images", "depth", "normal"], "block_00")
        assert dg.materialize(assets, selection=["train_set"], instance=instance).success
        (train_set,) = (n for n in read_status(more.resolve_asset_graph(), instance, store) if n.name == "train_set")
    assert (train_set.state, train_set.reason) == ("stale", "normal block_00 is a new input")


def test_what_is_behind_something_says_so_whatever_its_own_state(tmp_path: Path) -> None:
    defs, store = definitions(VERSIONS), LocalStore(tmp_path)
    with dg.DagsterInstance.ephemeral() as instance:
        make(defs, instance, ["images"], "block_00")
        nodes = {(n.name, n.partition): n for n in read_status(defs.resolve_asset_graph(), instance, store)}
    assert nodes["depth", "block_00"].state == "missing" and nodes["depth", "block_00"].behind == ()
    assert nodes["depth", "block_01"].behind == ((dg.AssetKey("images"), "block_01"),)
