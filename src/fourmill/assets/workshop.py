"""The one resource of every asset: the project, and what this deployment adds to it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import dagster as dg

from fourmill.runtime.project import Project
from fourmill.runtime.run_process import process_tags
from fourmill.runtime.session import Listener, Session, lines

OWNERS = ["team:fourmill"]
_LOG_EVERY_S = 5.0


@dataclass(frozen=True)
class Workshop:
    """What a deployment hands to its assets."""

    project: Project
    connect_to: Mapping[str, str] = field(default_factory=dict)
    listener: Listener | None = None  # none: progress goes to the run's log

    def session(self, context: dg.AssetExecutionContext) -> Session:
        """The session of one step; its run is marked as being in this process, so that it is known when that is killed."""
        context.instance.add_run_tags(context.run.run_id, process_tags(context.run.run_id))
        listener = self.listener or lines(context.log.info, _LOG_EVERY_S)
        return Session(self.project, context.run.run_id, self.connect_to, listener)

    def for_dataset(self, name: str) -> "Workshop":
        """The workshop of one of the project's data sets: its sessions see that set alone."""
        return replace(self, project=self.project.for_dataset(name))
