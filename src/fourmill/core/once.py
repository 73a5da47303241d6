"""What one process of a machine does for all of them: copying a file or a folder into a cache, comparing a file with its digest.

The others wait at a lock that ends with its process, however long that takes.
"""

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

from fourmill.core.draft import tell_when_full
from fourmill.core.store import LocalStore


def copy_once(target: Path, copy: Callable[[Path], None]) -> Path:
    """A file or folder of a cache, made if it is not there: once a machine, however many of its processes want it.

    Args:
        copy: writes the whole of it at the path that it is given, which is renamed to the target when it returns.

    Raises:
        StoreFullError: there is no room for it.
    """
    if target.exists():
        return target
    with tell_when_full(target, 0):
        target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target) as is_locked:
        if target.exists():  # another process was faster
            return target
        if is_locked:
            _sweep(target)
        draft = target.with_name(f".{target.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            copy(draft)
            draft.rename(target)
        except OSError:
            if not target.exists():  # else another process was faster, where files cannot be locked
                raise
        finally:
            _remove(draft)
    return target


@contextmanager
def checked_once(file: Path, digest: str) -> Generator[bool]:
    """Hold the block back while another process compares the file with its digest; yields whether one has found it right.

    Where none has, the block is to compare: unless it raises, a mark beside the file says so to all that come later.
    """
    # A mark, since a set may be hundreds of gigabytes: hashing it takes up to hours, at every start and every resume. It holds
    # for the file as it was before it was hashed; one that was changed or replaced since is hashed again.
    mark = file.with_name(f".{file.name}.checked")
    with _locked(mark):
        seen = [digest, *LocalStore(file.parent).stamp(file.name)]
        is_checked = _read(mark) == seen
        yield is_checked
        if not is_checked:
            with suppress(OSError):  # a folder that cannot be written has no marks, and its files are hashed every time
                LocalStore(mark.parent).write(mark.name, json.dumps(seen).encode())


def _read(mark: Path) -> object:
    try:
        return json.loads(mark.read_bytes())
    except (OSError, ValueError):  # none, or none of ours
        return None


@contextmanager
def _locked(target: Path, is_patient: bool = True) -> Generator[bool]:
    """Hold the lock of a file or folder, which ends with its process; yields whether it is held.

    It is not where files cannot be locked; nor, for the impatient, where another process holds it.
    """
    with ExitStack() as opened:
        try:
            file = opened.enter_context(target.with_name(f".{target.name.lstrip('.')}.lock").open("w"))
            fcntl.flock(file, fcntl.LOCK_EX | (0 if is_patient else fcntl.LOCK_NB))
            is_held = True
        except OSError:
            is_held = False
        yield is_held


def _sweep(locked: Path) -> None:
    """Remove what killed processes have left of a cache: drafts whose lock nobody holds but us."""
    for draft in locked.parent.glob(".*.*.*.tmp"):
        target = locked.with_name(draft.name[1:].rsplit(".", 3)[0])
        with nullcontext(True) if target == locked else _locked(target, is_patient=False) as is_dead:
            if is_dead:
                _remove(draft)


def _remove(draft: Path) -> None:
    with suppress(OSError):  # another one was first, or it is gone to its target
        shutil.rmtree(draft) if draft.is_dir() else draft.unlink()
