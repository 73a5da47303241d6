"""Several data sets in one project: assets, partitions, jobs and paths of each carry its name."""

import io
import tarfile
from pathlib import Path

import dagster as dg
import numpy as np
import pytest
from PIL import Image

from fourmill.core.ledger import read_ledger
from fourmill.core.names import SPLITS, Layout
from fourmill.core.store import LocalStore
from fourmill.ingest.config import IngestConfig, SourceConfig
from fourmill.ingest.source import read_source_rows
from fourmill.pipelines import runner
from fourmill.pipelines.definitions import build_definitions
from fourmill.pipelines.outside import changed_lists, changed_opt_outs
from fourmill.pipelines.preflight import NotReadyError, check_source
from fourmill.pipelines.profiles import smallest
from fourmill.pipelines.status import read_status
from fourmill.runtime.project import DatasetConfig, Project, ProjectError, read_project, write_project

LAYOUT = Layout(rows_per_shard=3, shards_per_block=1, num_blocks=3)


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).resize((48, 36), Image.Resampling.BICUBIC).save(sink, "JPEG", quality=90)
    return sink.getvalue()


def class_folders(root: Path) -> SourceConfig:
    """Seven rows in two classes: five pictures, one of them once more, and one that is cut."""
    for i in range(6):
        path = root / f"n0{i % 2}" / f"{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))
    (root / "n00" / "cut.JPEG").write_bytes(picture(9)[:-200])
    (root / "n01" / "5.JPEG").write_bytes(picture(0))
    (root / "names.txt").write_text("n00 tench, Tinca tinca\nn01 goldfish\n")
    return SourceConfig(kind="folder", root=str(root), class_names=str(root / "names.txt"), val_fraction=0.3)


