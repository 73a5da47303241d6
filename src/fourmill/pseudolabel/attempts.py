"""What a failing batch means: too large for the memory, one bad image in it, or a wrong network.

No torch here: whatever library a labeller uses, its errors are told by name.
"""

import gc
import sys
from collections.abc import Hashable, Sequence

from fourmill.core.labels import Picture
from fourmill.pseudolabel.labeller import Answer, Labeller, NetworkError, NotASceneError, Rejected

OUT_OF_MEMORY = "out_of_memory"
FAILED = "failed"

_OF_MEMORY = ("out of memory", "can't allocate memory", "failed to allocate")
_OF_A_DEVICE = ("cuda error", "cublas_status", "cudnn_status", "device-side assert")


class Attempts:
    """Labels batch after batch with one labeller, so that a failure costs no more samples than it must.

    A batch that runs out of memory is halved, and later batches of its bucket start at the size that was left. One that
    fails for another reason is bisected down to the sample at fault, which is rejected with its reason.
    """

    def __init__(self, labeller: Labeller) -> None:
        self._labeller = labeller
        self.label_name = labeller.label
        self._fits: dict[Hashable, int] = {}  # images at once, of the buckets that ran out of memory

    def label(self, pictures: Sequence[Picture], bucket: Hashable) -> list[Answer]:
        """One answer an image, in order.

        Raises:
            NetworkError: the network is wrong: it said so, or it fails on each of several images alone.
        """
        size = self._fits.get(bucket, len(pictures))
        answers: list[Answer] = []
        for start in range(0, len(pictures), size):
            answers += self._try(pictures[start : start + size], bucket)
        failed = [one for one in answers if isinstance(one, Rejected) and one.status in (OUT_OF_MEMORY, FAILED)]
        if len(failed) == len(answers) > 1:
            raise NetworkError(
                f"{self._labeller.label}: each of {len(answers)} images failed, alone too ({failed[0].reason}); if memory is "
                "short, give each actor a larger share of the GPU or feed smaller images, else look at the weights"
            )
        return answers

    def _try(self, pictures: Sequence[Picture], bucket: Hashable) -> list[Answer]:
        try:
            return self._checked(pictures)
        except (
            NetworkError,
            NotASceneError,
            Warning,
        ):  # a warning is an error where somebody said so: no sample's fault
            raise
        except Exception as error:
            if is_broken_device(error):
                raise
            is_memory, reason = is_out_of_memory(error), f"{type(error).__name__}: {_first_line(error)}"
        # Outside of the handler, since a traceback keeps the failed batch's arrays alive.
        if is_memory:
            give_memory_back()
            self._fits[bucket] = max(1, len(pictures) // 2)
        if len(pictures) == 1:
            height, width = pictures[0].rgb_HWC.shape[:2]
            return [Rejected(f"{width} x {height} pixels: {reason}", OUT_OF_MEMORY if is_memory else FAILED)]
        half = len(pictures) // 2
        return [*self._try(pictures[:half], bucket), *self._try(pictures[half:], bucket)]

    def _checked(self, pictures: Sequence[Picture]) -> list[Answer]:
        answers = list(self._labeller.label_pictures(pictures))
        if len(answers) != len(pictures):
            raise NetworkError(f"{self._labeller.label}: {len(answers)} labels for {len(pictures)} images")
        return answers


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


def give_memory_back() -> None:
    """Free what the failed batch held, and what torch keeps for later."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no message")[:300]
