"""A worker for tests of the pool: writes one member, and dies or fails where it is told to."""

import os
import signal
import threading
from collections.abc import Sequence

from fourmill.core.names import sample_key
from fourmill.core.shards import Item, Receipt, ShardPlace, write_shard
from fourmill.core.store import open_store
from fourmill.core.work import ShardJob


class EchoWorker:
    shares = {"network": 0.5}  # noqa: RUF012

    def __init__(
        self,
        root: str,
        kill_at: int = -1,
        fail_at: int = -1,
        deadly: bool = False,
        hang: bool = False,
        stop_at: int = -1,
    ) -> None:
        self._root, self._kill_at, self._fail_at, self._stop_at = root, kill_at, fail_at, stop_at
        self._deadly, self._hang = deadly, hang

    def close(self) -> None:
        open_store(self._root).write("closed", b"once")

    def run(self, job: ShardJob) -> Receipt:
        store = open_store(self._root)
        if job.shard == self._stop_at:
            store.write("stopped", str(os.getpid()).encode())
            os.kill(os.getpid(), signal.SIGSTOP)
        while self._stop_at >= 0 and not store.exists("stopped"):
            threading.Event().wait(0.05)
        if job.shard == self._fail_at:
            raise ValueError("this shard cannot be read")
        if self._hang:
            store.write(f"hanging/{os.getpid()}", b"")
            threading.Event().wait()
        if job.shard == self._kill_at and (self._deadly or not store.exists("killed")):
            store.write("killed", b"once")
            os.kill(os.getpid(), signal.SIGKILL)
        place = ShardPlace("cc12m", job.split, "echo", job.shard)
        return write_shard(store, place, job.recipe, [Item(sample_key(job.shard), ext="txt", data=b"x")], job.run_id)


class GroupEchoWorker(EchoWorker):
    """One that takes several shards at a time, and notes how many."""

    def run_together(self, jobs: Sequence[ShardJob]) -> list[Receipt]:
        open_store(self._root).write(f"groups/{jobs[0].shard}", str(len(jobs)).encode())
        return [self.run(job) for job in jobs]


class MarkedEchoWorker(EchoWorker):
    """One that notes the mark of the executable that it runs under: `ECHO_PYTHON` of its environment."""

    def run(self, job: ShardJob) -> Receipt:
        mark = os.environ.get("ECHO_PYTHON", "none")
        open_store(self._root).write(f"marks/{job.shard}.{job.split}", mark.encode())
        return super().run(job)


class SignedEchoWorker(EchoWorker):
    """One that notes in which process it ran."""

    def run(self, job: ShardJob) -> Receipt:
        open_store(self._root).write(f"pids/{os.getpid()}", b"")
        return super().run(job)