def tar_folder(root: Path) -> SourceConfig:
    root.mkdir(parents=True)
    with tarfile.open(root / "00000.tar", "w") as archive:
        for i in range(4):
            for name, data in ((f"{i:09d}.jpg", picture(20 + i)), (f"{i:09d}.txt", b"picture %d" % i)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return SourceConfig(kind="webdataset", root=str(root))


def with_datasets(project: Project, *sources: tuple[str, SourceConfig]) -> Project:
    more = [DatasetConfig(name=name, source=source, layout=LAYOUT, ingest=IngestConfig()) for name, source in sources]
    return Project.model_validate(
        project.model_dump(mode="json") | {"more_datasets": [one.model_dump(mode="json") for one in more]}
    )


def test_each_dataset_has_assets_and_blocks_of_its_own(tmp_path: Path) -> None:
    project = smallest(tmp_path)
    source = SourceConfig(kind="folder", root=str(tmp_path))
    definitions = build_definitions(with_datasets(project, ("imagenet", source)))
    before = {spec.key for spec in build_definitions(project).resolve_all_asset_specs()}
    specs = {spec.key: spec for spec in definitions.resolve_all_asset_specs()}
    index, images = dg.AssetKey(["imagenet", "source_index"]), dg.AssetKey(["imagenet", "images"])
    assert set(specs) - before == {index, images}
    assert [dep.asset_key for dep in specs[images].deps] == [index]
    partitions = specs[images].partitions_def
    assert partitions and partitions.get_partition_keys() == ["block_00", "block_01", "block_02"]
    main = specs[dg.AssetKey([project.dataset, "images"])].partitions_def
    assert main and main.get_partition_keys() == ["block_00", "block_01"]
    for job, key in (("index_imagenet", index), ("ingest_imagenet", images)):
        assert set(definitions.resolve_job_def(job).asset_layer.executable_asset_keys) == {key}
    labels = definitions.resolve_job_def("label_block").asset_layer.executable_asset_keys
    assert images not in labels


def test_a_project_keeps_its_datasets(tmp_path: Path) -> None:
    project = with_datasets(smallest(tmp_path), ("imagenet", SourceConfig(kind="folder", root=str(tmp_path))))
    write_project(project, tmp_path / "project.json")
    assert read_project(tmp_path / "project.json") == project
    view = project.for_dataset("imagenet")
    assert (view.dataset, view.layout, view.source.kind, view.more_datasets) == ("imagenet", LAYOUT, "folder", ())
    assert project.for_dataset(project.dataset) is project
    assert [dataset.name for dataset in project.datasets()] == ["cc12m", "imagenet"]
    with pytest.raises(ProjectError, match=r"no dataset 'laion'; there are cc12m, imagenet"):
        project.for_dataset("laion")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("cc12m",), "two datasets are called 'cc12m'"),
        (("a", "a"), "two datasets are called 'a'"),
        (("tokens",), "cannot be called 'tokens'"),
        (("list",), "cannot be called 'list'"),
        (("weights",), "cannot be called 'weights'"),
        (("Image-Net",), "should match pattern"),
    ],
)
def test_names_that_would_clash_are_refused(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    source = SourceConfig(kind="folder", root=str(tmp_path))
    with pytest.raises(ValueError, match=message):
        with_datasets(smallest(tmp_path), *((name, source) for name in names))


def test_pictures_at_hand_are_looked_for_before_work_starts(tmp_path: Path) -> None:
    check_source(SourceConfig(kind="folder", root=str(tmp_path)))
    check_source(SourceConfig(list="https://a.example/list.tsv"))
    with pytest.raises(NotReadyError, match=r"no folder at .*source\.root"):
        check_source(SourceConfig(kind="webdataset", root=str(tmp_path / "none")))
    with pytest.raises(NotReadyError, match="no list at"):
        check_source(SourceConfig(list=str(tmp_path / "none.tsv")))


@pytest.mark.usefixtures("shards_here")
def test_pictures_at_hand_become_images_beside_the_list(tmp_path: Path) -> None:
    sources = {"imagenet": class_folders(tmp_path / "imagenet"), "have": tar_folder(tmp_path / "have")}
    project = with_datasets(smallest(tmp_path), *sources.items())
    definitions = build_definitions(project)
    found = {}
    for name in sources:
        with dg.DagsterInstance.ephemeral() as instance:
            assert definitions.resolve_job_def(f"index_{name}").execute_in_process(instance=instance).success
            job = definitions.resolve_job_def(f"ingest_{name}")
            for block in LAYOUT.block_keys():
                assert job.execute_in_process(instance=instance, partition_key=block).success
        store = LocalStore(project.store)
        found[name] = sorted(
            (row["key"], row["status"], row["caption"], row["url"])
            for block in LAYOUT.block_keys()
            for split in SPLITS
            for row in read_ledger(store, name, split, "images", block).to_pylist()
        )
    assert [row[1:3] for row in found["imagenet"]] == [
        ("ok", "a photo of a tench"),
        ("ok", "a photo of a tench"),
        ("ok", "a photo of a tench"),
        ("truncated", "a photo of a tench"),
        ("ok", "a photo of a goldfish"),
        ("ok", "a photo of a goldfish"),
        ("duplicate", "a photo of a goldfish"),
    ]
    assert [row[1:3] for row in found["have"]] == [("ok", f"picture {i}") for i in range(4)]
    assert found["have"][1][3] == f"tar:00000.tar#{_offset(tmp_path / 'have' / '00000.tar', '000000001.jpg')}"
    assert not LocalStore(project.store).list("cc12m")


def _offset(path: Path, name: str) -> str:
    with tarfile.open(path) as archive:
        member = archive.getmember(name)
    return f"{member.offset_data}+{member.size}"


@pytest.mark.usefixtures("shards_here")
def test_only_blocks_that_an_opt_out_list_names_are_to_be_made_again(
    tmp_path: Path,
) -> None:
    project = with_datasets(smallest(tmp_path), ("have", tar_folder(tmp_path / "have")))
    store = LocalStore(project.store)
    images = dg.AssetKey(["have", "images"])
    with dg.DagsterInstance.ephemeral() as instance:
        definitions = build_definitions(project)
        assert definitions.resolve_job_def("index_have").execute_in_process(instance=instance).success
        for block in LAYOUT.block_keys()[:2]:
            job = definitions.resolve_job_def("ingest_have")
            assert job.execute_in_process(instance=instance, partition_key=block).success
        assert changed_lists(project, store) == {} == changed_opt_outs(project, store)
        url = read_source_rows(store, "have", 1).to_pylist()[0]["url"]
        (tmp_path / "opt_out.txt").write_text(f"url:{url}\n")
        dataset = project.more_datasets[0]
        ingest = dataset.ingest.model_copy(update={"opt_out": str(tmp_path / "opt_out.txt")})
        project = project.model_copy(update={"more_datasets": (dataset.model_copy(update={"ingest": ingest}),)})
        changed = changed_opt_outs(project, store)
        assert changed == {(images, "block_01"): "the opt-out list has changed"}
        graph = build_definitions(project).resolve_asset_graph()
        nodes = {(n.key, n.partition): n.state for n in read_status(graph, instance, store, changed)}
        assert (nodes[images, "block_00"], nodes[images, "block_01"]) == ("ok", "stale")
    (tmp_path / "have" / "00001.tar").write_bytes((tmp_path / "have" / "00000.tar").read_bytes())
    assert list(changed_lists(project, store)) == [(dg.AssetKey(["have", "source_index"]), None)]


@pytest.mark.usefixtures("shards_here")
def test_blocks_that_hold_copies_are_made_again_and_a_warning_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = with_datasets(smallest(tmp_path), ("imagenet", class_folders(tmp_path / "imagenet")))
    backwards = [
        ("ingest_imagenet", block) for block in reversed(LAYOUT.block_keys())
    ]  # so later blocks know of no earlier
    monkeypatch.setattr(runner, "_steps", lambda project: [("index_imagenet", None), *backwards])
    monkeypatch.setattr(runner, "changed_outside", lambda project, store: {})  # of the main list, which is not there
    announced: list[tuple[str, str | None]] = []
    warnings: list[str] = []
    with dg.DagsterInstance.ephemeral() as instance:
        runner.materialize_all(
            build_definitions(project),
            project,
            instance,
            lambda job, nodes: announced.append((job, nodes[0].partition)),
            warn=warnings.append,
        )
        again = runner.materialize_all(build_definitions(project), project, instance)
    rows = [
        row
        for block in LAYOUT.block_keys()
        for split in SPLITS
        for row in read_ledger(LocalStore(project.store), "imagenet", split, "images", block).to_pylist()
    ]
    (copy,) = [row for row in rows if row["status"] == "duplicate"]
    block = LAYOUT.block_of_row(int(copy["key"]))
    assert copy["duplicate_of"] == "000000000" and block != "block_00"
    assert announced == [("index_imagenet", None), *backwards, ("ingest_imagenet", block)]
    assert [line for line in warnings if "no_copies_in_later_blocks" in line] == [
        f"block_00: imagenet/images, no_copies_in_later_blocks: materialize_again {block}, copies 1"
    ]
    assert again == 0
