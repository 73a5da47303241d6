"""One clear message each, with what to do, before any work is started; nothing half-written."""

import json
import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError
from rich.console import Console
from sqlalchemy.exc import OperationalError

from fourmill.pipelines import cli, demo, preflight
from fourmill.pipelines.demo import run_kept
from fourmill.pipelines.preflight import NotReadyError, check_machine, check_port, only_one
from fourmill.pipelines.profiles import smallest
from fourmill.pipelines.workspace import Workspace
from fourmill.runtime.project import Project, problems_of

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def refused(done: "subprocess.CompletedProcess[str]", *words: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert all(word in " ".join(done.stderr.split()) for word in words), done.stderr


def test_a_profile_that_does_not_exist(tmp_path: Path, fourmill: Run) -> None:
    refused(fourmill("demo", "--out", str(tmp_path / "out"), "--profile", "tiny"), "tiny", "demo, smallest")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["demo", "run"])
def test_minutes_for_a_profile_whose_steps_are_fixed(command: str, tmp_path: Path, fourmill: Run) -> None:
    source = ("--folder", str(tmp_path)) if command == "run" else ()
    out = ("--out", str(tmp_path / "out"), "--profile", "smallest", "--train-minutes", "3")
    refused(fourmill(command, *source, *out), "--train-minutes goes with --profile demo", "smallest", "pretrain.steps")
    assert not (tmp_path / "out").exists()


def test_a_missing_list(tmp_path: Path, fourmill: Run) -> None:
    done = fourmill("run", "--list", str(tmp_path / "no.tsv"), "--out", str(tmp_path / "out"), "--labellers", "seeded")
    refused(done, "no list at", "no.tsv", "URL<TAB>caption")
    assert not (tmp_path / "out").exists()


def test_a_run_of_two_sources_or_of_none(tmp_path: Path, fourmill: Run) -> None:
    out = ("--out", str(tmp_path / "out"))
    refused(
        fourmill("run", *out, "--folder", str(tmp_path), "--tars", str(tmp_path)), "one of --list, --folder and --tars"
    )
    refused(fourmill("run", *out, "--num-blocks", "3"), "go with --list", "--set")
    refused(fourmill("run", *out, "--train-minutes", "3"), "go with --list", "--set")
    refused(fourmill("run", *out), "no project at", "fourmill run --list")
    refused(fourmill("run", *out, "--folder", str(tmp_path / "none")), "no folder at")


def test_labellers_that_are_neither_a_word_nor_a_folder(tmp_path: Path, fourmill: Run) -> None:
    (tmp_path / "list.tsv").write_text("http://a.example/1.jpg\ta dog\n")
    done = fourmill("run", "--list", str(tmp_path / "list.tsv"), "--out", str(tmp_path / "out"), "--labellers", "none")
    refused(done, "none", "seeded")


def test_a_folder_without_a_project(tmp_path: Path, fourmill: Run) -> None:
    refused(fourmill("status", "--out", str(tmp_path)), "no project at", "fourmill demo")


def test_an_unknown_key_in_a_project_is_named(tmp_path: Path, fourmill: Run) -> None:
    config = smallest(tmp_path).model_dump(mode="json")
    config["ingest"]["concurency"] = 3
    (tmp_path / "project.json").write_text(json.dumps(config))
    refused(fourmill("status", "--out", str(tmp_path)), "ingest.concurency", "there is no such key")


def test_a_kind_of_labeller_that_does_not_exist(tmp_path: Path) -> None:
    config = smallest(tmp_path).model_dump(mode="json")
    config["labellers"] |= {"edges": {"kind": "cannny"}, "canny": {"kind": "canny", "lo": 3}}
    with pytest.raises(ValidationError) as caught:
        Project.model_validate(config)
    said = "; ".join(problems_of(caught.value))
    assert "labellers.edges: " in said and "'cannny'; kinds are scene, dpt" in said and "clip, canny" in said
    assert "labellers.canny.lo: there is no such key" in said


