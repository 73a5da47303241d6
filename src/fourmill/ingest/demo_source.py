"""The demo's list and pictures: rendered scenes behind URLs, with the faults that every list of the open web has."""

import io
import json
import logging
import multiprocessing
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

DEMO_HOST = "scenes.fourmill.test"  # .test never resolves; the downloader is told where to connect instead

_LOG = logging.getLogger(__name__)
_VERSION = 1
_WORKERS = 2
_SHARES = {"dead": 0.03, "cut": 0.015, "html": 0.015, "copy": 0.02}  # of the rows; with two bad rows about 8 %
_HTML = b"<!doctype html><title>Gone</title><p>This picture is no longer here.\n"
_NAME = re.compile(r"^/images/([0-9A-Za-z_-]+\.(?:jpg|png))$")


@dataclass(frozen=True)
class _Row:
    """What one row of the list is: a fault, or the scene behind it (a copy has an earlier row's)."""

    row: int
    kind: str  # good, dead, cut, html, copy, no_tab, ftp
    scene: int


def write_demo_list(
    folder: Path, num_rows: int, size_px: int, seed: int, url_base: str, progress: Callable[[int, int, str], None]
) -> Path:
    """Render scenes to `folder/images/NNNNNN.jpg` and write `folder/list.tsv`, one `URL<TAB>caption` a row.

    About 8 % of the rows are bad, spread by the seed: dead links, cut JPEGs, HTML pages named .jpg, exact copies of an
    earlier row's picture under a URL of their own, a row without a tab and one with an ftp URL. Every picture is a
    4:4:4 JPEG with the scene's JSON as its comment. A folder that holds the same list already is left as it is; one
    that was left half-way is completed; one with other parameters is made anew.

    Args:
        size_px: side of the pictures, pixels.
        url_base: what the URLs begin with; `images/NNNNNN.jpg` is added.
        progress: called with (rows done, rows in all, a note).

    Returns:
        The path of the list.

    Raises:
        ValueError: no rows or no pixels.
    """
    if num_rows < 1 or size_px < 8:
        raise ValueError(f"a demo list of {num_rows} rows at {size_px} px; it takes at least 1 row and 8 px")
    from fourmill.core.scene import SCENE_VERSION

    url_base = url_base.rstrip("/") + "/"
    made_with = json.dumps(
        {
            "num_rows": num_rows,
            "size_px": size_px,
            "seed": seed,
            "url_base": url_base,
            "scenes": str(SCENE_VERSION),
            "version": _VERSION,
        },
        sort_keys=True,
    )
    target, done_file, started_file = folder / "list.tsv", folder / "done.json", folder / "started.json"
    if target.is_file() and _holds(done_file, made_with):
        return target
    if not _holds(started_file, made_with):
        shutil.rmtree(folder / "images", ignore_errors=True)
        for stale in (done_file, target):
            stale.unlink(missing_ok=True)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    _publish(started_file, made_with.encode())
    rows = plan_rows(num_rows, seed)
    captions = _render_all(folder / "images", rows, size_px, seed, progress)
    lines = [_line(row, url_base, captions[row.row]) for row in rows]
    _publish(target, "".join(f"{line}\n" for line in lines).encode())
    _publish(done_file, made_with.encode())
    _LOG.info("wrote %d rows to %s", num_rows, target)
    return target


def plan_rows(num_rows: int, seed: int) -> list[_Row]:
    """Which row is what: counts fixed by `num_rows`, places by the seed. Row 0 is always good."""
    rng = np.random.default_rng([seed, num_rows])
    order = (1 + rng.permutation(num_rows - 1)).tolist()
    kinds = {order.pop(): kind for kind in ("no_tab", "ftp") if order}
    for kind, share in _SHARES.items():
        for _ in range(min(round(share * num_rows), len(order))):
            kinds[order.pop()] = kind
    good = np.array([row for row in range(num_rows) if row not in kinds])
    rows: list[_Row] = []
    for row in range(num_rows):
        kind = kinds.get(row, "good")
        earlier = int(np.searchsorted(good, row))
        rows.append(_Row(row, kind, int(good[rng.integers(earlier)]) if kind == "copy" else row))
    return rows


@contextmanager
def serve_folder(folder: Path) -> Iterator[int]:
    """Serve `folder/images/X` at `/images/X` on a free port of 127.0.0.1, HTTP/1.1 with keep-alive; yields the port."""
    handler = type("FolderHandler", (_Handler,), {"folder": folder})
    with _Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="scenes", daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        _LOG.debug("a client at %s left early", client_address)


class _Handler(BaseHTTPRequestHandler):
    folder: Path
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body in one packet
    timeout = 60  # seconds an idle connection is kept

    def do_GET(self) -> None:
        match = _NAME.match(self.path)
        try:
            body = (self.folder / "images" / match[1]).read_bytes() if match else None
        except FileNotFoundError:
            body = None
        self.send_response(200 if body is not None else 404)
        if body is not None and match:
            self.send_header("Content-Type", "image/png" if match[1].endswith("png") else "image/jpeg")
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (the base class's name)
        _LOG.debug(format, *args)


def _render_all(
    images: Path, rows: list[_Row], size_px: int, seed: int, progress: Callable[[int, int, str], None]
) -> list[str]:
    jobs = [(str(images), row, size_px, seed) for row in rows]
    captions: list[str] = []
    # spawn: the caller may hold threads (a server, a progress display), which a fork would copy half-way
    context = multiprocessing.get_context("spawn")
    ignoring = (signal.SIGINT, signal.SIG_IGN)  # the caller ends them, and says so
    with context.Pool(min(_WORKERS, len(rows)), signal.signal, ignoring) as pool:
        for text in pool.imap(_make_row, jobs, chunksize=16):
            captions.append(text)
            if len(captions) % 50 == 0 or len(captions) == len(rows):
                progress(len(captions), len(rows), f"{len(captions)} of {len(rows)} rows rendered")
        pool.close()
        pool.join()
    return captions


def _make_row(job: tuple[str, _Row, int, int]) -> str:
    from fourmill.core.scene import caption, render, sample_scene

    folder, row, size_px, seed = job
    scene = sample_scene(np.random.default_rng([seed, row.scene]))
    path = Path(folder) / _image_name(row)
    if row.kind in ("good", "copy", "cut", "html") and not path.exists():
        data = _HTML
        if row.kind != "html":
            sink = io.BytesIO()
            picture = Image.fromarray(render(scene, size_px).rgb_HWC)
            picture.save(sink, "JPEG", quality=95, subsampling=0, comment=scene.model_dump_json().encode())
            data = sink.getvalue()
        _publish(path, data[: len(data) * 4 // 5] if row.kind == "cut" else data)
    return caption(scene, row.row)


def _image_name(row: _Row) -> str:
    return f"{row.row:06d}.jpg"


def _line(row: _Row, url_base: str, text: str) -> str:
    url = f"{url_base}images/{_image_name(row)}"
    if row.kind == "no_tab":
        return f"{url} {text}"
    if row.kind == "ftp":
        url = "ftp://" + url.partition("://")[2]
    return f"{url}\t{text}"


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text() == text


def _publish(path: Path, data: bytes) -> None:
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_bytes(data)
    draft.replace(path)
