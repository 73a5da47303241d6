"""How work over shards goes: what the note beside a progress bar says."""

import time
from collections import Counter
from collections.abc import Callable, Mapping

from fourmill.core.shards import Receipt

_CLASSES = 3  # named in a note, the most frequent ones


class Pace:
    """Rows a second, the share that is ok, the rest by class, and the time left, from the receipts of finished shards.

    A shard is the smallest step that is seen, so the rate is that of whole shards since the work began.
    """

    def __init__(
        self,
        num_shards: int,
        clock: Callable[[], float] = time.monotonic,
        unit: str = "rows",
    ) -> None:
        """Start the clock.

        Args:
            num_shards: shards to be made in all.
            clock: seconds.
            unit: what the rows are called.
        """
        self._num_shards = num_shards
        self._clock = clock
        self._unit = unit
        self._start = clock()
        self._elapsed = 0.0
        self._done = 0
        self._counts: Counter[str] = Counter()
        self._worked_s = 0.0  # by workers that tell how their time was spent
        self._spent: Counter[str] = Counter()  # seconds of it

    def note(self, receipt: Receipt, shares: Mapping[str, float] | None = None, num_workers: int | None = None) -> str:
        """Count a finished shard and say how it goes: `412 rows/s, 71.3 % ok, http_404 12.0 %, timeout 9.1 %, 3 min left`.

        Args:
            shares: of the shard's time, by what it was spent on: `network 93.0 %` follows the rate.
            num_workers: that are up.
        """
        self._done += 1
        self._counts.update(receipt.counts)
        self._elapsed = max(self._clock() - self._start, 1e-6)
        if shares:
            self._worked_s += receipt.seconds
            self._spent.update({name: share * receipt.seconds for name, share in shares.items()})
        rows = self._counts.total()
        rate = f"{rows / self._elapsed:.3g}" if rows < 1000 * self._elapsed else f"{rows / self._elapsed:.0f}"
        said = [f"{rate} {self._unit}/s", *(f"{name} {share:.1%}" for name, share in self._shares().items())]
        if rows:
            ordered = sorted(self._counts.items(), key=lambda count: (-count[1], count[0]))
            failures = [f"{name} {num / rows:.1%}" for name, num in ordered if name != "ok"][:_CLASSES]
            said += [f"{self._counts['ok'] / rows:.1%} ok", *failures]
        if num_workers is not None:
            said.append(f"{num_workers} worker{'s' * (num_workers != 1)}")
        if self._done < self._num_shards:
            said.append(f"{duration(self._elapsed * (self._num_shards - self._done) / self._done)} left")
        return ", ".join(said).replace("%", " %")

    def facts(self) -> dict[str, float]:
        """Figures of the work so far, by name; none before the first shard."""
        if not self._done:
            return {}
        rate = {f"{self._unit}_per_second": round(self._counts.total() / self._elapsed, 3)}
        return rate | {f"{name}_share": round(share, 4) for name, share in self._shares().items()}

    def _shares(self) -> dict[str, float]:
        return {name: spent / max(self._worked_s, 1e-9) for name, spent in sorted(self._spent.items())}


def duration(seconds: float) -> str:
    """Some time in words: `42 s`, `12 min`, `3 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
