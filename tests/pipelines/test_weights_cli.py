"""`fourmill weights`, in this process: what they change, what they say, how they end."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fourmill.core.store import open_store
from fourmill.pipelines import preflight
from fourmill.pipelines.cli import app
from fourmill.pipelines.edits import with_settings
from fourmill.pipelines.profiles import cc12m_4m7, demo
from fourmill.pipelines.workspace import Workspace
from fourmill.pseudolabel.config import weights_digest
from fourmill.pseudolabel.stored import ORIGINS, WeightsMissingError, read_pointer
from fourmill.runtime.labeller_weights import missing_weights
from fourmill.runtime.project import Project
from fourmill.tokenize.released import RELEASED

RUNNER = CliRunner()


@pytest.fixture(scope="session")
def depth_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny seeded DPT as a Hugging Face folder; do not change it."""
    from fourmill.pseudolabel.choices import seeded_labellers
    from fourmill.pseudolabel.make import make_labeller

    folder = tmp_path_factory.mktemp("depth")
    labeller: Any = make_labeller("depth", seeded_labellers(1)["depth"])
    labeller._network.save_pretrained(folder)
    return folder


@pytest.fixture
def paper(tmp_path: Path) -> Workspace:
    """A project of the paper's networks, made before their weights were there."""
    workspace = Workspace(tmp_path / "out")
    workspace.keep(cc12m_4m7(workspace.out))
    return workspace


