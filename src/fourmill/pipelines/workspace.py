"""The folder of one project: `project.json`, the store, Dagster's home, and the demo's pictures to download."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fourmill.ingest.demo_source import DEMO_HOST, serve_folder
from fourmill.runtime.project import Project, ProjectError, read_project, write_project


@dataclass(frozen=True)
class Workspace:
    """Where a project lives on this machine."""

    out: Path

    @property
    def project_file(self) -> Path:
        return self.out / "project.json"

    @property
    def home(self) -> Path:
        """DAGSTER_HOME."""
        return self.out / "dagster"

    @property
    def scenes(self) -> Path:
        """The demo's rendered pictures and list."""
        return self.out / "scenes"

    @property
    def page(self) -> Path:
        """The page that the last run made."""
        return self.out / "report" / "index.html"

    def project(self) -> Project:
        """The project kept here.

        Raises:
            ProjectError: there is none, or it is broken.
        """
        return read_project(self.project_file)

    def keep(self, project: Project) -> None:
        """Keep a project's config here; a folder serves one list.

        Raises:
            ProjectError: the folder belongs to another list or layout.
        """
        if self.project_file.exists():
            before = self.project()
            if (before.source, before.layout, before.dataset) != (project.source, project.layout, project.dataset):
                raise ProjectError(
                    f"{self.out} holds a project for {before.source.where} ({before.layout.num_blocks} blocks of "
                    f"{before.layout.shards_per_block} shards); choose another --out, or delete the folder"
                )
        write_project(project, self.project_file)


@contextmanager
def routes(workspace: Workspace, extra: Mapping[str, str] | None = None) -> Iterator[dict[str, str]]:
    """Where the downloader connects; serves the demo's pictures on loopback while the block runs, if there are any."""
    if not workspace.scenes.is_dir():
        yield dict(extra or {})
        return
    with serve_folder(workspace.scenes) as port:
        yield {f"{DEMO_HOST}:80": f"127.0.0.1:{port}", **(extra or {})}
