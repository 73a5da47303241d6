"""Whether weights from a file are exactly those of a network: every key that is missing, unknown or of another shape; their digest."""

from collections.abc import Mapping
from typing import Any, Protocol

from fourmill.core.digest import digest_bytes, digest_json


class HasShape(Protocol):
    """A tensor or an array."""

    @property
    def shape(self) -> tuple[int, ...]: ...


Shape = tuple[int, ...]

_MOST_SHOWN = 8  # problems in an error


def shapes(state: Mapping[str, HasShape]) -> dict[str, Shape]:
    """The shape of every tensor of a state dict."""
    return {key: tuple(value.shape) for key, value in state.items()}


def key_problems(found: Mapping[str, HasShape], wanted: Mapping[str, Shape]) -> list[str]:
    """One line a key that does not fit, in a file's state dict beside a network's shapes; none when all do."""
    here = shapes(found)
    return [
        *(f"{key}: missing, expected {wanted[key]}" for key in sorted(wanted.keys() - here.keys())),
        *(f"{key}: unknown" for key in sorted(here.keys() - wanted.keys())),
        *(
            f"{key}: shape {here[key]}, expected {wanted[key]}"
            for key in sorted(here.keys() & wanted.keys())
            if here[key] != wanted[key]
        ),
    ]


def weights_digest(weights: bytes, config: Mapping[str, Any]) -> str:
    """Digest of a stored network: of its weights' file and the values of its config.json. Its folder bears it as name."""
    return digest_json([digest_bytes(weights), config])


def shown_problems(problems: list[str]) -> str:
    """The first of them, and how many more there are."""
    more = f"; and {len(problems) - _MOST_SHOWN} more" if len(problems) > _MOST_SHOWN else ""
    return "; ".join(problems[:_MOST_SHOWN]) + more
