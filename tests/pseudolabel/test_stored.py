"""Weights in the store: added once, found by digest, verified when they are loaded; and what is said when they are not there."""

import io
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from fourmill.core.labels import Picture
from fourmill.core.ledger import ledger_path
from fourmill.core.names import SPLITS, Layout
from fourmill.core.safe_load import UnsafeFileError
from fourmill.core.shards import Recipe, ShardPlace, write_shard
from fourmill.core.store import LocalStore, Store
from fourmill.pipelines.profiles import smallest
from fourmill.pseudolabel.cached import local_folder
from fourmill.pseudolabel.choices import labellers_from, paper_labellers, seeded_labellers
from fourmill.pseudolabel.config import (
    ClipConfig,
    DetectorConfig,
    DptConfig,
    Mask2FormerConfig,
    SceneConfig,
    VitDetConfig,
    weights_digest,
)
from fourmill.pseudolabel.convert import add_weights
from fourmill.pseudolabel.labeller import Labelled
from fourmill.pseudolabel.make import make_features, make_labeller
from fourmill.pseudolabel.named_weights import at_hand, network_name, pinned, require_weights, verify_weights
from fourmill.pseudolabel.stored import (
    StoredRef,
    WeightsMissingError,
    digest_folder,
    read_pointer,
    stored_ref,
)
from fourmill.pseudolabel.worker import label_recipe
from fourmill.runtime.session import Session
from fourmill.runtime.stages import label_stage, publish_ledger

pytestmark = pytest.mark.usefixtures("one_thread")
LABELS = ("depth", "normal", "semseg", "det", "clip")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every seeded network as a Hugging Face folder."""
    made = {}
    for label, config in seeded_labellers(1).items():
        made[label] = tmp_path_factory.mktemp(label)
        labeller: Any = make_features(config) if label == "clip" else make_labeller(label, config)
        labeller._network.save_pretrained(made[label])
    return made


@pytest.fixture(scope="module")
def filled(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with the weights of all labels; do not change it."""
    store = LocalStore(tmp_path_factory.mktemp("filled"))
    for label in LABELS:
        add_weights(store, label, folders[label], f"folder {label}", "MIT")
    return store


@pytest.mark.parametrize("label", LABELS[:4])
def test_stored_weights_label_as_the_folder_they_came_from(
    label: str, filled: Store, folders: dict[str, Path], photo: Callable[..., np.ndarray]
) -> None:
    config = seeded_labellers(1)[label]
    known = read_pointer(filled, label)
    assert known is not None and known.licence == "MIT" and known.origin == f"folder {label}"
    stored = config.model_copy(update={"weights": f"stored:{label}/{known.digest}"})
    picture = Picture(photo(64, 80))
    (a,) = make_labeller(label, stored, filled).label_pictures([picture])
    (b,) = make_labeller(label, config.model_copy(update={"weights": str(folders[label])})).label_pictures([picture])
    a, b = (one.label if isinstance(one, Labelled) else one for one in (a, b))
    assert np.array_equal(np.asarray(a, object), np.asarray(b, object))
    local: Any = at_hand(stored, filled)
    assert weights_digest(stored) == known.digest == digest_folder(Path(local.weights))


def test_a_card_says_where_weights_are_from(filled: Store) -> None:
    known = read_pointer(filled, "semseg")
    assert known is not None
    card = filled.read(f"weights/semseg/{known.digest}/card.md").decode()
    assert all(words in card for words in ("folder semseg", "licence: MIT", known.digest, "Mask2Former Swin-B"))
    assert filled.list(f"weights/semseg/{known.digest}") == [
        f"weights/semseg/{known.digest}/{name}" for name in ("card.md", "config.json", "model.safetensors")
    ]


