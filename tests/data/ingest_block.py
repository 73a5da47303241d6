"""A driver for tests: the ingest stage on one store after another, in one Ray session, as a deployment would run it.

Reads {"out", "list", "connect_to", "stores", "rows_per_shard"} from argv; prints a line of digests for each store.
"""

import json
import sys
from pathlib import Path

from fourmill.core.digest import digest_bytes
from fourmill.core.names import Layout
from fourmill.ingest.config import IngestConfig
from fourmill.ingest.preview import domain_table, images_preview
from fourmill.ingest.source import build_source_index
from fourmill.pipelines.profiles import smallest
from fourmill.runtime.ray_session import stop_ray
from fourmill.runtime.session import Session
from fourmill.runtime.stages import images_stage, publish_ledger, run_block


def ingest(out: Path, list_file: str, connect_to: dict[str, str], store: str, rows_per_shard: int) -> dict[str, object]:
    """Number the list and make every block; returns digests of all that counts."""
    base = smallest(out)
    project = base.model_copy(
        update={
            "store": store,
            "scratch": str(out),
            "source": base.source.model_copy(update={"list": list_file}),
            "layout": Layout(rows_per_shard=rows_per_shard, shards_per_block=4, num_blocks=2),
            "ingest": IngestConfig(retry_wait_s=0.0, max_retry_wait_s=0.0),
        }
    )
    session = Session(project, "run", connect_to)
    p, s = project, session.store
    index = build_source_index(s, p.dataset, p.source, p.layout)
    stage, blocks = images_stage(session), {}
    for block in p.layout.block_keys():
        report = publish_ledger(session, stage, block, run_block(session, stage, block))
        pictures = digest_bytes(images_preview(s, p.dataset, p.layout, block))
        blocks[block] = [report.digest, report.counts, pictures]
    tars = {path: digest_bytes(s.read(path)) for path in s.list(p.dataset) if path.endswith(".tar")}
    return {
        "index": index.digest,
        "blocks": blocks,
        "tars": tars,
        "paths": s.list(""),
        "domains": domain_table(s, p.dataset),
        "made_again": [run_block(session, stage, block) for block in p.layout.block_keys()],
    }


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    for root in given["stores"]:
        done = ingest(Path(given["out"]), given["list"], given["connect_to"], root, given["rows_per_shard"])
        print(json.dumps(done), flush=True)
    stop_ray()
