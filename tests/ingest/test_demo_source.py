import http.client
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from fourmill.core.scene import Scene
from fourmill.ingest.demo_source import DEMO_HOST, plan_rows, serve_folder, write_demo_list

SIZE = 24
BASE = f"http://{DEMO_HOST}/"


def nothing(done: int, total: int, note: str) -> None:
    pass


def write(folder: Path, num_rows: int = 60, progress=nothing, seed: int = 3) -> Path:
    return write_demo_list(folder, num_rows, SIZE, seed, BASE, progress)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("num_rows", [1, 2, 3, 50, 400, 4000])
def test_about_eight_percent_is_bad(num_rows: int) -> None:
    rows = plan_rows(num_rows, 0)
    kinds = Counter(row.kind for row in rows)
    assert [row.row for row in rows] == list(range(num_rows)) and rows[0].kind == "good"
    if num_rows >= 400:
        assert 0.07 < 1 - kinds["good"] / num_rows < 0.09
        assert set(kinds) == {"good", "dead", "cut", "html", "copy", "no_tab", "ftp"}
    assert all(rows[row.scene].kind == "good" and row.scene < row.row for row in rows if row.kind == "copy")
    assert rows == plan_rows(num_rows, 0)
    assert num_rows < 50 or rows != plan_rows(num_rows, 1)


def test_pictures_and_list_agree(demo: Path) -> None:
    lines = (demo / "list.tsv").read_text().splitlines()
    rows = plan_rows(60, 3)
    assert len(lines) == 60
    for row, line in zip(rows, lines, strict=True):
        path = demo / "images" / f"{row.row:06d}.jpg"
        if row.kind == "no_tab":
            assert "\t" not in line
            continue
        url, caption = line.split("\t")
        assert caption and url.startswith("ftp://" if row.kind == "ftp" else BASE)
        assert path.exists() == (row.kind in ("good", "copy", "cut", "html"))
        if row.kind == "copy":
            assert path.read_bytes() == (demo / "images" / f"{row.scene:06d}.jpg").read_bytes()
        if row.kind == "good":
            with Image.open(path) as image:
                assert image.size == (SIZE, SIZE) and image.mode == "RGB"
                Scene.model_validate(json.loads(image.info["comment"]))
        if row.kind == "cut":
            with pytest.raises(OSError, match=r"(?i)truncated"), Image.open(path) as image:
                image.load()


def test_a_finished_list_is_left_alone_and_a_broken_one_completed(demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    calls: list[tuple[int, int]] = []
    write(folder, progress=lambda done, total, note: calls.append((done, total)))
    assert calls[-1] == (60, 60)
    assert contents(folder) == contents(demo)  # another folder, another time, the same bytes
    calls.clear()
    write(folder, progress=lambda done, total, note: calls.append((done, total)))
    assert calls == []
    kept = folder / "images" / "000000.jpg"
    stamp = kept.stat().st_mtime_ns
    for lost in ("done.json", "list.tsv", f"images/{_last_good(folder)}"):
        (folder / lost).unlink()
    write(folder)
    assert contents(folder) == contents(demo) and kept.stat().st_mtime_ns == stamp


def test_other_parameters_start_anew(tmp_path: Path) -> None:
    write(tmp_path, num_rows=6)
    first = contents(tmp_path)
    write(tmp_path, num_rows=3, seed=4)
    second = contents(tmp_path)
    assert len((tmp_path / "list.tsv").read_text().splitlines()) == 3
    assert all(second.get(path) != data for path, data in first.items())
    with pytest.raises(ValueError, match="0 rows"):
        write(tmp_path, num_rows=0)


def _last_good(folder: Path) -> str:
    return max(path.name for path in (folder / "images").iterdir())


def test_the_folder_is_served_and_nothing_else(demo: Path) -> None:
    with serve_folder(demo) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        wanted = {
            "/images/000000.jpg": 200,
            "/images/999999.jpg": 404,
            "/list.tsv": 404,
            "/images/../list.tsv": 404,
            "/images/%2e%2e/list.tsv": 404,
            "/images/": 404,
            "/": 404,
        }
        sockets = set()
        for path, status in wanted.items():
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
            assert response.status == status and len(body) == int(response.headers["Content-Length"])
            if status == 200:
                assert body == (demo / path[1:]).read_bytes() and response.headers["Content-Type"] == "image/jpeg"
            sockets.add(id(connection.sock))
        assert len(sockets) == 1  # kept alive
        connection.close()
