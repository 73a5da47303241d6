"""Writes tests/data/graph.json from the definitions: run it when the graph changes on purpose, and review the diff."""

import json
from pathlib import Path

from fourmill.pipelines.definitions import build_definitions
from fourmill.pipelines.profiles import demo

if __name__ == "__main__":
    specs = build_definitions(demo(Path("out/demo"))).resolve_all_asset_specs()
    graph = {s.key.to_user_string(): sorted(d.asset_key.to_user_string() for d in s.deps) for s in specs}
    text = json.dumps(dict(sorted(graph.items())), indent=1) + "\n"
    Path(__file__).with_name("graph.json").write_text(text)
