"""A driver for tests that kill it: makes the images of a project's first block and says the digest of its ledger.

python ingest_driver.py PROJECT.json CONNECT_TO.json here|ray
"""

import json
import sys
from pathlib import Path

from fourmill.runtime import stages
from fourmill.runtime.pool import make_worker
from fourmill.runtime.project import Project, read_project
from fourmill.runtime.session import Session


def in_this_process(factory, arguments, jobs, config, progress, together=1):
    """In place of `run_shards`: no Ray, one worker."""
    worker = make_worker(factory, arguments)
    return [worker.run(job) for job in jobs]


def make_block(project: Project, connect_to: dict[str, str]) -> str:
    """Run the stage as its asset does."""
    session = Session(project, connect_to=connect_to)
    stage = stages.images_stage(session)
    made = stages.run_block(session, stage, "block_00")
    return stages.publish_ledger(session, stage, "block_00", made).digest


if __name__ == "__main__":
    if sys.argv[3] == "here":
        stages.run_shards = in_this_process
    print(make_block(read_project(Path(sys.argv[1])), json.loads(Path(sys.argv[2]).read_text())))
