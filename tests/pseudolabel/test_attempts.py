"""What a failing batch costs: halves for memory, the sample at fault for anything else, the block for a wrong network."""

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fourmill.core.labels import Picture
from fourmill.pseudolabel.attempts import Attempts, Turns, is_broken_device, is_out_of_memory
from fourmill.pseudolabel.labeller import Answer, NetworkError, Rejected


def pictures(num: int) -> list[Picture]:
    """The red of the first pixel is the picture's number."""
    return [Picture(np.full((2, 3, 3), i, np.uint8)) for i in range(num)]


class Scripted:
    """Depth for every picture, unless what it is told to do for the batch raises."""

    label, version, weights_digest, batch_size = "depth", "1", "none", 8

    def __init__(self, act: Callable[[list[int]], None]) -> None:
        self._act = act
        self.batches: list[list[int]] = []

    def bucket(self, picture: Picture) -> tuple[int, int]:
        return (2, 3)

    def label_pictures(self, pictures: Sequence[Picture]) -> Sequence[Answer]:
        numbers = [int(picture.rgb_HWC[0, 0, 0]) for picture in pictures]
        self.batches.append(numbers)
        self._act(numbers)
        return [np.full(picture.rgb_HWC.shape[:2], i, np.float32) for i, picture in zip(numbers, pictures, strict=True)]


def numbers_of(answers: Sequence[Answer]) -> list[int | str]:
    return [answer.status if isinstance(answer, Rejected) else int(np.asarray(answer)[0, 0]) for answer in answers]


def room_for(most: int, kind: Callable[[str], Exception]) -> Callable[[list[int]], None]:
    def act(numbers: list[int]) -> None:
        if len(numbers) > most:
            raise kind("CUDA out of memory. Tried to allocate 2.00 GiB")

    return act


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_a_batch_without_room_is_halved_and_later_ones_start_smaller(kind: Callable[[str], Exception]) -> None:
    labeller = Scripted(room_for(2, kind))
    attempts = Attempts(labeller)
    assert numbers_of(attempts.label(pictures(8), "bucket")) == list(range(8))
    assert [len(batch) for batch in labeller.batches] == [8, 4, 2, 2, 4, 2, 2]
    labeller.batches.clear()
    assert numbers_of(attempts.label(pictures(6), "bucket")) == list(range(6))
    assert [len(batch) for batch in labeller.batches] == [2, 2, 2]
    labeller.batches.clear()
    attempts.label(pictures(4), "another bucket")
    assert labeller.batches[0] == [0, 1, 2, 3]


class Others:
    """Room for `most` images at once, unless another process takes the memory: `taken` while it does."""

    def __init__(self, most: int, taken: int) -> None:
        self.most, self.taken = most, taken

    def __call__(self, numbers: list[int]) -> None:
        if len(numbers) > (self.most if not self.taken else 2):
            self.taken -= bool(self.taken)
            raise torch.OutOfMemoryError("CUDA out of memory.")


def sizes(labeller: Scripted, num_batches: int) -> list[int]:
    """Of all batches that were tried for some of eight images."""
    attempts = Attempts(labeller)
    for _ in range(num_batches):
        assert numbers_of(attempts.label(pictures(8), "bucket")) == list(range(8))
    return [len(batch) for batch in labeller.batches]


def test_a_bucket_grows_again_when_the_memory_was_taken_for_a_while() -> None:
    found = sizes(Scripted(Others(8, taken=2)), 20)
    assert found == [8, 4, 2, 2, 4, *[2] * 16, *[4] * 16, *[8] * 7]


def test_memory_that_stays_short_is_tried_in_ever_longer_intervals() -> None:
    found = sizes(Scripted(Others(4, taken=0)), 400)
    tried = [place for place, size in enumerate(found) if size == 8]
    gaps = [after - before for before, after in itertools.pairwise(tried)]
    assert gaps[:4] == [2 + n + 1 for n in (16, 32, 64, 128)]  # the halves of a batch that failed, and good ones
    assert set(gaps[4:]) == {2 + 256 + 1}


def test_an_image_is_tried_once_more_after_the_others_before_it_is_rejected() -> None:
    """Another process has its peak while image 1 is tried alone, twice; image 2 does not fit in any case."""
    num_left = 4  # failures that are not image 2's: of the batch, of a half of it, and of image 1

    def act(numbers: list[int]) -> None:
        nonlocal num_left
        if 2 in numbers or (1 in numbers and num_left):
            num_left -= 1 in numbers
            raise torch.OutOfMemoryError("CUDA out of memory.")

    labeller = Scripted(act)
    attempts = Attempts(labeller)
    assert numbers_of(attempts.label(pictures(4), "bucket")) == [0, 1, "out_of_memory", 3]
    assert labeller.batches[-3:] == [[3], [1], [2]]