def test_labellers_from_the_store_are_all_of_them_pinned(filled: Store) -> None:
    made = labellers_from("stored", grid=8, store=filled)
    kinds = {label: type(made[label]) for label in LABELS}
    assert kinds == {
        "depth": DptConfig,
        "normal": DptConfig,
        "semseg": Mask2FormerConfig,
        "det": DetectorConfig,
        "clip": ClipConfig,
    }
    for label in LABELS:
        known = read_pointer(filled, label)
        assert known is not None and getattr(made[label], "weights", "") == f"stored:{label}/{known.digest}"
        require_weights(label, made[label], filled)
    clip = made["clip"]
    assert isinstance(clip, ClipConfig) and (clip.patch_px, clip.channels, clip.input_px) == (8, 64, 64)


def test_missing_weights_are_said_with_the_command_that_mends_it(store: Store) -> None:
    for label, config in paper_labellers().items():
        name = "vitdet" if label == "det" else label
        fetch = r"curl -fLO https://\S+/model_final_f05665\.pkl && " if name == "vitdet" else ""
        command = rf"`{fetch}fourmill weights add {name} \S+ --store "
        with pytest.raises(WeightsMissingError, match=rf"{label} labeller: .*{command}"):
            require_weights(label, config, store)
        assert len(weights_digest(config)) == 64  # definitions load all the same
    gone = DptConfig(weights="stored:depth/" + "0" * 64)
    with pytest.raises(WeightsMissingError, match="nothing at weights/depth/0000"):
        require_weights("depth", gone, store)
    with pytest.raises(WeightsMissingError, match="fourmill weights add depth hf:"):
        labellers_from("stored", store=store)


def test_stored_weights_without_their_config_or_of_another_label_are_missing(
    folders: dict[str, Path], store: Store, filled: Store
) -> None:
    added = add_weights(store, "depth", folders["depth"], "here")
    config = DptConfig(weights=f"stored:depth/{added.digest}")
    require_weights("depth", config, store)
    store.delete(f"weights/depth/{added.digest}/config.json")
    with pytest.raises(WeightsMissingError, match=r"no config\.json at weights/depth/.*fourmill weights add depth hf:"):
        require_weights("depth", config, store)
    stored = {label: f"stored:{label}/{known.digest}" for label in LABELS if (known := read_pointer(filled, label))}
    for label, wrong in (
        ("semseg", Mask2FormerConfig(weights=stored["depth"])),
        ("normal", DptConfig(weights=stored["depth"])),
        ("det", VitDetConfig(weights=stored["det"])),
        ("clip", ClipConfig(weights=stored["semseg"])),
    ):
        name = "vitdet" if label == "det" else label
        with pytest.raises(WeightsMissingError, match=rf"{label} labeller: stored:\w+ is a .*; name stored:{name}$"):
            require_weights(label, wrong, filled)


def test_a_project_from_before_the_weights_is_told_to_pin_them(filled: Store) -> None:
    config = paper_labellers()["depth"]
    with pytest.raises(WeightsMissingError, match="fourmill weights pin --out FOLDER"):
        require_weights("depth", config, filled)
    now = pinned(config, filled)
    require_weights("depth", now, filled)
    assert pinned(now, filled) == now


def test_work_is_not_planned_without_weights(store: Store, layout: Layout, scenes: list[int], filled: Store) -> None:
    with pytest.raises(WeightsMissingError, match="fourmill weights add depth"):
        label_recipe(store, "tiny", "train", 0, "depth", DptConfig(weights="stored:depth"))


def test_damaged_weights_are_not_loaded(folders: dict[str, Path], store: Store) -> None:
    added = add_weights(store, "depth", folders["depth"], "here")
    path = f"weights/depth/{added.digest}/model.safetensors"
    data = bytearray(store.read(path))
    data[-1] ^= 1
    config = DptConfig(weights=f"stored:depth/{added.digest}")
    remote: Any = Remote(store)
    for where in (store, remote):
        verify_weights(config, where)
    store.write(path, bytes(data))
    for where in (store, remote):
        with pytest.raises(WeightsMissingError, match=r"they are damaged.*fourmill weights add depth hf:"):
            verify_weights(config, where)
    with pytest.raises(WeightsMissingError, match="they are damaged"):
        make_labeller("depth", config, store)


