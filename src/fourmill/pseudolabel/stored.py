"""Weights in the store: `weights/{name}/{digest}/` with model.safetensors, config.json and card.md, and which of them serve.

`fourmill weights add` puts them there once; labellers load them by digest, with no network. The digest is that of the
files but the card, so a folder copied by hand has the same one. No torch: definitions load this.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from fourmill.core.digest import digest_file, digest_json
from fourmill.core.store import LocalStore, Store

CARD = "card.md"
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
_SCHEME = "stored"
_HEX = frozenset("0123456789abcdef")


Weights = Annotated[
    str,
    Field(
        min_length=1,
        description="stored:NAME/DIGEST of the store, a folder with config.json and model.safetensors (or "
        "pytorch_model.bin), or seeded:N for a tiny random network.",
    ),
]


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
    url: str = ""  # where the file `source` is, when `weights add` does not fetch it by itself


_OMNIDATA = "Omnidata's own, for research (LICENSE of EPFL-VILAB/omnidata)"
ORIGINS: dict[str, Origin] = {
    "depth": Origin(
        "depth",
        "dpt",
        "hf:sashasax/omnidata_depth_dpt_hybrid_384",
        "Omnidata DPT-Hybrid depth v2; also the authors' omnidata_dpt_depth_v2.ckpt (https://zenodo.org/records/10447888)",
        _OMNIDATA,
    ),
    "normal": Origin(
        "normal",
        "dpt",
        "hf:sashasax/omnidata_normal_dpt_hybrid_384",
        "Omnidata DPT-Hybrid normals v2; also the authors' omnidata_dpt_normal_v2.ckpt (https://zenodo.org/records/10447888)",
        _OMNIDATA,
    ),
    "semseg": Origin(
        "semseg",
        "mask2former",
        "hf:facebook/mask2former-swin-base-coco-panoptic",
        "Mask2Former Swin-B, COCO panoptic",
        "MIT (facebookresearch/Mask2Former); the hub's page says other",
    ),
    "det": Origin(
        "det",
        "detector",
        "hf:ustc-community/dfine-xlarge-coco",
        "D-FINE-X, COCO; any AutoModelForObjectDetection with COCO's class names, such as hf:PekingU/rtdetr_v2_r101vd",
        "Apache-2.0 (ustc-community, PekingU)",
    ),
    "vitdet": Origin(
        "det",
        "vitdet",
        "model_final_f05665.pkl",
        "ViTDet ViT-H Cascade Mask R-CNN, COCO, from detectron2's ViTDet page; runs where detectron2 is installed",
        "Apache-2.0 (facebookresearch/detectron2)",
        "https://dl.fbaipublicfiles.com/detectron2/ViTDet/COCO/cascade_mask_rcnn_vitdet_h/f328730692/model_final_f05665.pkl",
    ),
    "clip": Origin("clip", "clip", "hf:openai/clip-vit-base-patch16", "CLIP ViT-B/16", "MIT (openai/CLIP)"),
}
"""Those of 4M's labels, by the names of `fourmill weights add`."""


def origins() -> dict[str, Origin]:
    """Every origin by the name of its weights; an own label's weights have the label's."""
    from fourmill.pseudolabel.members import OWN  # whose labels' configs name weights by what is here

    return {**ORIGINS, **{label: own.weights.origin for label, own in OWN.items() if own.weights is not None}}


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
    if name not in origins() or (digest and (len(digest) != 64 or not _HEX.issuperset(digest))):
        raise ValueError(
            f"weights {weights!r}: write stored:NAME/DIGEST with a digest of 64 hex digits; names are {', '.join(origins())}"
        )
    return StoredRef(name, digest or None)


def seed_of(weights: str) -> int | None:
    """7 for `seeded:7`; None for a folder.

    Raises:
        ValueError: `seeded` without a whole number.
    """
    name, _, seed = weights.partition(":")
    if name != "seeded":
        return None
    if not seed.isdecimal():
        raise ValueError(f"weights {weights!r}: write seeded:N with a whole number, such as seeded:0")
    return int(seed)


def named_digest(weights: str) -> str:
    """Digest of the weights that a config names, stored or in a folder; there is one where they are missing, too."""
    stored = stored_ref(weights)
    if stored is not None:
        return stored.digest or digest_json(["missing", weights])
    return digest_folder(Path(weights))


