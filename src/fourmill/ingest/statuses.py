"""What can become of a row of the list: a closed set, and which failures a later try may undo."""

from typing import Literal, get_args

FetchStatus = Literal[
    "ok",
    # no response
    "dns",
    "refused_address",
    "connect",
    "timeout",
    # a response that is no use
    "http_404",
    "http_4xx",
    "http_5xx",
    "robots",
    "redirects",
    "too_large",
    "truncated",  # the body ended early, or it is whole and the picture in it is cut
]
"""What can become of a request."""

Status = Literal[
    FetchStatus,
    "duplicate",  # its image has the bytes of an earlier row's
    "opted_out",  # on the opt-out list
    "bad_row",  # no URL to ask for
    # pictures at hand
    "missing",
    "unreadable",
    # bytes that are no picture we can use
    "not_an_image",
    "decode_error",
    "too_many_pixels",
    "too_small",
    "too_elongated",
]

STATUSES: frozenset[str] = frozenset(get_args(Status))

BROKEN_PICTURE: frozenset[str] = frozenset({"not_an_image", "truncated", "decode_error", "too_many_pixels"})
"""Of rows whose bytes arrived: those that could not be decoded."""

MAY_PASS: frozenset[str] = frozenset(
    {"dns", "connect", "timeout", "http_4xx", "http_5xx", "truncated", "missing", "unreadable"}
)
"""Statuses that some rows may leave by another try; `may_pass` says which."""

_MAY_PASS_4XX = frozenset({408, 425, 429})  # request timeout, too early, too many requests


def may_pass(status: str, http_status: int | None, arrived: bool) -> bool:
    """Whether another try may turn a failure into a picture.

    Names that did not resolve, hosts that did not answer and servers in trouble may; so may files that were not there.
    What a server or a picture definitely is stays: 404, 403, 410, robots, a refused address, broken pictures.

    Args:
        http_status: of the last response; tells "too many requests" from the rest of its class.
        arrived: the whole body was received, so a cut picture is cut at its origin.
    """
    if status == "http_4xx":
        return http_status in _MAY_PASS_4XX
    return status in MAY_PASS and not (status == "truncated" and arrived)