def run(*arguments: str) -> str:
    done = RUNNER.invoke(app, [*arguments], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_adding_weights_to_a_project_changes_the_labels_that_they_make_and_no_others(
    paper: Workspace, depth_folder: Path
) -> None:
    before = paper.project()
    said = run("weights", "add", "depth", str(depth_folder), "--out", str(paper.out), "--licence", "ours")
    after = paper.project()
    known = read_pointer(open_store(after.store), "depth")
    assert known is not None and known.licence == "ours" and known.digest in said
    assert weights_digest(after.labellers["depth"]) == known.digest
    changed = [
        label
        for label in after.labellers
        if weights_digest(after.labellers[label]) != weights_digest(before.labellers[label])
    ]
    assert changed == ["depth"] and "depth now made with them" in said


def test_weights_that_no_label_is_made_with_come_with_what_to_write_for_that(
    tmp_path: Path, depth_folder: Path
) -> None:
    workspace = Workspace(tmp_path / "out")
    workspace.keep(demo(workspace.out))
    said = run("weights", "add", "depth", str(depth_folder), "--out", str(workspace.out)).replace("\n", "")
    labellers = json.loads(said[said.index("{") : said.rindex("}") + 1])
    project = workspace.project().model_dump(mode="json")
    workspace.keep(Project.model_validate({**project, "labellers": project["labellers"] | labellers}))
    again = run("weights", "add", "depth", str(depth_folder), "--out", str(workspace.out))
    assert "depth now made with them" in again


def test_the_list_says_what_serves_and_where_it_is_from(tmp_path: Path, depth_folder: Path) -> None:
    store = str(tmp_path / "store")
    run("weights", "add", "depth", str(depth_folder), "--store", store)
    rows = {row["name"]: row for row in json.loads(run("weights", "list", "--store", store, "--json"))}
    assert rows.keys() == ORIGINS.keys() | RELEASED.keys() and rows["tokenizer_rgb"]["imported"] == []
    assert rows["depth"]["stored"] == [rows["depth"]["serves"]["digest"]]
    assert rows["depth"]["serves"]["licence"].startswith("not stated; the public weights': Omnidata's own")
    assert rows["clip"]["stored"] == []
    assert "none yet" in run("weights", "list", "--store", store)


def test_a_project_can_pin_weights_that_were_added_after_it(paper: Workspace, depth_folder: Path) -> None:
    run("weights", "add", "depth", str(depth_folder), "--store", paper.project().store)
    assert "depth pinned" in run("weights", "pin", "--out", str(paper.out))
    assert "nothing pinned" in run("weights", "pin", "--out", str(paper.out))


def test_a_run_takes_weights_that_were_added_by_the_command_it_had_asked_for(
    paper: Workspace, depth_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (paper.out / "cc12m.tsv").write_text("http://a.example/1.jpg\ta dog\n")
    with pytest.raises(preflight.NotReadyError, match="depth labeller: there are no depth weights"):
        run("run", "--out", str(paper.out))
    run("weights", "add", "depth", str(depth_folder), "--store", paper.project().store)
    with pytest.raises(preflight.NotReadyError, match=r"^normal labeller: there are no normal weights"):
        run("run", "--out", str(paper.out))


def test_the_help_names_every_network_its_public_weights_and_examples() -> None:
    said = run("weights", "--help")
    assert all(name in said and origin.source in said for name, origin in {**ORIGINS, **RELEASED}.items())
    assert "fourmill weights add depth omnidata_dpt_depth_v2.ckpt --out" in said


def test_a_file_that_has_to_be_downloaded_first_comes_with_the_whole_command_line(paper: Workspace) -> None:
    origin = ORIGINS["vitdet"]
    assert origin.url.endswith(f"/{origin.source}")
    command = f"curl -fLO {origin.url} && fourmill weights add vitdet {origin.source} "
    for said in (run("weights", "--help"), run("weights", "add", "--help"), missing_weights(paper.project())["det"]):
        assert command in said
    readme = (Path(__file__).parents[2] / "infra" / "detectron2" / "README.md").read_text()
    assert f"curl -fLO {origin.url}\n" in readme


@pytest.mark.parametrize("place", [[], ["--out", "a", "--store", "b"]])
def test_the_place_has_to_be_said_once(place: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="either --out FOLDER of a project, or --store ROOT"):
        run("weights", "add", "depth", str(tmp_path), *place)


def test_a_name_that_is_none_is_refused_before_anything_is_downloaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no weights are called 'lamp'; names are depth, normal"):
        run("weights", "add", "lamp", "hf:people/lamp", "--store", str(tmp_path))


def test_a_run_without_its_weights_ends_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_text("http://a.example/1.jpg\ta dog\n")
    place = ("--list", str(tmp_path / "list.tsv"), "--out", str(tmp_path / "out"), "--labellers", "stored")
    with pytest.raises(WeightsMissingError, match=rf"`fourmill weights add depth hf:\S+ --store {tmp_path}/out/store`"):
        run("run", *place)
    assert not (tmp_path / "out").exists()


def test_preflight_names_every_labeller_without_weights(paper: Workspace) -> None:
    with pytest.raises(preflight.NotReadyError) as caught:
        preflight.check_weights(paper.project())
    assert [line.split(" labeller: ")[0] for line in str(caught.value).splitlines()] == [
        "depth",
        "normal",
        "semseg",
        "det",
        "clip",
    ]


def test_weights_of_another_network_are_refused_with_what_does_not_fit(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    tiny = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16, patch_size=8
    )
    ViTModel(tiny).save_pretrained(tmp_path / "wrong")
    place = ("--store", str(tmp_path / "store"))
    with pytest.raises(ValueError, match=r"do not fit .*missing keys: .*`fourmill weights --help` names for depth"):
        run("weights", "add", "depth", str(tmp_path / "wrong"), *place)
    assert not (tmp_path / "store" / "weights").exists()


def test_the_list_of_a_place_that_is_not_there_says_so(tmp_path: Path, paper: Workspace) -> None:
    for option in ("--out", "--store"):
        with pytest.raises(ValueError, match=r"there is nothing at .*/none: neither a project nor a store"):
            run("weights", "list", option, str(tmp_path / "none"))
    assert "none yet" in run("weights", "list", "--out", str(paper.out))


@pytest.fixture(scope="session")
def rgb_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An rgb tokenizer of another codebook than the demo's, in the public format; do not change it."""
    from fourmill.core.store import LocalStore
    from fourmill.tokenize.config import ImageTokenizerConfig
    from fourmill.tokenize.exchange import export_image_tokenizer
    from fourmill.tokenize.image_tokenizer import ImageTokenizer
    from fourmill.tokenize.load import save_image_tokenizer

    base = tmp_path_factory.mktemp("rgb")
    values = demo(base).tokenizers["rgb"].model_dump()
    values["quantizer"] |= {"codebook_size": 16, "kmeans_init": False}
    store, model = LocalStore(base / "store"), ImageTokenizer(ImageTokenizerConfig.model_validate(values))
    _, folder = save_image_tokenizer(store, "tokenizer_rgb", model, "card {digest}")
    export_image_tokenizer(store, folder, base / "export")
    return base / "export"


def test_an_added_tokenizer_is_listed_as_serving_and_comes_with_the_way_back(tmp_path: Path, rgb_export: Path) -> None:
    workspace = Workspace(tmp_path / "out")
    before = workspace.keep(demo(workspace.out))
    said = run("weights", "add", "tokenizer_rgb", str(rgb_export), "--out", str(workspace.out)).replace("\n", "")
    added = workspace.project()
    digest = added.served_tokenizers["rgb"]
    assert "its tokens, and all that is made of them, are stale" in said and added.tokenizers != before.tokenizers

    listed = json.loads(run("weights", "list", "--out", str(workspace.out), "--json"))
    rows = {row["name"]: row for row in listed}
    assert rows["tokenizer_rgb"]["serves"] == rows["tokenizer_rgb"]["imported"][0]
    assert "serves" not in rows["tokenizer_depth"]
    (line,) = [
        one for one in run("weights", "list", "--out", str(workspace.out)).splitlines() if "tokenizer_rgb" in one
    ]
    cells = [cell.strip() for cell in line.split("│")]
    assert cells[2] == digest[:12] and cells[5] == ""

    command = shlex.split(said[said.index("`fourmill run") + 1 : said.rindex("`")])
    assert command[:4] == ["fourmill", "run", "--out", str(workspace.out)] and set(command[4::2]) == {"--set"}
    assert with_settings(added, command[5::2]) == before


def test_a_tokenizer_that_no_project_is_there_for_comes_with_what_to_do(tmp_path: Path, rgb_export: Path) -> None:
    said = run("weights", "add", "tokenizer_rgb", str(rgb_export), "--out", str(tmp_path / "out"))
    digest = next(iter(open_store(str(tmp_path / "out" / "store")).list("models/tokenizer_rgb"))).split("/")[2]
    assert "no project at" in said and f"--set served_tokenizers.rgb={digest}" in said.replace("\n", "")
