import io
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fourmill.core.flow import Threads
from fourmill.core.labels import Box, Picture
from fourmill.core.names import SampleKey, sample_key
from fourmill.pseudolabel.attempts import Attempts
from fourmill.pseudolabel.items import Effort, LabelShapeError, all_items, covered_s, label_items
from fourmill.pseudolabel.labeller import CONSTANT, Answer, Label, Labelled, NetworkError, Rejected
from fourmill.pseudolabel.members import FORMATS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def threads() -> Iterator[Threads]:
    made = Threads(2)
    yield made
    made.close()


class EverySecond:
    """Boxes for every second picture; the others are rejected."""

    label, weights_digest = "det", "none"

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def bucket(self, picture: Picture) -> tuple[int, int]:
        return (picture.rgb_HWC.shape[1] % 3, 0)

    def label_pictures(self, pictures: Sequence[Picture]) -> list[Label | Rejected]:
        widths = [picture.rgb_HWC.shape[1] for picture in pictures]
        return [[Box(0, 0, 1, 1, 1.0, "cat")] if width % 2 else Rejected("even") for width in widths]


def members(count: int) -> Iterator[tuple[SampleKey, bytes]]:
    for i in range(count):
        sink = io.BytesIO()
        Image.new("RGB", (i + 1, 1)).save(sink, "PNG")
        yield sample_key(i), sink.getvalue()


@settings(max_examples=15, deadline=None)
@given(count=st.integers(0, 30), batch_size=st.integers(1, 3))
def test_every_image_becomes_one_item_in_order(threads: Threads, count: int, batch_size: int) -> None:
    items = list(label_items(threads, members(count), EverySecond(batch_size), FORMATS["det"]))
    assert [item.key for item in items] == [sample_key(i) for i in range(count)]
    assert [item.status for item in items] == ["ok" if i % 2 == 0 else "rejected" for i in range(count)]
    assert all(item.reason == "even" for item in items if item.status == "rejected")


class Halved:
    """Depth at half the image's size."""

    label, version, weights_digest, batch_size = "depth", "1", "none", 1

    def bucket(self, picture: Picture) -> tuple[int, int]:
        return (0, 0)

    def label_pictures(self, pictures: Sequence[Picture]) -> list[Label | Rejected]:
        return [np.zeros((2, 3), np.float32) for _ in pictures]


def test_a_label_of_another_size_than_its_image_raises(threads: Threads) -> None:
    with pytest.raises(LabelShapeError, match=r"sample 000000000.*\(2, 3\).*\(1, 1\)"):
        list(label_items(threads, members(1), Halved(), FORMATS["depth"]))


class Broken:
    """Depth that cannot be: of a network whose precision overflows after its own checks, or that rejects whatever it sees."""

    label, version, weights_digest, batch_size = "depth", "1", "none", 2

    def __init__(self, answer: Callable[[Picture], Answer]) -> None:
        self._answer = answer

    def bucket(self, picture: Picture) -> tuple[int, int]:
        return (0, 0)

    def label_pictures(self, pictures: Sequence[Picture]) -> Sequence[Answer]:
        return [self._answer(picture) for picture in pictures]


def test_values_that_cannot_be_stored_stop_the_shard(threads: Threads) -> None:
    nan = Broken(lambda picture: np.full(picture.rgb_HWC.shape[:2], np.nan, np.float32))
    with pytest.raises(NetworkError, match=r"depth of sample 000000000: .*nan.*the network or its precision is wrong"):
        list(label_items(threads, members(3), nan, FORMATS["depth"]))


def test_a_network_that_rejects_a_whole_shard_is_wrong(threads: Threads) -> None:
    dead = Broken(lambda picture: Rejected("too hard"))
    assert len(list(label_items(threads, members(7), dead, FORMATS["depth"]))) == 7
    with pytest.raises(NetworkError, match="every one of 8 images of a shard was rejected"):
        list(label_items(threads, members(8), dead, FORMATS["depth"]))


def test_a_network_that_sees_nothing_in_any_image_of_a_shard_is_wrong(threads: Threads) -> None:
    """Whatever the batches: those of one image each tell nothing by themselves. An image of one colour proves nothing."""

    def image(seed: int, colours: int) -> bytes:
        sink = io.BytesIO()
        values = np.random.default_rng(seed).integers(0, colours, (10, 10, 3), np.uint8)
        Image.fromarray(values).save(sink, "PNG")
        return sink.getvalue()

    def answer(picture: Picture) -> Answer:
        sees = picture.rgb_HWC.max() == 0 or picture.rgb_HWC.max() > 100
        return np.zeros(picture.rgb_HWC.shape[:2], np.float32) if sees else CONSTANT

    def label(colours: Sequence[int]) -> list[str]:
        data = ((sample_key(i), image(i, num)) for i, num in enumerate(colours))
        one_by_one = Broken(answer)
        one_by_one.batch_size = 1
        return [item.status for item in label_items(threads, data, one_by_one, FORMATS["depth"])]

    assert label([1, 50, 250, 50]) == ["ok", "rejected", "ok", "rejected"]
    assert label([1, 50]) == ["ok", "rejected"]
    with pytest.raises(NetworkError, match=r"every image of a shard in which there is something to see \(2\)"):
        label([1, 50, 50])


