"""Weights in the store: `weights/{name}/{digest}/` with model.safetensors, config.json and card.md, and which of them serve.

`fourmill weights add` puts them there once; labellers load them by digest, with no network. The digest is that of the
files but the card, so a folder copied by hand has the same one. No torch: definitions load this.
"""

import os
import shutil
import uuid
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from fourmill.core.digest import digest_file, digest_json
from fourmill.core.store import LocalStore, Store

CARD = "card.md"
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
_SCHEME = "stored"
_HEX = frozenset("0123456789abcdef")


class WeightsMissingError(ValueError):
    """No network where the config says; names the place, the choices, and the command that mends it."""


@dataclass(frozen=True)
class Origin:
    """Where the public weights of a name come from."""

    label: str
    kind: str  # of network
    source: str  # what `weights add` is given
    about: str
    licence: str  # of the public weights, as their authors state it


_OMNIDATA = "Omnidata's own, for research (LICENSE of EPFL-VILAB/omnidata)"
ORIGINS: dict[str, Origin] = {
    "depth": Origin(
        "depth",
        "dpt",
        "hf:sashasax/omnidata_depth_dpt_hybrid_384",
        "Omnidata DPT-Hybrid depth v2; also the authors' omnidata_dpt_depth_v2.ckpt (Zenodo record 10447888)",
        _OMNIDATA,
    ),
    "normal": Origin(
        "normal",
        "dpt",
        "hf:sashasax/omnidata_normal_dpt_hybrid_384",
        "Omnidata DPT-Hybrid normals v2; also the authors' omnidata_dpt_normal_v2.ckpt (Zenodo record 10447888)",
        _OMNIDATA,
    ),
    "semseg": Origin(
        "semseg",
        "mask2former",
        "hf:facebook/mask2former-swin-base-coco-panoptic",
        "Mask2Former Swin-B, COCO panoptic",
        "see the model's page",
    ),
    "det": Origin(
        "det",
        "detector",
        "hf:ustc-community/dfine-xlarge-coco",
        "D-FINE-X, COCO; any AutoModelForObjectDetection with COCO's class names, such as hf:PekingU/rtdetr_v2_r101vd",
        "see the model's page",
    ),
    "vitdet": Origin(
        "det",
        "vitdet",
        "model_final_f05665.pkl",
        "ViTDet ViT-H Cascade Mask R-CNN, COCO, from detectron2's ViTDet page; runs where detectron2 is installed",
        "see detectron2's MODEL_ZOO",
    ),
    "clip": Origin("clip", "clip", "hf:openai/clip-vit-base-patch16", "CLIP ViT-B/16", "MIT (openai/CLIP)"),
}
"""Names of `fourmill weights add`."""


@dataclass(frozen=True)
class StoredRef:
    """`stored:depth/DIGEST`, or `stored:depth` of a project that was made before the weights were there."""

    name: str
    digest: str | None

    @property
    def folder(self) -> str:
        """Store path of the weights."""
        return f"weights/{self.name}/{self.digest}"


class Pointer(BaseModel):
    """Which weights serve by a name, and where they are from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    digest: str
    kind: str
    origin: str
    licence: str


def stored_ref(weights: str) -> StoredRef | None:
    """The stored weights that a config names; None when it names a folder or a seed.

    Raises:
        ValueError: no such name, or a digest that is none.
    """
    scheme, _, place = weights.partition(":")
    if scheme != _SCHEME:
        return None
    name, _, digest = place.partition("/")
    if name not in ORIGINS or (digest and (len(digest) != 64 or not _HEX.issuperset(digest))):
        raise ValueError(
            f"weights {weights!r}: write stored:NAME/DIGEST with a digest of 64 hex digits; names are {', '.join(ORIGINS)}"
        )
    return StoredRef(name, digest or None)


def pointer_path(name: str) -> str:
    """Where it is kept which weights serve by a name."""
    return f"weights/{name}.json"


def read_pointer(store: Store, name: str) -> Pointer | None:
    """The weights that serve by a name; None when none were added."""
    try:
        return Pointer.model_validate_json(store.read(pointer_path(name)))
    except FileNotFoundError:
        return None


def add_command(label: str, kind: str, store_root: str | None = None) -> str:
    """The command that puts the public weights of a network into a store."""
    name = "vitdet" if kind == "vitdet" else label
    place = f"--store {store_root}" if store_root else "--out FOLDER"
    return f"fourmill weights add {name} {ORIGINS[name].source} {place}"


def require_stored(label: str, ref: StoredRef, store: Store | None) -> None:
    """See that stored weights are there.

    Raises:
        WeightsMissingError: they are not; with the command that puts them there.
    """
    root = store.root if store is not None else None
    command = add_command(label, ORIGINS[ref.name].kind, root)
    if ref.digest is None:
        pointer = read_pointer(store, ref.name) if store is not None else None
        if pointer is not None:
            raise WeightsMissingError(
                f"{label} labeller: the project names no digest, though the store has {ref.name} weights "
                f"{pointer.digest[:12]}. Take those with `fourmill weights pin --out FOLDER`"
            )
        raise WeightsMissingError(
            f"{label} labeller: there are no {ref.name} weights in the store {root or ''}. Put them there with `{command}`"
        )
    if store is not None and not store.exists(f"{ref.folder}/{WEIGHTS_FILE}"):
        raise WeightsMissingError(
            f"{label} labeller: nothing at {ref.folder} in the store {root}. Put the weights there again with `{command}`"
        )


def local_folder(ref: StoredRef, store: Store | None, cache: Path | None = None) -> Path:
    """Stored weights as a local folder, verified against their digest; copied once to `cache` from a remote store.

    Raises:
        WeightsMissingError: no store, nothing there, or other bytes than the digest's.
    """
    if store is None or ref.digest is None:
        raise WeightsMissingError(f"weights {ref.name} are in a store, by digest; say which store and which digest")
    require_stored(ORIGINS[ref.name].label, ref, store)
    if isinstance(store, LocalStore):
        folder = store.path(ref.folder)
    else:
        folder = (cache or Path.home() / ".cache" / "fourmill" / "weights") / ref.digest
        if not folder.is_dir():
            _fetch(ref, store, folder)
    found = digest_folder(folder)
    if found != ref.digest:
        raise WeightsMissingError(
            f"the files in {folder} have the digest {found[:12]}, not {ref.digest[:12]}: they are damaged. Delete the folder "
            f"and add the weights again ({add_command(ORIGINS[ref.name].label, ORIGINS[ref.name].kind, store.root)})"
        )
    return folder


def digest_folder(folder: Path) -> str:
    """Digest of the names and bytes of every file but the card and hidden ones; the folder need not be there."""
    return _folder_digest(str(folder), _stats(folder))


def _fetch(ref: StoredRef, store: Store, folder: Path) -> None:
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    draft.mkdir(parents=True)
    try:
        for path in store.list(ref.folder):
            with store.open(path) as source, (draft / path.rpartition("/")[2]).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 22)
        draft.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _stats(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of every file, so that a digest is computed again only when one of them may have changed."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    names = [(p, p.relative_to(folder).as_posix()) for p in files]
    kept = [(name, p.stat()) for p, name in names if not name.startswith(".") and name != CARD]
    return tuple((name, s.st_size, s.st_mtime_ns) for name, s in kept)


@lru_cache(maxsize=64)
def _folder_digest(folder: str, stats: tuple[tuple[str, int, int], ...]) -> str:
    files: dict[str, str] = {}
    for name, _, _ in stats:
        files[name] = digest_file(Path(folder) / name)
    return digest_json(["files", files])
