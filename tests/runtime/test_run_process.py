"""A process is known by its mark as long as it lives, and no other one is taken for it."""

import os
import subprocess
import sys

import pytest

from fourmill.runtime import run_process
from fourmill.runtime.run_process import is_alive, is_killed, is_marked, pid_of, process_tags

RUN, TAG = "4a", "fourmill/process"


def test_a_process_is_killed_when_it_is_gone_and_not_before() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        tags = process_tags(RUN, process.pid)
        assert is_alive(RUN, tags) and not is_killed(RUN, tags) and pid_of(RUN, tags) == process.pid
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and nobody has waited for it yet
        assert is_killed(RUN, tags) and not is_alive(RUN, tags)
        process.wait()
    assert is_killed(RUN, tags)


def mark(**changed: str) -> dict[str, str]:
    """The tag of this process, with other parts."""
    names = ("run", "host", "boot", "namespace", "pid", "started")
    parts = dict(zip(names, process_tags(RUN)[TAG].split(" "), strict=True))
    return {TAG: " ".join({**parts, **changed}.values())}


@pytest.mark.parametrize("changed", [{"started": "1"}, {"boot": "another"}])
def test_another_process_under_the_same_number_is_not_the_same(changed: dict[str, str]) -> None:
    assert not is_killed(RUN, mark()) and is_alive(RUN, mark()) and pid_of(RUN, mark()) == os.getpid()
    assert is_killed(RUN, mark(**changed)) and not is_alive(RUN, mark(**changed))


@pytest.mark.parametrize("changed", [{"host": "elsewhere"}, {"namespace": "pid:[1]"}])
def test_nothing_is_said_of_other_machines_and_containers(changed: dict[str, str]) -> None:
    tags = mark(**changed, started="1")
    assert not is_killed(RUN, tags) and not is_alive(RUN, tags) and pid_of(RUN, tags) is None and is_marked(RUN, tags)


def test_a_run_without_a_tag_or_with_anothers_is_not_marked() -> None:
    for tags in ({}, {TAG: ""}, {TAG: f"{RUN} host 12"}, mark(run="4b", started="1")):
        assert not is_marked(RUN, tags) and not is_killed(RUN, tags) and pid_of(RUN, tags) is None


def test_where_the_system_tells_less_its_clock_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nowhere:
        def __init__(self, path: str) -> None: ...
        def read_text(self) -> str:
            raise FileNotFoundError

    def readlink(path: str) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(run_process, "Path", Nowhere)
    monkeypatch.setattr(run_process.os, "readlink", readlink)
    assert is_alive(RUN, process_tags(RUN)) and is_killed(RUN, mark(started="1"))