class Remote:
    """A store that is no folder: only what the protocol has."""

    root = "s3://somewhere"

    def __init__(self, inner: Store) -> None:
        self.inner, self.opened = inner, 0

    def exists(self, path: str) -> bool:
        return self.inner.exists(path)

    def list(self, folder: str) -> list[str]:
        return self.inner.list(folder)

    def open(self, path: str) -> Any:
        self.opened += 1
        return self.inner.open(path)


def test_weights_of_a_remote_store_are_copied_once(filled: Store, tmp_path: Path) -> None:
    known = read_pointer(filled, "clip")
    assert known is not None
    remote: Any = Remote(filled)
    ref = stored_ref(f"stored:clip/{known.digest}")
    assert ref is not None
    folder = local_folder(ref, remote, tmp_path / "cache")
    opened = remote.opened
    assert opened == 3 and local_folder(ref, remote, tmp_path / "cache") == folder
    assert remote.opened == opened
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [f".{known.digest}.lock", known.digest]


def test_processes_that_want_the_same_weights_copy_them_once(filled: Store, tmp_path: Path) -> None:
    """The second one comes while the first one is copying; locks are of files, so threads stand for processes."""
    known = read_pointer(filled, "clip")
    assert known is not None
    ref, begun, another = StoredRef("clip", known.digest), threading.Event(), threading.Event()

    class Slow(Remote):
        def exists(self, path: str) -> bool:
            if begun.is_set():
                another.set()
            return super().exists(path)

        def open(self, path: str) -> Any:
            begun.set()
            another.wait(60)
            return super().open(path)

    remote: Any = Slow(filled)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(local_folder, ref, remote, tmp_path)
        begun.wait(60)
        second = pool.submit(local_folder, ref, remote, tmp_path)
        assert first.result() == second.result()
    assert remote.opened == 3


def test_what_a_killed_process_has_left_is_removed_and_what_another_copies_is_not(
    filled: Store, tmp_path: Path
) -> None:
    known = read_pointer(filled, "clip")
    assert known is not None
    remote: Any = Remote(filled)
    code = (
        "import sys; from pathlib import Path; from fourmill.core.store import LocalStore; "
        "from fourmill.pseudolabel.cached import local_folder; from fourmill.pseudolabel.stored import StoredRef\n"
        "class Stuck:\n"
        "    root = 's3://somewhere'\n"
        "    exists = lambda self, path: True\n"
        "    list = lambda self, folder: [f'{folder}/config.json']\n"
        "    def open(self, path):\n"
        "        print('copying', flush=True)\n"
        "        sys.stdin.read()\n"
        "local_folder(StoredRef('clip', sys.argv[1]), Stuck(), Path(sys.argv[2]))\n"
    )
    digests = [known.digest, "1" * 64, "2" * 64]
    copying = [
        subprocess.Popen(
            [sys.executable, "-c", code, digest, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for digest in digests
    ]
    for process in copying:
        assert process.stdout is not None and process.stdout.readline() == b"copying\n"
    for process in copying[:2]:
        process.kill()
        process.wait()
    assert len(list(tmp_path.glob(".*.tmp"))) == 3
    assert local_folder(StoredRef("clip", known.digest), remote, tmp_path).name == known.digest
    assert [draft.name.split(".")[1] for draft in tmp_path.glob(".*.tmp")] == digests[2:]
    copying[2].kill()
    for process in copying:
        process.communicate()


@pytest.mark.parametrize("weights", ["stored:lamp", "stored:depth/123", "stored:depth/" + "G" * 64])
def test_a_name_or_digest_that_is_none_is_refused(weights: str) -> None:
    with pytest.raises(ValueError, match=r"write stored:NAME/DIGEST.*depth, normal, semseg, det, vitdet, clip"):
        stored_ref(weights)


def test_what_is_no_network_is_not_added(tmp_path: Path, folders: dict[str, Path], store: Store) -> None:
    with pytest.raises(ValueError, match="no weights are called 'lamp'"):
        add_weights(store, "lamp", tmp_path, "here")
    with pytest.raises(FileNotFoundError, match="give a file, a folder, or hf:ID"):
        add_weights(store, "depth", tmp_path / "gone", "here")
    (tmp_path / "a.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="expected a Hugging Face folder"):
        add_weights(store, "semseg", tmp_path / "a.pth", "here")
    with pytest.raises((ValueError, RuntimeError), match=r"detector|DPT|depth"):
        add_weights(store, "depth", folders["semseg"], "here")
    assert store.list("weights") == []


def test_a_hugging_face_folder_with_a_malicious_pickle_is_refused(
    folders: dict[str, Path], store: Store, tmp_path: Path
) -> None:
    import torch

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "it ran",))

    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "config.json").write_bytes((folders["clip"] / "config.json").read_bytes())
    torch.save({"vision_model.x": Evil()}, tmp_path / "net" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="refused, and nothing in it was run"):
        add_weights(store, "clip", tmp_path / "net", "here")
    assert not (tmp_path / "it ran").exists()


