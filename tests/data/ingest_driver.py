"""A driver for tests that kill it: makes the images of a project's first block and says the digest of its ledger.

python ingest_driver.py PROJECT.json CONNECT_TO.json here|ray [NUMBER]

"here" makes the shards without Ray. Then the changes of the store are counted that come after the last shard, and shown
after the digest as JSON; the driver kills itself with SIGKILL in the midst of change NUMBER, 0-based.
"""

import json
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

from fourmill.core.store import LocalStore
from fourmill.runtime import stages
from fourmill.runtime.actors import make_worker
from fourmill.runtime.project import Project, read_project
from fourmill.runtime.session import Session


def in_this_process(factory, arguments, jobs, config, progress, pace=None, together=1):
    """In place of `run_shards`: no Ray, one worker."""
    worker = make_worker(factory, arguments)
    receipts = [worker.run(job) for job in jobs]
    watch(int(sys.argv[4]) if len(sys.argv) > 4 else None)
    return receipts


def watch(last: int | None) -> None:
    """From now on note each change of the store, and die in the midst of one: a file is written and does not appear yet."""
    create, delete = LocalStore.create, LocalStore.delete

    def note(change: str, path: str) -> None:
        if len(changes) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        changes.append((change, path))

    @contextmanager
    def noted_create(self: LocalStore, path: str):
        with create(self, path) as stream:
            yield stream
            stream.flush()
            note("write", path)

    def noted_delete(self: LocalStore, path: str) -> None:
        note("delete", path)
        delete(self, path)

    LocalStore.create, LocalStore.delete = noted_create, noted_delete


def make_block(project: Project, connect_to: dict[str, str]) -> str:
    """Run the stage as its asset does."""
    session = Session(project, connect_to=connect_to)
    stage = stages.images_stage(session)
    made = stages.run_block(session, stage, "block_00")
    return stages.publish_ledger(session, stage, "block_00", made).digest


changes: list[tuple[str, str]] = []


if __name__ == "__main__":
    if sys.argv[3] == "here":
        stages.run_shards = in_this_process
    print(make_block(read_project(Path(sys.argv[1])), json.loads(Path(sys.argv[2]).read_text())))
    print(json.dumps(changes))
