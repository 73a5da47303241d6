"""Processes of one training, here as threads that share a store."""

from threading import Event, Thread

from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from fourmill.core.ranks import ALONE, Ranks


def test_the_others_wait_until_the_first_has_done_what_it_does_alone() -> None:
    meeting, is_waiting, may_end = HashStore(), Event(), Event()
    done: list[str] = []

    def other() -> None:
        with Ranks(1, 2, meeting=meeting).first_alone("score 3") as is_first:
            assert not is_first
            is_waiting.set()
        done.append("other")

    def first() -> None:
        with Ranks(0, 2, meeting=meeting).first_alone("score 3") as is_first:
            assert is_first
            may_end.wait()
            done.append("first")

    threads = [Thread(target=work, daemon=True) for work in (other, first)]
    for thread in threads:
        thread.start()
    assert is_waiting.wait(180)
    may_end.set()
    for thread in threads:
        thread.join(180)
    assert done == ["first", "other"]


def test_a_process_alone_waits_for_nobody() -> None:
    with ALONE.first_alone("score 3") as is_first:
        assert is_first
