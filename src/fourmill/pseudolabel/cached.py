"""Stored weights as a local folder: the store's own where it is one, else a copy that all processes of a machine share."""

import fcntl
import os
import shutil
import uuid
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from fourmill.core.store import LocalStore, Store
from fourmill.pseudolabel.stored import StoredRef, WeightsMissingError, damaged, digest_folder, origins, require_stored


def local_folder(ref: StoredRef, store: Store | None, cache: Path | None = None) -> Path:
    """Stored weights as a local folder, verified against their digest; copied once to `cache` from a remote store.

    Raises:
        WeightsMissingError: no store, nothing there, or other bytes than the digest's.
    """
    if store is None or ref.digest is None:
        raise WeightsMissingError(f"weights {ref.name} are in a store, by digest; say which store and which digest")
    require_stored(origins()[ref.name].label, ref, store)
    if isinstance(store, LocalStore):
        folder = store.path(ref.folder)
    else:
        folder = (cache or Path.home() / ".cache" / "fourmill" / "weights") / ref.digest
        if not folder.is_dir():
            _fetch(ref, store, folder)
    found = digest_folder(folder)
    if found != ref.digest:
        raise damaged(ref, store, str(folder), found)
    return folder


def _fetch(ref: StoredRef, store: Store, folder: Path) -> None:
    """Copy stored weights to a folder, once a machine however many of its processes want them."""
    with _locked(folder) as is_locked:
        if folder.is_dir():  # another process was faster
            return
        if is_locked:
            _sweep(folder)
        draft = folder.with_name(f".{folder.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
        draft.mkdir(parents=True)
        try:
            for path in store.list(ref.folder):
                with store.open(path) as source, (draft / path.rpartition("/")[2]).open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 22)
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, where files cannot be locked
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def _locked(folder: Path, is_patient: bool = True) -> Generator[bool]:
    """Hold the lock of a folder of the cache, which ends with its process; yields whether it is held.

    It is not where files cannot be locked; nor, for the impatient, where another process holds it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if is_patient else fcntl.LOCK_NB))
        except OSError:
            yield False
        else:
            yield True


def _sweep(locked: Path) -> None:
    """Remove what killed processes have left of folders of the cache: drafts whose lock nobody holds but us."""
    for draft in locked.parent.glob(".*.tmp"):
        folder = locked.with_name(draft.name.split(".")[1])
        with nullcontext(True) if folder == locked else _locked(folder, is_patient=False) as is_dead:
            if is_dead:
                shutil.rmtree(draft, ignore_errors=True)
