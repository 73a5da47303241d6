"""What can be known to fail is said before any work starts: one message each, with the next step."""

import fcntl
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from fourmill.core.store import check_writable
from fourmill.ingest.config import SourceConfig
from fourmill.runtime.labeller_weights import missing_weights
from fourmill.runtime.project import Project
from fourmill.runtime.ray_session import check_reachable
from fourmill.runtime.tokenizer_weights import missing_tokenizers

MIN_FREE_DISK_MB = 1500
MIN_FREE_MEMORY_MB = 4000


class NotReadyError(ValueError):
    """Something that a run needs and this machine does not have."""


def check_machine(
    project: Project, min_disk_mb: int = MIN_FREE_DISK_MB, min_memory_mb: int = MIN_FREE_MEMORY_MB
) -> None:
    """Store, list, weights, Ray, disk and memory.

    Raises:
        NotReadyError, StoreError, RayUnreachableError: the first that is missing, and what to do about it.
    """
    for dataset in project.datasets():
        check_source(dataset.source)
    check_writable(project.store)
    check_weights(project)
    check_reachable(project.ray)
    check_disk(project.local_folder, min_disk_mb)
    check_memory(min_memory_mb)


def check_weights(project: Project) -> None:
    """Every labeller has its weights, every imported tokenizer its files.

    Raises:
        NotReadyError: some have not; with the command for each.
    """
    missing = [*missing_weights(project).values(), *missing_tokenizers(project).values()]
    if missing:
        raise NotReadyError("\n".join(missing))


def check_disk(folder: Path, min_mb: int = MIN_FREE_DISK_MB) -> None:
    """A folder, which is made, has room.

    Raises:
        NotReadyError: too little.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free_mb = shutil.disk_usage(folder).free // 1_000_000
    if free_mb < min_mb:
        raise NotReadyError(
            f"{folder} has {free_mb} MB free and a run needs {min_mb}; free some or choose another --out"
        )


def check_memory(min_mb: int = MIN_FREE_MEMORY_MB) -> None:
    """The machine has memory to spare.

    Raises:
        NotReadyError: too little.
    """
    memory_mb = psutil.virtual_memory().available // 1_000_000
    if memory_mb < min_mb:
        raise NotReadyError(
            f"{memory_mb} MB of memory are free and a run needs {min_mb}; close something or use a larger machine"
        )


def check_source(source: SourceConfig) -> None:
    """A list is a readable file, pictures at hand are a folder; a remote list is asked for when it is read.

    Raises:
        NotReadyError: it is not.
    """
    place = source.list or source.root
    if source.kind != "list" and not Path(place).is_dir():
        raise NotReadyError(f"no folder at {place!r}; give the folder of the pictures as source.root")
    if source.kind == "list" and "://" not in place and not Path(place).is_file():
        raise NotReadyError(f"no list at {place!r}; give a file with one `URL<TAB>caption` a line")


def check_port(port: int) -> None:
    """A port can be listened on.

    Raises:
        NotReadyError: something listens there already.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise NotReadyError(
                f"port {port} cannot be used ({error.strerror}): is it a `fourmill ui` that is still running? Else choose another, for "
                f"instance {port + 1}"
            ) from error


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold a project's lock: two drivers in one folder would do the same work twice.

    Raises:
        NotReadyError: somebody holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise NotReadyError(f"{folder} cannot be written ({error.strerror}); choose another --out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise NotReadyError(
                f"another fourmill is at work in {folder}; wait for it or choose another --out"
            ) from error
        yield
