"""What tells a wrong network: values that are not finite, and answers that do not depend on what is seen.

B images, C channels, N places.
"""

from collections.abc import Sequence
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fourmill.core.labels import Picture
from fourmill.pseudolabel.labeller import NetworkError, has_content

_BELOW_1 = 1 - 2**-24  # the greatest float32 that is
_SAME = 1e-5  # relative: the same computation, in other rows of a batch
_FIRST_SIZES = 32  # of images whose answers are remembered until a network has shown that it is alive
_IN_A_ROW = 8  # images with content in which a network that was alive sees nothing: it is not any more
_ANCHOR_SIZES = 5  # at most: detectors place their anchors on as many levels


def finite_share(output_B: Tensor) -> Tensor:
    """Share of each image's values that are finite, (B,) float32, left on the device; for `check_finite`.

    Below 1 if any is not: one of 16 million would be lost in a mean of float32.
    """
    lost_B = (~torch.isfinite(output_B)).flatten(1).sum(1)
    share_B = 1 - lost_B / max(1, output_B[:1].numel())
    return torch.where(lost_B > 0, share_B.clamp(max=_BELOW_1), 1.0)


def check_finite(what: str, share_B: NDArray[np.float32], weights: str) -> None:
    """A network's output is finite, by `finite_share` of it.

    Raises:
        NetworkError: it is not.
    """
    if (share_B < 1).any():
        raise NetworkError(
            f"{what} from {weights} is not finite in {1 - share_B.mean():.1%} of its values: broken weights or precision"
        )


def facts_of(output_BCN: Tensor) -> Tensor:
    """What `Watch` wants to know of each image's output: (B, 5) float32, left on the device, to be fetched with the labels.

    Share of finite values; whether each channel is one number over all places; least, greatest and mean value.

    Args:
        output_BCN: C channels at N places.
    """
    least_BC, most_BC = output_BCN.amin(2), output_BCN.amax(2)
    constant_B = (least_BC == most_BC).all(1)
    columns = [constant_B.float(), least_BC.amin(1), most_BC.amax(1), output_BCN.flatten(1).mean(1)]
    return torch.stack([finite_share(output_BCN), *columns], 1)


def facts_of_boxes(boxes_BQ4: Tensor) -> Tensor:
    """`facts_of` boxes; constant are those of an image that have no sizes but their anchors', one for each level.

    Args:
        boxes_BQ4: Q boxes as centre and size.
    """
    sizes_BQ = boxes_BQ4[..., 2].sort(1).values
    num_sizes_B = 1 + (sizes_BQ.diff(dim=1) > 0).sum(1)
    facts_BX = facts_of(boxes_BQ4.transpose(1, 2))
    few = min(_ANCHOR_SIZES, max(1, boxes_BQ4.shape[1] - 1))
    facts_BX[:, 1] = (num_sizes_B <= few).float()
    return facts_BX


class Watch:
    """Tells a dead network from an odd image: one sees nothing in any image that has content, the other is met now and then.

    A network whose last layer is dead gives the same number everywhere; one that is dead further inside may give a pattern, of
    borders or positions, but the same for every image. It counts as alive once two images have had different answers. Until
    then, two images in which it saw nothing stop the work, and afterwards eight in a row; whoever knows where a shard ends asks
    again there (`items`).
    """

    def __init__(self, what: str, weights: str) -> None:
        self._what, self._weights = what, weights
        self._lock = Lock()
        self._is_alive = False
        self._num_constant = 0
        self._in_a_row = 0  # of them, since the last image in which something was seen
        self._first: dict[tuple[int, ...], tuple[NDArray[np.uint8], NDArray[np.float32]]] = {}  # by size fed

    def check(
        self, pictures: Sequence[Picture], fed: Sequence[NDArray[np.uint8]], facts_BX: NDArray[np.float32]
    ) -> list[bool]:
        """For each image, whether the output is constant though the image is not: then it has no label.

        Args:
            fed: the images as the network saw them, of one size.
            facts_BX: `facts_of` the output.

        Raises:
            NetworkError: the output is not finite, or the network sees nothing in any image.
        """
        check_finite(self._what, facts_BX[:, 0], self._weights)
        dead: list[bool] = []
        for picture, rgb_HWC, facts in zip(pictures, fed, facts_BX, strict=True):
            is_constant = bool(facts[1])
            relevant = (is_constant or self._in_a_row > 0 or not self._is_alive) and has_content(picture)
            dead.append(is_constant and relevant)
            if relevant:
                with self._lock:
                    self._learn(rgb_HWC, is_constant, facts)
        return dead

    def _learn(self, rgb_HWC: NDArray[np.uint8], is_constant: bool, facts: NDArray[np.float32]) -> None:
        if is_constant:
            self._num_constant += 1
            self._in_a_row += 1
            seen, most = (self._in_a_row, _IN_A_ROW) if self._is_alive else (self._num_constant, 2)
            if seen >= most:
                raise NetworkError(
                    f"{self._what} from {self._weights} is constant over each of {seen} images: "
                    "the weights are broken, or are of another network"
                )
            return
        self._in_a_row = 0
        if self._is_alive:
            return
        first_rgb_HWC, first = self._first.setdefault(rgb_HWC.shape, (rgb_HWC, facts))
        if len(self._first) > _FIRST_SIZES:
            self._first.pop(next(iter(self._first)))
        if not np.allclose(first[2:], facts[2:], rtol=_SAME, atol=_SAME * np.abs(facts[2:]).max()):
            self._is_alive = True
            self._first.clear()
        elif np.abs(rgb_HWC.astype(np.int16) - first_rgb_HWC).mean() > 1:  # of 255 levels: not the same image again
            raise NetworkError(
                f"{self._what} from {self._weights} is the same for two different images: the weights are broken, or are of "
                "another network"
            )
