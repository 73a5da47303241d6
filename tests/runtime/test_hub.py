"""Downloads from a hub on loopback that speaks as much of the real one's protocol as its client asks for."""

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fourmill.runtime.hub import HubError, choose_files, fetch_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "dpt"}',
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"the same, as a pickle",
    "README.md": b"words",
}


@pytest.fixture
def hub() -> Iterator[str]:
    """Serves `people/net`, whose card says MIT, and `people/words`, which has no weights."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            path = self.path.split("?")[0]
            headers, body, status = {}, b"", 404
            for repo, files in (("people/net", FILES), ("people/words", {"README.md": b"words"})):
                if path.startswith(f"/api/models/{repo}"):
                    siblings = [{"rfilename": name} for name in files]
                    facts = {"id": repo, "sha": COMMIT, "siblings": siblings, "cardData": {"license": "mit"}}
                    body, status = json.dumps(facts).encode(), 200
                name = path.removeprefix(f"/{repo}/resolve/{COMMIT}/")
                if name in files:
                    body, status = files[name], 200
                    headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def unused_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_config_and_safetensors_are_downloaded_with_commit_and_licence(hub: str, tmp_path: Path) -> None:
    fetched = fetch_weights("people/net", endpoint=hub, cache=tmp_path)
    assert (fetched.commit, fetched.licence) == (COMMIT, "mit")
    assert {path.name: path.read_bytes() for path in fetched.path.iterdir()} == {
        name: FILES[name] for name in ("config.json", "model.safetensors")
    }


def test_what_the_hub_does_not_give_says_how_to_do_without_it(hub: str, tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"no config\.json with weights beside it"):
        fetch_weights("people/words", endpoint=hub, cache=tmp_path)
    with pytest.raises(HubError, match=r"hf:people/gone cannot be had .*give the path of the folder"):
        fetch_weights("people/gone", endpoint=hub, cache=tmp_path)
    with pytest.raises(HubError, match="cannot be had"):
        fetch_weights("not/a/name", endpoint=hub, cache=tmp_path)
    with pytest.raises(HubError, match=r"hf:people/net cannot be had .*give the path of the folder"):
        fetch_weights("people/net", endpoint=f"http://127.0.0.1:{unused_port()}", cache=tmp_path / "other")


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["README.md", "pytorch_model.bin", "config.json"], ["config.json", "pytorch_model.bin"]),
        (["omnidata_depth_dpt_hybrid.pth", "README.md"], ["omnidata_depth_dpt_hybrid.pth"]),
        (["a.pth", "b.pth"], []),
        (["sub/model.safetensors", "config.json"], []),
        (
            ["config.json", "model-1-of-2.safetensors", "model-2-of-2.safetensors", "model.safetensors.index.json"],
            ["config.json", "model-1-of-2.safetensors", "model-2-of-2.safetensors", "model.safetensors.index.json"],
        ),
    ],
)
def test_of_many_files_those_that_are_needed_are_chosen(names: list[str], chosen: list[str]) -> None:
    assert choose_files(names) == chosen