def pointer_path(name: str) -> str:
    """Where it is kept which weights serve by a name."""
    return f"weights/{name}.json"


def read_pointer(store: Store, name: str) -> Pointer | None:
    """The weights that serve by a name; None when none were added."""
    try:
        return Pointer.model_validate_json(store.read(pointer_path(name)))
    except FileNotFoundError:
        return None


def add_command(name: str, store_root: str | None = None) -> str:
    """The command line that puts the public weights of a name into a store, from nothing."""
    origin, place = origins()[name], f"--store {store_root}" if store_root else "--out FOLDER"
    add = f"fourmill weights add {name} {origin.source} {place}"
    return f"curl -fLO {origin.url} && {add}" if origin.url else add


def name_of(label: str, kind: str) -> str | None:
    """The name of the weights with which a kind of network makes a label; None where none can be added."""
    return next((name for name, origin in origins().items() if (origin.label, origin.kind) == (label, kind)), None)


def require_fitting(label: str, kind: str, ref: StoredRef) -> None:
    """See that stored weights are those of a network that makes a label.

    Raises:
        WeightsMissingError: they are another's; with the name of those that fit.
    """
    origin, fitting = origins()[ref.name], name_of(label, kind)
    if ref.name != fitting:
        hint = f"; name stored:{fitting}" if fitting else ""
        raise WeightsMissingError(
            f"{label} labeller: stored:{ref.name} is a {origin.kind} network for {origin.label}, expected a {kind} network for "
            f"{label}{hint}"
        )


def require_stored(label: str, ref: StoredRef, store: Store | None) -> None:
    """See that stored weights are there.

    Raises:
        WeightsMissingError: they are not; with the command that puts them there.
    """
    root = store.root if store is not None else None
    command = add_command(ref.name, root)
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
    files = (CONFIG_FILE, WEIGHTS_FILE)
    lacking = [name for name in files if store is not None and not store.exists(f"{ref.folder}/{name}")]
    if lacking:
        what = f"no {lacking[0]}" if len(lacking) < len(files) else "nothing"
        raise WeightsMissingError(
            f"{label} labeller: {what} at {ref.folder} in the store {root}. Put the weights there again with `{command}`"
        )


def require_undamaged(ref: StoredRef, store: Store) -> None:
    """Read stored weights whole, and see that they have the digest that they are named by.

    Raises:
        WeightsMissingError: they have another.
    """
    if isinstance(store, LocalStore):
        found = digest_folder(store.path(ref.folder))
    else:
        found = _digest_remote(ref, store)
    if found != ref.digest:
        raise damaged(ref, store, f"{store.root}/{ref.folder}", found)


def damaged(ref: StoredRef, store: Store, folder: str, found: str) -> WeightsMissingError:
    """What to raise of files in `folder` that have the digest `found`, and not the one that they are named by."""
    return WeightsMissingError(
        f"the files in {folder} have the digest {found[:12]}, not {str(ref.digest)[:12]}: they are damaged. Delete the folder "
        f"and add the weights again ({add_command(ref.name, store.root)})"
    )


def digest_folder(folder: Path) -> str:
    """Digest of the names and bytes of every file but the card and hidden ones; the folder need not be there."""
    return _folder_digest(str(folder), _stats(folder))


def _digest_remote(ref: StoredRef, store: Store) -> str:
    """What `digest_folder` would say of a copy."""
    files: dict[str, str] = {}
    for path in store.list(ref.folder):
        name = path.removeprefix(f"{ref.folder}/")
        if _is_counted(name):
            file: Any
            with store.open(path) as file:
                files[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digest_json(["files", files])


def _is_counted(name: str) -> bool:
    return not name.startswith(".") and name != CARD


def _stats(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of every file, so that a digest is computed again only when one of them may have changed."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    names = [(p, p.relative_to(folder).as_posix()) for p in files]
    kept = [(name, p.stat()) for p, name in names if _is_counted(name)]
    return tuple((name, s.st_size, s.st_mtime_ns) for name, s in kept)


@lru_cache(maxsize=64)
def _folder_digest(folder: str, stats: tuple[tuple[str, int, int], ...]) -> str:
    files: dict[str, str] = {}
    for name, _, _ in stats:
        files[name] = digest_file(Path(folder) / name)
    return digest_json(["files", files])
