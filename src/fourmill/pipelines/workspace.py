"""The folder of one project: `project.json`, the store, Dagster's home, and the demo's pictures to download."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fourmill.core.store import is_local
from fourmill.ingest.demo_source import DEMO_HOST, serve_folder
from fourmill.pipelines.edits import with_edits
from fourmill.runtime.project import Project, ProjectError, read_project, write_project


def project_at(file: Path) -> Project:
    """The project of a file. Where its folder was moved, the store moved with it; a copy of a folder has a copy of the store.

    Raises:
        ProjectError: there is none, or it is broken.
    """
    project, own = read_project(file), file.absolute().parent / "store"
    if not is_local(project.store) or not own.is_dir():
        return project
    named = Path(project.store.removeprefix("file://"))
    is_another = named.is_dir() and not (named.name == own.name and (named.parent / file.name).is_file())
    return project if is_another else project.model_copy(update={"store": str(own)})


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
        """The project kept here, as `project_at` has it. Raises ProjectError."""
        return project_at(self.project_file)

    @property
    def commanded_file(self) -> Path:
        """The project as the last command made it, without what was edited since."""
        return self.out / "commanded.json"

    def keep(self, project: Project) -> Project:
        """Keep the project that a command makes, with what was edited by hand; a folder serves one list.

        Returns:
            What is kept.

        Raises:
            ProjectError: the folder belongs to another list or layout, or edits do not go with the command.
        """
        commanded = project
        if self.project_file.exists():
            before = self.project()
            if self.commanded_file.exists():
                project = with_edits(commanded, before, read_project(self.commanded_file))
            _require_same(self.out, before, project)
        write_project(commanded, self.commanded_file)
        write_project(project, self.project_file)
        return project

    def change(self, project: Project) -> None:
        """Change the project that is kept here, as an edit by hand would.

        Raises:
            ProjectError: it is one of another list or layout.
        """
        _require_same(self.out, self.project(), project)
        write_project(project, self.project_file)


def _require_same(out: Path, before: Project, project: Project) -> None:
    if not _continues(before, project):
        raise ProjectError(
            f"{out} holds a project for {before.source.where} ({before.layout.num_blocks} blocks of "
            f"{before.layout.shards_per_block} shards); choose another --out, or delete the folder"
        )


def _continues(before: Project, project: Project) -> bool:
    """The same rows in the same blocks; a list may have grown by some."""
    grown = before.layout.model_copy(update={"num_blocks": project.layout.num_blocks})
    return (before.source, before.dataset, grown) == (
        project.source,
        project.dataset,
        project.layout,
    ) and project.layout.num_blocks >= before.layout.num_blocks


@contextmanager
def routes(workspace: Workspace, extra: Mapping[str, str] | None = None) -> Iterator[dict[str, str]]:
    """Where the downloader connects; serves the demo's pictures on loopback while the block runs, if there are any."""
    if not workspace.scenes.is_dir():
        yield dict(extra or {})
        return
    with serve_folder(workspace.scenes) as port:
        yield {f"{DEMO_HOST}:80": f"127.0.0.1:{port}", **(extra or {})}
