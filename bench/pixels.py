"""One picture decoded, reduced and encoded again: this project's path beside Pillow's and OpenCV's. CPU time, in turns."""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from bench.ingest_site import make_large
from bench.report import report
from fourmill.ingest.config import IngestConfig
from fourmill.ingest.image import normalise
from fourmill.ingest.pixels import reduced_size, use_one_thread

_SIZES = [(600, 450), (1024, 768), (1632, 1224), (2048, 1536)]
_BOUNDS = [256, 768]
_QUALITY = 95


def _ours(data: bytes, bound: int) -> object:
    return normalise(data, IngestConfig(max_side_px=bound, jpeg_quality=_QUALITY)).jpeg


def _pillow(data: bytes, bound: int) -> object:
    image = Image.open(io.BytesIO(data))
    small = image.resize(reduced_size(*image.size, bound), Image.Resampling.BOX)
    small.save(io.BytesIO(), "JPEG", quality=_QUALITY)
    return small


def _opencv(data: bytes, bound: int) -> object:
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert bgr is not None
    small = cv2.resize(bgr, reduced_size(bgr.shape[1], bgr.shape[0], bound), interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])[1]


def _cpu_ms(work: Callable[[bytes, int], object], pictures: list[bytes], bound: int) -> float:
    start = time.process_time()
    for data in pictures:
        work(data, bound)
    return (time.process_time() - start) / len(pictures) * 1e3


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and pictures; ends within a minute")
    given = parser.parse_args()
    rounds, count = (3, 4) if given.quick else (9, 16)
    use_one_thread()
    rows, figures = [], {}
    for width, height in _SIZES:
        with tempfile.TemporaryDirectory() as folder:
            make_large(Path(folder), count, (width, height))
            pictures = [path.read_bytes() for path in sorted(Path(folder).iterdir())]
        for bound in _BOUNDS:
            turns = [[_cpu_ms(side, pictures, bound) for side in (_ours, _opencv, _pillow)] for _ in range(rounds)]
            ours, opencv, pillow = (statistics.median(side) for side in zip(*turns, strict=True))
            kilobytes = sum(map(len, pictures)) / count / 1e3
            rows.append((f"{width} x {height}, {kilobytes:.0f} kB", bound, ours, opencv, pillow, ours / opencv))
            figures[f"cpu_cost_ratio_{width}_to_{bound}"] = ours / opencv
    report("pixels", ["picture", "bound", "ours, ms", "OpenCV", "Pillow", "ours / OpenCV"], rows, figures)


if __name__ == "__main__":
    main()
