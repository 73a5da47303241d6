"""How work over shards goes: what the note beside a progress bar says."""

import time
from collections import Counter
from collections.abc import Callable

from fourmill.core.shards import Receipt

_CLASSES = 3  # named in a note, the most frequent ones


class Pace:
    """Rows a second, the share that is ok, the rest by class, and the time left, from the receipts of finished shards.

    A shard is the smallest step that is seen, so the rate is that of whole shards since the work began.
    """

    def __init__(self, num_shards: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the clock.

        Args:
            num_shards: shards to be made in all.
            clock: seconds.
        """
        self._num_shards = num_shards
        self._clock = clock
        self._start = clock()
        self._done = 0
        self._counts: Counter[str] = Counter()

    def note(self, receipt: Receipt) -> str:
        """Count a finished shard and say how it goes: `412 rows/s, 71.3 % ok, http_404 12.0 %, timeout 9.1 %, 3 min left`."""
        self._done += 1
        self._counts.update(receipt.counts)
        rows, elapsed = self._counts.total(), max(self._clock() - self._start, 1e-6)
        left = elapsed * (self._num_shards - self._done) / self._done
        said = [f"{rows / elapsed:.3g} rows/s" if rows < 1000 * elapsed else f"{rows / elapsed:.0f} rows/s"]
        if rows:
            ordered = sorted(self._counts.items(), key=lambda count: (-count[1], count[0]))
            failures = [f"{name} {num / rows:.1%}" for name, num in ordered if name != "ok"][:_CLASSES]
            said += [f"{self._counts['ok'] / rows:.1%} ok", *failures]
        if self._done < self._num_shards:
            said.append(f"{_duration(left)} left")
        return ", ".join(said).replace("%", " %")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