def test_what_was_learnt_of_the_memory_is_kept_from_shard_to_shard(threads: Threads) -> None:
    batches: list[int] = []

    class Large(EverySecond):
        def bucket(self, picture: Picture) -> tuple[int, int]:
            return (0, 0)

        def label_pictures(self, pictures: Sequence[Picture]) -> list[Label | Rejected]:
            batches.append(len(pictures))
            if len(pictures) > 1:
                raise MemoryError
            return super().label_pictures(pictures)

    attempts = Attempts(Large(batch_size=2))
    for _ in range(2):
        made = list(all_items(threads, members(2), [(attempts, FORMATS["det"])], Effort()))
        assert [items[0].status for items in made] == ["ok", "rejected"]
    assert batches == [2, 1, 1, 1, 1]


def test_decoding_does_not_wait_behind_encoding(threads: Threads) -> None:
    """The first labels are only encoded once an image has been decoded that is asked for later."""
    later = threading.Event()

    class Fed(Broken):
        def fed_size(self, picture: Picture) -> tuple[int, int]:
            if picture.rgb_HWC.shape[1] == 11:
                later.set()
            return (1, 1)

    def encode(label: np.ndarray) -> bytes:
        assert later.wait(60)
        return b"label"

    one = Fed(lambda picture: np.zeros(picture.rgb_HWC.shape[:2], np.float32))
    form = replace(FORMATS["depth"], encode=encode)
    assert len(list(label_items(threads, members(24), one, form))) == 24


def test_figures_that_only_the_labeller_knows_reach_the_row(threads: Threads) -> None:
    known = Broken(lambda picture: Labelled(np.zeros(picture.rgb_HWC.shape[:2], np.float32), {"clamped": 0.25}))
    (item,) = label_items(threads, members(1), known, FORMATS["depth"])
    assert dict(item.extra["figures"]) == {"least": 0, "most": 0, "mean": 0, "clamped": 0.25}


def test_decoding_network_and_encoding_are_in_threads_of_their_own(threads: Threads) -> None:
    """The network waits until images of the next batch have been decoded: it can only go on if others work meanwhile."""
    decoded, names = threading.Semaphore(0), set[str]()

    def stream() -> Iterator[tuple[SampleKey, bytes]]:
        for member in members(8):
            decoded.release()
            yield member

    def answer(picture: Picture) -> Answer:
        names.add(threading.current_thread().name)
        assert decoded.acquire(timeout=60)
        return np.zeros(picture.rgb_HWC.shape[:2], np.float32)

    items = list(label_items(threads, stream(), Broken(answer), FORMATS["depth"]))
    assert len(items) == 8 and len(names) == 1 and "network" in names.pop()


class TwoAtATime(EverySecond):
    """Batches meet in pairs: the answer to one is given only when a second is under way."""

    streams = 2

    def __init__(self) -> None:
        super().__init__(batch_size=2)
        self._pairs = threading.Barrier(2)

    def label_pictures(self, pictures: Sequence[Picture]) -> list[Label | Rejected]:
        self._pairs.wait(180)
        return super().label_pictures(pictures)

    def bucket(self, picture: Picture) -> tuple[int, int]:
        return (0, 0)


def test_two_batches_are_under_way_at_a_time_and_items_stay_in_order() -> None:
    threads, effort = Threads(2, TwoAtATime.streams), Effort()
    made = list(all_items(threads, members(24), [(Attempts(TwoAtATime()), FORMATS["det"])], effort))
    threads.close()
    assert [items[0].key for items in made] == [sample_key(i) for i in range(24)]
    assert [items[0].status for items in made] == ["ok", "rejected"] * 12
    assert effort.network_s > 0


def test_a_labeller_that_rejects_everything_is_found_by_two_threads_too() -> None:
    class Never(TwoAtATime):
        def label_pictures(self, pictures: Sequence[Picture]) -> list[Label | Rejected]:
            return [Rejected("never") for _ in pictures]

    threads = Threads(2, 2)
    with pytest.raises(NetworkError, match="every one of 12 images"):
        list(label_items(threads, members(12), Never(), FORMATS["det"]))
    threads.close()


def test_time_that_several_spans_cover_counts_once() -> None:
    assert covered_s([]) == 0
    assert covered_s([(5, 6), (0, 2), (1, 3), (1.5, 2)]) == 4
