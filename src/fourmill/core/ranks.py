"""The processes of one data-parallel training: which one this is, and how they come to the same step (torch is imported here).

Each process of `torchrun` (or of `runtime.launch`) takes its share of every batch's rows; losses and gradients are averaged
over all, so every process takes the same step from the same weights. One process is the common case and costs nothing.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

_JOINING = timedelta(hours=6)  # for all to come: each machine hashes its set before, as fast as its disk is
_PATIENCE = timedelta(minutes=10)  # for one that does not come to a step: reading the samples may take some


class RanksError(RuntimeError):
    """A training whose processes are not as many as it wants, or not at the same step."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of a training."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine: the GPU to use
    meeting: Store | None = None  # of several: where they find each other

    @property
    def is_first(self) -> bool:
        """Whether this process reports, keeps checkpoints and publishes."""
        return self.rank == 0

    @property
    def device(self) -> str:
        """The device of this process."""
        return f"cuda:{self.local_rank}" if torch.cuda.is_available() else "cpu"

    def rows(self, batch_size: int) -> range:
        """The rows of a batch that fall to this process.

        Raises:
            ValueError: a batch that cannot be shared evenly.
        """
        if batch_size % self.size:
            raise ValueError(
                f"a batch of {batch_size} cannot be shared by {self.size} processes; choose a multiple of {self.size}"
            )
        return range(self.rank, batch_size, self.size)

    def mean(self, value: Tensor) -> Tensor:
        """A number averaged over all processes; all of them get the same."""
        if self.size == 1:
            return value
        shared = value.detach().clone()
        dist.all_reduce(shared)
        return shared / self.size

    def sum(self, values: Tensor) -> Tensor:
        """Values added up over all processes, in place; all of them get the same."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def from_first(self, values: Tensor) -> Tensor:
        """The first process's values on all of them, in place: for what each would compute a little differently."""
        if self.size > 1:
            dist.broadcast(values, 0)
        return values

    def gather(self, rows: Tensor) -> Tensor:
        """Everybody's rows of a batch, in the batch's own order; see `rows`."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.stack(parts, 1).flatten(0, 1)

    @contextmanager
    def first_alone(self, what: str) -> Iterator[bool]:
        """A block that only the first process has work in, be it for hours: the others wait at its end, with more patience than in a
        sum.

        Args:
            what: the occasion, which is another each time.

        Yields:
            Whether this is the first process.
        """
        yield self.is_first
        if self.meeting is not None and self.is_first:
            self.meeting.set(f"alone/{what}", "")
        elif self.meeting is not None:
            self.meeting.wait([f"alone/{what}"], _JOINING)

    def check_alike(self, step: int, what: str, folder: str) -> None:
        """Make sure that all go on from the same step: only the first keeps checkpoints, the others find them where they look.

        Args:
            what: the model that they train, and
            folder: where its checkpoints are, for the message.

        Raises:
            RanksError: they would not; the same on all of them.
        """
        steps = self.gather(torch.tensor([step], device=self.device)).tolist()
        if len(set(steps)) > 1:
            found = ", ".join(f"rank {rank} at {step}" for rank, step in enumerate(steps))
            raise RanksError(
                f"{what}: the processes would go on from different steps ({found}): not all of them see the checkpoint in "
                f"{folder}. Use a folder that all machines share (the project's `scratch`)"
            )

    def take(self, values_BNX: Tensor, picks: Tensor) -> Tensor:
        """Some of a batch's values, wherever their rows are: `gather(values).flatten(0, 1)[picks]`, sending only what is picked.

        Args:
            values_BNX: of this process's rows, N for each.
            picks: indices into the whole batch's values, equal on all processes.
        """
        flat, num = values_BNX.flatten(0, 1), values_BNX.shape[1]
        if self.size == 1:
            return flat[picks]
        row, place = picks // num, picks % num
        found = flat[row // self.size * num + place]
        return self.sum(torch.where((row % self.size == self.rank)[:, None], found, 0.0))

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its mean over all processes; one that took no part on any of them counts as zero."""
        if self.size == 1:
            return
        trained = [p for p in parameters if p.requires_grad]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [parameter.grad for parameter in trained if parameter.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        flat /= self.size
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view(grad.shape))  # into its own memory: fused optimisers want it laid out as the weight is


def require_ranks(wanted: int, what: str, module: str) -> None:
    """Make sure that as many processes are to join as are wanted; the arguments are those of `join_ranks`.

    Raises:
        RanksError: there are more or fewer.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size != wanted:
        raise RanksError(
            f"{what} is to be trained by {wanted} processes and there are {size}: start it with "
            f"`torchrun --standalone --nproc-per-node {wanted} -m {module} --spec FILE`"
        )


@contextmanager
def join_ranks(wanted: int, what: str, module: str) -> Iterator[Ranks]:
    """The processes that torchrun's variables name, connected while the block runs; one process without them.

    Args:
        wanted: how many there have to be.
        what: the model that they train, and
        module: the program that they run, both for the error.

    Raises:
        RanksError: there are more or fewer, or some do not come.
    """
    require_ranks(wanted, what, module)
    if wanted == 1:
        yield Ranks()
        return
    ranks = Ranks(int(os.environ["RANK"]), wanted, int(os.environ.get("LOCAL_RANK", "0")))
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    meeting = _met(ranks, what)
    dist.init_process_group(backend, store=meeting, rank=ranks.rank, world_size=wanted, timeout=_PATIENCE)
    # Not after an error: nccl would wait here for the others, who wait in a sum for this process, and the error would wait with it.
    # `core.program` tells it and ends the process.
    yield replace(ranks, meeting=meeting)
    dist.destroy_process_group()


def _met(ranks: Ranks, what: str) -> Store:
    """Where the processes of a training find each other, once all have come: what follows needs little patience."""
    try:
        meeting, _, _ = next(rendezvous("env://", ranks.rank, ranks.size, timeout=_JOINING))
        meeting.set(f"come/{ranks.rank}", "")
        meeting.wait([f"come/{rank}" for rank in range(ranks.size)], _JOINING)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise RanksError(
            f"{what}: not all of its {ranks.size} processes came within {_JOINING}, says rank {ranks.rank} ({error}). Look for "
            "those that failed in the log, and start all of them again"
        ) from error
    meeting.set_timeout(_PATIENCE)
    return meeting


ALONE = Ranks()
"""The one process of a training that is not shared."""
