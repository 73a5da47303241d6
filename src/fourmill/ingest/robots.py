"""`X-Robots-Tag`: whether a response asks not to be used for datasets.

The header's form is the one that search engines document: directives separated by commas, for everybody, or for one
agent when the line opens with its name (`otherbot: noai, noindex`); a page may send several lines.
"""

import re
from collections.abc import Iterable

# `none` is short for noindex and nofollow.
_REFUSALS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
_WITH_VALUES = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
_AGENT = re.compile(r"[a-z0-9_.*-]+(/[a-z0-9_.-]+)?")  # no blank: "sat, 1 jan 2028 10:00" names nobody
_PRODUCT = re.compile(r"([a-z0-9_.-]+)/", re.IGNORECASE)


def agent_names(user_agent: str) -> frozenset[str]:
    """The names under which a User-Agent is addressed, `*` among them: `fourmill` of `fourmill/0.1 (image builder)`."""
    names = _PRODUCT.findall(user_agent) or user_agent.split()[:1]
    return frozenset({"*", *(name.lower() for name in names)})


def refusal(lines: Iterable[str], agents: frozenset[str]) -> str | None:
    """The first directive that forbids use by one of the agents, None when there is none.

    Args:
        lines: the values of all `X-Robots-Tag` headers of a response.
        agents: lower-case names that are meant by this client, see `agent_names`.
    """
    for line in lines:
        is_for_us = True
        for part in line.lower().split(","):
            name, colon, rest = (piece.strip() for piece in part.partition(":"))
            if colon and name not in _WITH_VALUES and name not in _REFUSALS and _AGENT.fullmatch(name):
                is_for_us = name.partition("/")[0] in agents
                name = rest
            if is_for_us and name in _REFUSALS:
                return name
    return None
