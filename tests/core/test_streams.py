"""A thread's CUDA stream, with torch.cuda replaced by what counts: each thread has one, whatever its device is called."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from fourmill.core import streams
from fourmill.core.streams import own_stream


class Stream:
    """As torch's: its device has a number, whatever it was made with."""

    made: list["Stream"]

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", device.index or 0)
        self.num_synchronized = 0
        self.made.append(self)

    def wait_stream(self, other: object) -> None:
        pass

    def synchronize(self) -> None:
        self.num_synchronized += 1


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Stream]:
    """All streams that are made in the test."""

    @contextmanager
    def use(stream: Stream) -> Iterator[None]:
        yield

    Stream.made = []
    monkeypatch.setattr(streams, "_mine", streams._Mine())
    fakes = {"Stream": Stream, "stream": use, "current_device": lambda: 0, "current_stream": lambda device: None}
    for name, fake in {**fakes, "synchronize": lambda device: None}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return Stream.made


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_thread_keeps_its_stream_from_batch_to_batch(made: list[Stream], device: str) -> None:
    for _ in range(5):
        with own_stream(torch.device(device)), own_stream(torch.device(device)):
            pass
    assert len(made) == 1 and made[0].num_synchronized == 5


def test_what_was_begun_before_an_error_is_done_when_it_is_raised(made: list[Stream]) -> None:
    with pytest.raises(RuntimeError, match="memory"), own_stream(torch.device("cuda")):
        raise RuntimeError("out of memory")
    assert made[0].num_synchronized == 1
