"""The shard writer against the standard library's tarfile: is own code worth it? CPU time of both in turns, one run."""

import argparse
import io
import statistics
import tarfile
import time

import numpy as np

from bench.report import report
from fourmill.core.names import sample_key
from fourmill.core.tar import TarWriter, read_tar

MEMBERS = 1000


def _ours(members: list[bytes]) -> bytes:
    stream = io.BytesIO()
    writer = TarWriter(stream)
    for row, data in enumerate(members):
        writer.add(sample_key(row), "npy", data)
    writer.close()
    return stream.getvalue()


def _tarfile(members: list[bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for row, data in enumerate(members):
            info = tarfile.TarInfo(f"{sample_key(row)}.npy")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def _cpu_us(work, members: list[bytes]) -> float:
    start = time.process_time()
    work(members)
    return (time.process_time() - start) / len(members) * 1e6


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds; ends within a minute")
    rounds = 5 if parser.parse_args().quick else 25
    rng = np.random.default_rng(0)
    rows, figures = [], {}
    for name, size in (("tokens", 520), ("jpeg", 43_000)):
        members = [rng.bytes(size) for _ in range(MEMBERS)]
        assert [data for _, _, data in read_tar(io.BytesIO(_ours(members)))] == members
        times = [(_cpu_us(_ours, members), _cpu_us(_tarfile, members)) for _ in range(rounds)]
        ours, theirs = (statistics.median(side) for side in zip(*times, strict=True))
        rows.append((f"{name}, {size} bytes", ours, theirs, ours / theirs))
        figures[f"cpu_cost_ratio_{name}"] = ours / theirs
    report(
        "shards",
        ["member", "ours, CPU µs (sha256 included)", "tarfile, CPU µs (no digest)", "ours / theirs"],
        rows,
        figures,
    )


if __name__ == "__main__":
    main()