def test_a_problem_of_a_whole_project_has_no_key(tmp_path: Path) -> None:
    project = smallest(tmp_path)
    rgb = project.tokenizers["rgb"].model_copy(update={"patch_px": 16})
    with pytest.raises(ValidationError) as caught:
        Project.model_validate({**dict(project), "tokenizers": {**project.tokenizers, "rgb": rgb}})
    assert {one["loc"] for one in caught.value.errors()} == {()} and "patch" in problems_of(caught.value)[0]


def test_a_profile_for_photographs_has_no_demo(tmp_path: Path, fourmill: Run) -> None:
    done = fourmill("demo", "--profile", "cc12m_4m7", "--out", str(tmp_path / "out"))
    refused(done, "generated scenes", "fourmill run --profile cc12m_4m7 --list")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [("ui", "--port", "99999"), ("demo", "--train-minutes", "-3"), ("run", "--train-minutes", "-3")]
)
def test_a_number_that_is_none(arguments: tuple[str, ...], tmp_path: Path, fourmill: Run) -> None:
    done = fourmill(*arguments, "--out", str(tmp_path))
    assert (
        done.returncode == 2 and f"Invalid value for '{arguments[1]}'" in done.stderr and "Traceback" not in done.stderr
    )


@pytest.mark.ray
def test_a_refused_setting_is_not_kept(smallest_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Workspace(smallest_demo).project_file.read_bytes()

    def not_ready(project: Project) -> None:
        raise preflight.NotReadyError(f"not with {project.pretrain.steps} steps")

    monkeypatch.setattr(preflight, "check_machine", not_ready)
    with pytest.raises(preflight.NotReadyError, match="not with 13 steps"):
        run_kept(Workspace(smallest_demo), Console(), settings=["pretrain.steps=13"])
    assert Workspace(smallest_demo).project_file.read_bytes() == before


def test_an_interrupt_is_told_with_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupted)
    monkeypatch.setattr(sys, "argv", ["fourmill", "demo"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130 and "goes on with what is left" in capsys.readouterr().err


def test_state_that_cannot_be_written_is_told_with_the_next_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> None:
        raise OperationalError("PRAGMA", None, sqlite3.OperationalError("disk I/O error"))

    monkeypatch.setattr(cli, "app", full)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 1 and "disk I/O error" in said and "fourmill doctor" in said


def test_an_unwritable_folder(tmp_path: Path, fourmill: Run) -> None:
    (tmp_path / "file").write_text("in the way")
    refused(fourmill("demo", "--out", str(tmp_path / "file" / "out")), "cannot be written", "--out")


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(NotReadyError, match=rf"port {port} cannot be used.*{port + 1}"):
            check_port(port)


def test_too_little_disk_and_memory(tmp_path: Path) -> None:
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "list.tsv").write_text("http://a.example/1.jpg\ta dog\n")
    project = smallest(tmp_path)
    with pytest.raises(NotReadyError, match="MB free and a run needs"):
        check_machine(project, min_disk_mb=10**9)
    with pytest.raises(NotReadyError, match="MB of memory are free and a run needs"):
        check_machine(project, min_memory_mb=10**9)


def test_a_ray_address_nobody_answers_on(tmp_path: Path) -> None:
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "list.tsv").write_text("http://a.example/1.jpg\ta dog\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    project = smallest(tmp_path)
    broken = project.model_copy(update={"ray": project.ray.model_copy(update={"address": address})})
    with pytest.raises(ValueError, match="no Ray cluster answers"):
        check_machine(broken)


def test_two_drivers_in_one_folder(tmp_path: Path) -> None:
    with only_one(tmp_path), pytest.raises(NotReadyError, match="another fourmill is at work"), only_one(tmp_path):
        pass


def test_help_teaches(fourmill: Run) -> None:
    for command in ("demo", "run", "status", "trace", "ui"):
        done = fourmill(command, "--help")
        assert done.returncode == 0
        assert "--out" in done.stdout
    assert os.linesep in fourmill("--help").stdout
