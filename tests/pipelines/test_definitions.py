"""The graph that Dagster sees: complete, documented, quick to load, and the one that is written down."""

import json
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from fourmill.pipelines.definitions import build_definitions
from fourmill.pipelines.profiles import PROFILES, demo, profile

GRAPH = Path(__file__).parents[1] / "data" / "graph.json"
MAX_CPU_SECONDS = 10  # of CPU time, which a busy machine does not stretch


def specs() -> list[dg.AssetSpec]:
    return list(build_definitions(demo(Path("out/demo"))).resolve_all_asset_specs())


def test_definitions_load_without_the_heavy_libraries() -> None:
    code = (
        "import json, resource, sys; from fourmill.pipelines.definitions import defs; defs(); "
        "used = resource.getrusage(resource.RUSAGE_SELF); "
        "print(json.dumps([used.ru_utime + used.ru_stime, [m for m in ('torch', 'ray', 'transformers', 'timm') if m in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=180)
    cpu_seconds, heavy = json.loads(done.stdout)
    assert heavy == []
    assert cpu_seconds < MAX_CPU_SECONDS


def test_every_asset_is_documented() -> None:
    for spec in specs():
        name = spec.key.to_user_string()
        assert spec.description, name
        assert spec.group_name in {"ingest", "labels", "tokenizers", "tokens", "fourm"}, name
        assert spec.owners, name
        assert len(spec.kinds) >= 2, name
        assert spec.code_version, name


def test_the_graph_is_the_one_written_down() -> None:
    """tests/data/graph.json changes only on purpose: `python tests/data/write_graph.py` writes it again."""
    found = {s.key.to_user_string(): sorted(d.asset_key.to_user_string() for d in s.deps) for s in specs()}
    assert found == json.loads(GRAPH.read_text())


def test_blocks_are_partitions_and_one_run_makes_one() -> None:
    definitions = build_definitions(demo(Path("out/demo")))
    for spec in specs():
        asset = definitions.resolve_assets_def(spec.key)
        if spec.partitions_def is not None:
            assert asset.backfill_policy == dg.BackfillPolicy.multi_run(1), spec.key
            assert spec.partitions_def.get_partition_keys() == ["block_00", "block_01"]


def test_every_block_asset_has_a_blocking_check() -> None:
    definitions = build_definitions(demo(Path("out/demo")))
    for spec in specs():
        if spec.partitions_def is not None:
            checks = list(definitions.resolve_assets_def(spec.key).check_specs)
            assert any(check.blocking for check in checks), spec.key


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_loads(name: str, tmp_path: Path) -> None:
    project = profile(name, tmp_path)
    assert type(project).model_validate_json(project.model_dump_json()) == project


def test_changing_one_labeller_changes_the_code_version_of_its_label_alone(tmp_path: Path) -> None:
    before = demo(tmp_path)
    other = profile("demo", tmp_path).model_copy(
        update={"labellers": {**before.labellers, "depth": before.labellers["clip"].model_copy()}}
    )
    versions = [
        {s.key.to_user_string(): s.code_version for s in build_definitions(p).resolve_all_asset_specs()}
        for p in (before, other)
    ]
    assert {name for name in versions[0] if versions[0][name] != versions[1][name]} == {"labels/depth"}


def test_a_project_of_one_resolution_has_no_superres(tmp_path: Path) -> None:
    update = {"second_px": None, "second_labels": (), "superres": None}
    definitions = build_definitions(demo(tmp_path).model_copy(update=update))
    found = {
        s.key.to_user_string(): [d.asset_key.to_user_string() for d in s.deps]
        for s in definitions.resolve_all_asset_specs()
    }
    assert set(json.loads(GRAPH.read_text())) - set(found) == {"fourm/superres", "tokens/rgb_32"}
    assert "fourm/superres" not in found["fourm/samples"] and "tokens/rgb_32" not in found["tokens/shards"]


def test_a_profile_that_does_not_exist_is_said_with_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no profile 'demoo'; there are demo, smallest, cc12m_4m7"):
        profile("demoo", tmp_path)
