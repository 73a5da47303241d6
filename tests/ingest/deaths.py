"""Work that dies at each change of the store in turn."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from fourmill.core.store import LocalStore
from tests.ingest.driven import Ingest


class Killed(BaseException):
    """What the process would not have lived to see."""


def _die_at_change(patch: pytest.MonkeyPatch, number: int) -> None:
    """Make the store's change number `number` (0-based: a file published or deleted) the one that does not happen."""
    left = [number]
    create, delete = LocalStore.create, LocalStore.delete

    def count() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    @contextmanager
    def dying_create(self: LocalStore, path: str):
        with create(self, path) as stream:
            yield stream
            count()

    def dying_delete(self: LocalStore, path: str) -> None:
        count()
        delete(self, path)

    patch.setattr(LocalStore, "create", dying_create)
    patch.setattr(LocalStore, "delete", dying_delete)


@pytest.fixture
def die_at_every_change(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Iterator[int]]:
    """`for _ in die_at_every_change(ingest, prepare, work)`: after `work` died, at each change of the store in turn."""

    def deaths(ingest: Ingest, prepare: Callable[[], object], work: Callable[[], object]) -> Iterator[int]:
        for number in range(200):
            for path in ingest.store.list(""):
                ingest.store.delete(path)
            prepare()
            with monkeypatch.context() as patch:
                _die_at_change(patch, number)
                try:
                    work()
                except Killed:
                    pass
                else:
                    return
            yield number
        raise AssertionError("the work never ended")

    return deaths
