"""A process is known by its mark as long as it lives, and no other one is taken for it."""

import os
import subprocess
import sys

from fourmill.runtime.run_process import is_killed, pid_of, process_tags

RUN, TAG = "4a", "fourmill/process"


def test_a_process_has_ended_when_it_is_gone_and_not_before() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        tags = process_tags(RUN, process.pid)
        assert not is_killed(RUN, tags)
        process.kill()
        process.wait()
    assert is_killed(RUN, tags)


def test_a_process_that_nobody_has_waited_for_yet_has_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        tags = process_tags(RUN, process.pid)
        process.kill()
        assert process.stdout is not None and process.stdout.read() == b""  # closed by its end
        while not is_killed(RUN, tags):
            pass
        assert process.returncode is None


def tags_of(*parts: str) -> dict[str, str]:
    return {TAG: ":".join(parts)}


def test_another_process_under_the_same_number_is_not_the_same() -> None:
    run, host, pid, started = process_tags(RUN)[TAG].split(":")
    assert not is_killed(RUN, tags_of(run, host, pid, started))
    assert is_killed(RUN, tags_of(run, host, pid, f"{float(started) - 3600:.0f}"))
    assert pid_of(RUN, process_tags(RUN)) == int(pid) == os.getpid()


def test_nothing_is_said_of_other_machines_of_runs_without_a_tag_and_of_those_that_were_given_anothers() -> None:
    run, host, pid, started = process_tags(RUN)[TAG].split(":")
    long_ago = f"{float(started) - 3600:.0f}"
    assert not is_killed(RUN, tags_of(run, "elsewhere", pid, long_ago))
    assert pid_of(RUN, tags_of(run, "elsewhere", pid, long_ago)) is None
    assert not is_killed(RUN, {}) and not is_killed(RUN, tags_of("")) and not is_killed(RUN, tags_of(RUN, host, pid))
    assert not is_killed("4b", tags_of(run, host, pid, long_ago))
