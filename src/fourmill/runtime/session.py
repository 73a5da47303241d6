"""What a stage is given at run time beside its inputs: the project, the store, who runs it, who listens."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fourmill.core.store import Store, open_store
from fourmill.core.work import Progress
from fourmill.runtime.project import Project

Listener = Callable[[str, int, int, str], None]
"""Called with (stage, done, total, note) while work goes on."""


def silent(stage: str, done: int, total: int, note: str) -> None:
    """A listener that says nothing."""


def lines(say: Callable[[str], None], every_s: float) -> Listener:
    """A listener that says a line of each stage every so many seconds, and one when it is done."""
    spoken: dict[str, float] = {}

    def listen(stage: str, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        if done >= total or now - spoken.get(stage, -every_s) >= every_s:
            spoken[stage] = now
            say(f"{stage}: {done} of {total} {note}".rstrip())

    return listen


@dataclass(frozen=True)
class Session:
    """One run's view of the world. Nothing in it but `project` may change a result."""

    project: Project
    run_id: str = "by-hand"
    connect_to: Mapping[str, str] = field(default_factory=dict)  # "host:port" -> "ip:port", as curl's --connect-to
    listener: Listener = silent
    measured: dict[str, float] = field(default_factory=dict)  # how the last block's work went, for people

    @property
    def store(self) -> Store:
        """The project's store."""
        return open_store(self.project.store)

    def progress(self, stage: str) -> Progress:
        """A progress callback for one stage."""
        return lambda done, total, note: self.listener(stage, done, total, note)

    def folder(self, name: str) -> Path:
        """A local folder for the spec, the log and the checkpoints of a training program."""
        return self.project.local_folder / self.project.runs_path(name)
