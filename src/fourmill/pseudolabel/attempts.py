"""What a failing batch means: too large for the memory, one bad image in it, or a wrong network.

No torch here: whatever library a labeller uses, its errors are told by name.
"""

import sys
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition, Lock

from fourmill.core.labels import Picture
from fourmill.core.process import give_memory_back
from fourmill.pseudolabel.labeller import Answer, Labeller, NetworkError, NotASceneError, Rejected

OUT_OF_MEMORY = "out_of_memory"
FAILED = "failed"

_PATIENCE = 16  # batches that go through before twice as many images are tried
_MOST_PATIENCE = 256  # it doubles each time that they run out of memory again: a batch in 256 costs nothing to speak of
_ANY = sys.maxsize

# Also a library of CUDA's without room for its workspace, by its own words.
_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "failed to allocate",
    "status_alloc_failed",
    "unable to find an engine",
)
_OF_A_DEVICE = ("cuda error", "cublas_status", "cudnn_status", "device-side assert")


class Turns:
    """Who may use the device: several at a time, or one alone."""

    def __init__(self) -> None:
        self._changed, self._num_sharing, self._num_alone = Condition(), 0, 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Beside others; waits for one that is, or wants to be, alone."""
        with self._changed:
            self._changed.wait_for(lambda: not self._num_alone)
            self._num_sharing += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_sharing -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """With nobody else; those who want to be alone come one after the other, too."""
        with self._changed:
            self._num_alone += 1
            self._changed.wait_for(lambda: not self._num_sharing)
            self._num_sharing += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_sharing -= 1
                self._num_alone -= 1
                self._changed.notify_all()


class Attempts:
    """Labels batch after batch with one labeller, so that a failure costs no more samples than it must.

    A batch that runs out of memory is halved, and later batches of its bucket start at the size that went through; after a
    number of them twice as many images are tried again, since the memory may have been another process's for a while. One
    that fails for another reason is bisected down to the sample at fault, which is rejected with its reason. A single image
    without room is tried again with the device to itself, so that it is not rejected for what another thread does, and once
    more after the others of its batch, for what another process did. All of it depends on counts, never on the clock.
    """

    def __init__(self, labeller: Labeller, turns: Turns | None = None) -> None:
        """Nothing has failed yet.

        Args:
            turns: shared with the other labellers that use the device.
        """
        self.labeller = labeller
        self._turns = turns or Turns()
        self._lock = Lock()
        self._rooms: dict[Hashable, _Room] = {}  # of the buckets that ran out of memory

    def label(self, pictures: Sequence[Picture], bucket: Hashable) -> list[Answer]:
        """One answer an image, in order.

        Raises:
            NetworkError: the network is wrong: it said so, or it fails on each of several images alone, not for lack of memory.
        """
        answers: list[Answer] = []
        while len(answers) < len(pictures):
            part = pictures[len(answers) :][: self._size(bucket)]
            found, most = self._try(part)
            self._learn(bucket, len(part), most)
            answers += found
        for place, answer in enumerate(answers):
            if _is_rejected_for(OUT_OF_MEMORY, answer):
                again, failure = self._attempt_alone(pictures[place : place + 1])
                answers[place] = answer if failure else again[0]
        failed = [one.reason for one in answers if isinstance(one, Rejected) and one.status == FAILED]
        if len(failed) == len(answers) > 1:
            raise NetworkError(
                f"{self.labeller.label}: each of {len(answers)} images failed, alone too ({failed[0]}); look at the weights"
            )
        return answers

    def _size(self, bucket: Hashable) -> int:
        with self._lock:
            return self._rooms[bucket].size if bucket in self._rooms else _ANY

    def _learn(self, bucket: Hashable, num: int, most: int) -> None:
        """From a batch of `num` images, of which `most` went through at once."""
        with self._lock:
            room = self._rooms.get(bucket)
            if most < num:
                patience = _PATIENCE if room is None else min(2 * room.patience, _MOST_PATIENCE)
                self._rooms[bucket] = _Room(most if room is None else min(most, room.size), patience)
            elif room is not None and num >= room.size:
                room.num_good += 1
                if room.num_good == room.patience:
                    room.size, room.num_good = 2 * room.size, 0

    def _try(self, pictures: Sequence[Picture]) -> tuple[list[Answer], int]:
        """Answers, and how many images went through at once where more ran out of memory, else `_ANY`."""
        with self._turns.shared():
            answers, failure = self._attempt(pictures)
        if failure is not None and failure.is_of_memory and len(pictures) == 1:
            answers, failure = self._attempt_alone(pictures)
        if failure is None:
            return answers, _ANY
        if failure.is_of_memory:
            give_memory_back()
        if len(pictures) == 1:
            height, width = pictures[0].rgb_HWC.shape[:2]
            status = OUT_OF_MEMORY if failure.is_of_memory else FAILED
            return [Rejected(f"{width} x {height} pixels: {failure.reason}", status)], _ANY
        half = len(pictures) // 2
        (first, first_most), (second, second_most) = self._try(pictures[:half]), self._try(pictures[half:])
        answers, most = [*first, *second], min(first_most, second_most)
        if failure.is_of_memory and not any(_is_rejected_for(OUT_OF_MEMORY, one) for one in answers):
            most = min(half, most)  # no one image is to blame, so it was their number
        return answers, most

    def _attempt_alone(self, pictures: Sequence[Picture]) -> tuple[list[Answer], "_Failure | None"]:
        with self._turns.alone():
            give_memory_back()
            return self._attempt(pictures)

    def _attempt(self, pictures: Sequence[Picture]) -> tuple[list[Answer], "_Failure | None"]:
        """Answers, or what may be a sample's fault; not the error itself, whose traceback keeps the batch's arrays alive."""
        try:
            return self._checked(pictures), None
        # No sample's fault; a warning is an error where somebody said so.
        except (NetworkError, NotASceneError, Warning):
            raise
        except Exception as error:
            if is_broken_device(error):
                raise
            return [], _Failure(is_out_of_memory(error), f"{type(error).__name__}: {_first_line(error)}")

    def _checked(self, pictures: Sequence[Picture]) -> list[Answer]:
        answers = list(self.labeller.label_pictures(pictures))
        if len(answers) != len(pictures):
            raise NetworkError(f"{self.labeller.label}: {len(answers)} labels for {len(pictures)} images")
        return answers


@dataclass
class _Room:
    """How many images of a bucket go through at once, as far as is known, and when to try more."""

    size: int
    patience: int
    num_good: int = 0  # batches of that size


@dataclass(frozen=True)
class _Failure:
    is_of_memory: bool
    reason: str


def _is_rejected_for(status: str, answer: Answer) -> bool:
    return isinstance(answer, Rejected) and answer.status == status


def is_out_of_memory(error: Exception) -> bool:
    """Whether a smaller batch may do."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, MemoryError) or "OutOfMemoryError" in names:
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OF_MEMORY)


def is_broken_device(error: Exception) -> bool:
    """Whether the device itself has failed: nothing more can be done with it in this process."""
    if is_out_of_memory(error) or not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ == "AcceleratorError" or any(words in str(error).lower() for words in _OF_A_DEVICE)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no message")[:300]