def test_a_folder_that_brings_a_program_of_its_own_is_refused_and_nobody_is_asked(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = {"AutoConfig": "evil.Config", "AutoModelForObjectDetection": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": program}))
    (tmp_path / "evil.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'it ran')!r}).touch()\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))  # whoever sits there agrees to anything
    with pytest.raises(UnsafeFileError, match=r"nothing in it was run: its config\.json names a program of its own"):
        add_weights(store, "det", tmp_path, "here")
    assert not (tmp_path / "it ran").exists()


def test_the_page_says_which_detector_made_a_label(filled: Store, tmp_path: Path) -> None:
    pointer = read_pointer(filled, "det")
    assert pointer is not None
    assert network_name(DetectorConfig(weights=f"stored:det/{pointer.digest}"), filled) == "detector rt_detr_v2"
    assert network_name(DetectorConfig(weights="seeded:0"), filled) == "detector rt_detr_v2"
    assert network_name(DetectorConfig(weights=str(tmp_path)), filled) == "detector of an unknown type"
    (tmp_path / "config.json").write_text("[]")
    assert network_name(DetectorConfig(weights=str(tmp_path)), filled) == "detector of an unknown type"
    assert network_name(DptConfig(weights="seeded:0"), filled) == "dpt"


@pytest.mark.parametrize("where", ["stored", "folder", "seeded", "nowhere", "scene", "other weights"])
def test_which_detector_made_a_label_is_in_the_ledger(
    where: str, filled: Store, folders: dict[str, Path], tmp_path: Path
) -> None:
    pointer = read_pointer(filled, "det")
    assert pointer is not None
    weights = {"folder": str(folders["det"]), "seeded": "seeded:0", "nowhere": str(tmp_path / "gone")}
    named = DetectorConfig(weights=weights.get(where, f"stored:det/{pointer.digest}"))
    config = SceneConfig() if where == "scene" else named
    made_by = "0" * 64 if where == "other weights" else weights_digest(config)
    store = LocalStore(tmp_path / "store")
    if where == "stored":
        add_weights(store, "det", folders["det"], "here")
    for split in SPLITS:
        recipe = Recipe(stage="labels/det", code_version="detector-1", weights=made_by)
        write_shard(store, ShardPlace("tiny", split, "boxes", 0), recipe, [], "run")
    base = smallest(tmp_path)
    layout = Layout(rows_per_shard=1, shards_per_block=1, num_blocks=1)
    changed = {"dataset": "tiny", "store": store.root, "layout": layout, "labellers": {**base.labellers, "det": config}}
    session = Session(base.model_copy(update=changed))
    publish_ledger(session, label_stage(session, "det"), "block_00", 2)
    path = ledger_path("tiny", "train", "boxes", "block_00").replace(".parquet", ".shards.parquet")
    known = "rt_detr_v2" if where in ("stored", "folder", "seeded") else None
    assert pq.read_table(io.BytesIO(store.read(path)))["network"].to_pylist() == [known]
