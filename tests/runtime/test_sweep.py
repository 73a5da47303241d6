"""What a stage that failed sweeps away: its own writers' remains, never what other stages may be writing."""

import os
from pathlib import Path

import pytest

from fourmill.core.names import shard_name
from fourmill.core.shards import Recipe
from fourmill.core.store import LocalStore
from fourmill.pipelines.profiles import smallest
from fourmill.runtime import stages
from fourmill.runtime.session import Session
from fourmill.runtime.stages import BlockStage, run_block


def test_a_failed_stage_leaves_what_others_write_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(smallest(tmp_path))
    project, store = session.project, LocalStore(session.project.store)
    shard = project.layout.shards_of("block_00")[0]
    drafts = {
        folder: store.path(f"{project.dataset}/train/{folder}/.{shard_name(shard)}.tar.{os.getpid()}.ab.tmp")
        for folder in ("own", "shared")
    }
    for draft in drafts.values():
        draft.parent.mkdir(parents=True)
        draft.write_bytes(b"half")

    def fail(*arguments: object) -> None:
        raise ValueError("a worker failed")

    monkeypatch.setattr(stages, "run_shards", fail)
    stage = BlockStage(
        asset="tokens/rgb",
        folder="own",
        factory="nobody:Worker",
        arguments={},
        recipe=lambda split, shard: Recipe(stage="own", code_version="1"),
        beside=("shared",),
    )
    with pytest.raises(ValueError, match="a worker failed"):
        run_block(session, stage, "block_00")
    assert {folder: draft.exists() for folder, draft in drafts.items()} == {"own": False, "shared": True}
