"""Stored weights as a local folder: the store's own where it is one, else a copy that all processes of a machine share."""

import shutil
from functools import partial
from pathlib import Path

from fourmill.core.once import copy_once
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
        weights = cache or Path.home() / ".cache" / "fourmill" / "weights"
        folder = copy_once(weights / ref.digest, partial(_fetch, ref, store))
    found = digest_folder(folder)
    if found != ref.digest:
        raise damaged(ref, store, str(folder), found)
    return folder


def _fetch(ref: StoredRef, store: Store, draft: Path) -> None:
    draft.mkdir()
    for path in store.list(ref.folder):
        with store.open(path) as source, (draft / path.rpartition("/")[2]).open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 22)
