"""The loop of downloads, where it does not do what asyncio's own does."""

import asyncio
import gc
import os
import socket
from collections.abc import Iterator
from typing import BinaryIO

import pytest

from fourmill.ingest.event_loop import LoopThread


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    thread = LoopThread("loop-test")
    yield thread
    thread.close()


@pytest.mark.parametrize("steps", range(4))
def test_a_connection_that_is_given_up_closes_nobody_elses_file(loop: LoopThread, steps: int) -> None:
    """uvloop before 0.23 closed its descriptor twice; the second time it may be that of a tar."""

    async def given_up(address: tuple[str, int]) -> None:
        one = socket.socket()
        one.setblocking(False)
        await loop.loop.sock_connect(one, address)
        making = asyncio.ensure_future(loop.loop.create_connection(asyncio.Protocol, sock=one))
        for _ in range(steps):
            await asyncio.sleep(0)
        making.cancel()
        done = (await asyncio.gather(making, return_exceptions=True))[0]
        if isinstance(done, tuple):
            done[0].close()
        for _ in range(3):
            await asyncio.sleep(0)  # the loop closes the connection
        files.append(open(os.devnull, "rb"))  # takes its descriptor; now `one` goes

    files: list[BinaryIO] = []
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        for _ in range(20):
            loop.run(given_up(server.getsockname()[:2]))
            gc.collect()
    for file in files:
        os.fstat(file.fileno())
        file.close()