def test_one_image_at_fault_is_found_and_rejected_with_its_reason() -> None:
    def act(numbers: list[int]) -> None:
        if 5 in numbers:
            raise IndexError("row 20000 of 3")

    labeller = Scripted(act)
    answers = Attempts(labeller).label(pictures(8), "bucket")
    assert numbers_of(answers) == [0, 1, 2, 3, 4, "failed", 6, 7]
    fault = answers[5]
    assert isinstance(fault, Rejected) and fault.reason == "3 x 2 pixels: IndexError: row 20000 of 3"
    assert max(map(len, labeller.batches)) == 8 and [5] in labeller.batches


def test_an_image_that_never_has_room_is_rejected_for_that() -> None:
    def act(numbers: list[int]) -> None:
        if 1 in numbers:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    labeller = Scripted(act)
    attempts = Attempts(labeller)
    assert numbers_of(attempts.label(pictures(3), "bucket")) == [0, "out_of_memory", 2]
    labeller.batches.clear()
    attempts.label([pictures(4)[i] for i in (0, 2, 3)], "bucket")
    assert labeller.batches == [[0, 2, 3]]  # one image was too large, not the batch


def test_several_images_without_room_are_rejected_and_stop_nothing() -> None:
    attempts = Attempts(Scripted(room_for(0, torch.OutOfMemoryError)))
    assert numbers_of(attempts.label(pictures(4), "bucket")) == ["out_of_memory"] * 4


def test_an_image_that_has_room_alone_is_not_rejected_for_another_threads_batch() -> None:
    """Picture 0 waits in the first thread while picture 1 is tried beside it: there is room for one."""
    inside, tried = threading.Semaphore(0), threading.Event()
    at_once = 0

    def act(numbers: list[int]) -> None:
        nonlocal at_once
        at_once += 1
        try:
            if numbers == [0]:
                inside.release()
                assert tried.wait(60)
            elif at_once > 1:
                tried.set()
                raise torch.OutOfMemoryError("CUDA out of memory.")
        finally:
            at_once -= 1

    labeller, turns = Scripted(act), Turns()
    first, second = (Attempts(labeller, turns) for _ in range(2))
    with ThreadPoolExecutor(2) as threads:
        waiting = threads.submit(first.label, pictures(1), "bucket")
        assert inside.acquire(timeout=60)
        found = threads.submit(second.label, pictures(2)[1:], "bucket")
        assert numbers_of(found.result()) == [1] and numbers_of(waiting.result()) == [0]
    assert labeller.batches == [[0], [1], [1]]


def test_a_network_that_fails_on_each_image_is_at_fault_itself() -> None:
    def act(numbers: list[int]) -> None:
        raise KeyError("weights")

    with pytest.raises(NetworkError, match=r"each of 4 images failed, alone too \(.*KeyError: 'weights'\)"):
        Attempts(Scripted(act)).label(pictures(4), "bucket")


def test_a_network_that_says_it_is_wrong_is_believed_at_once() -> None:
    def act(numbers: list[int]) -> None:
        raise NetworkError("not finite")

    labeller = Scripted(act)
    with pytest.raises(NetworkError, match="not finite"):
        Attempts(labeller).label(pictures(4), "bucket")
    assert len(labeller.batches) == 1


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "GET was unable to find an engine to execute this computation",
        "FIND was unable to find an engine to execute this computation",
    ],
)
def test_a_library_without_room_is_out_of_memory_and_no_broken_device(said: str) -> None:
    assert is_out_of_memory(RuntimeError(said)) and not is_broken_device(RuntimeError(said))


def test_a_broken_device_is_nobodys_sample() -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert is_broken_device(error) and not is_out_of_memory(error)
    assert not is_broken_device(RuntimeError("CUDA error: out of memory"))

    def act(numbers: list[int]) -> None:
        raise error

    with pytest.raises(RuntimeError, match="illegal memory access"):
        Attempts(Scripted(act)).label(pictures(4), "bucket")


def test_another_number_of_labels_than_images_is_the_networks_fault() -> None:
    class Short(Scripted):
        def label_pictures(self, pictures: Sequence[Picture]) -> Sequence[Answer]:
            return super().label_pictures(pictures)[1:]

    with pytest.raises(NetworkError, match="3 labels for 4 images"):
        Attempts(Short(lambda numbers: None)).label(pictures(4), "bucket")
