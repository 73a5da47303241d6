"""The opt-out list: domains, URLs and digests of images that must not be in the data set.

A text file, one entry a line: `domain:example.org` (its subdomains too), `url:https://example.org/a.jpg` (http or
https), `sha256:` and 64 hex digits (of the image as stored, or as it was received). The bare forms `example.org`,
`https://example.org/a.jpg` and 64 hex digits mean the same. Empty lines and lines that begin with `#` say nothing.
Of tars that img2dataset made, domains and URLs name what was downloaded from there.

What a shard depends on is only the entries that match its rows: `entries_of` finds them, and their digest is an input of
the shard's recipe when there are any. So a changed list makes stale just the shards that hold what it names. All of the
list is held in memory, about 150 bytes an entry, and every row is looked up in constant time: n rows and m entries cost
n + m steps. A run reads the file once and publishes what it read under `source/opt_out/`, where its workers find it.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fourmill.core.digest import digest_bytes, digest_json
from fourmill.core.names import sample_key
from fourmill.core.store import Store, open_store

INPUT = "opt_out"  # name of the recipe's input

_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_DOMAIN = re.compile(r"(?!-)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
_PORTS = ("", "80", "443")


@dataclass(frozen=True)
class OptOut:
    """A list that has been read."""

    domains: frozenset[str] = frozenset()
    urls: frozenset[str] = frozenset()
    digests: frozenset[bytes] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.domains or self.urls or self.digests)

    @property
    def text(self) -> str:
        """The entries in the long form, sorted, a line each."""
        lines = [
            *(f"domain:{domain}" for domain in self.domains),
            *(f"url:{url}" for url in self.urls),
            *(f"sha256:{digest.hex()}" for digest in self.digests),
        ]
        return "".join(f"{line}\n" for line in sorted(lines))

    @property
    def digest(self) -> str:
        """Digest of the entries; comments, order and form of writing do not count."""
        return digest_bytes(self.text.encode())

    def entry_for(self, urls: Iterable[str | None], digests: Iterable[str | None]) -> str | None:
        """The first entry that names one of these, None when there is none.

        Args:
            urls: where an image is asked for and where it was found.
            digests: sha256, 64 hex digits.
        """
        for url in filter(None, urls):
            host, plain = _host_and_plain(url)
            if plain in self.urls:
                return f"url:{plain}"
            while host:
                if host in self.domains:
                    return f"domain:{host}"
                host = host.partition(".")[2]
        for digest in filter(None, digests):
            if bytes.fromhex(digest) in self.digests:
                return f"sha256:{digest}"
        return None


def parse_opt_out(text: str, where: str = "opt-out list") -> OptOut:
    """Read the lines of a list.

    Raises:
        ValueError: a line that is no entry; nothing is passed over in silence.
    """
    kinds: dict[str, set[str]] = {"domain": set(), "url": set(), "sha256": set()}
    for number, line in enumerate(text.split("\n"), start=1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        kind, value = _entry(entry)
        if value is None:
            raise ValueError(
                f"{where}, line {number}: {entry[:200]!r} is no entry; write domain:example.org, "
                "url:https://example.org/a.jpg or sha256: and 64 hex digits"
            )
        kinds[kind].add(value)
    return OptOut(frozenset(kinds["domain"]), frozenset(kinds["url"]), frozenset(map(bytes.fromhex, kinds["sha256"])))


def read_opt_out(path: str | None) -> OptOut:
    """The list at a path; an empty one when no path is given.

    Raises:
        ValueError: it cannot be read, is not UTF-8, or holds a line that is no entry.
    """
    if path is None:
        return OptOut()
    try:
        return parse_opt_out(Path(path).read_bytes().decode("utf-8-sig"), f"opt-out list {path}")
    except OSError as error:
        raise ValueError(
            f"the opt-out list {path!r} cannot be read ({error.strerror}); mend its path in ingest.opt_out, or take it out"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the opt-out list {path!r} is not UTF-8 at byte {error.start}; save it as UTF-8") from error


def publish_opt_out(store: Store, opt_out: OptOut) -> str:
    """Put a list where workers find it; returns its digest, "" for an empty one."""
    if not opt_out:
        return ""
    digest = opt_out.digest
    if not store.exists(_path(digest)):
        store.write(_path(digest), opt_out.text.encode())
    return digest


@lru_cache(maxsize=2)
def published_opt_out(store_root: str, digest: str) -> OptOut:
    """A published list. Raises FileNotFoundError when there is none of this digest."""
    return parse_opt_out(open_store(store_root).read(_path(digest)).decode()) if digest else OptOut()


def entries_of(
    opt_out: OptOut, listed: Iterable[Mapping[str, Any]], ledger: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    """Which entry names which row, by sample key.

    Args:
        listed: rows of the source index; the `origin` of a picture at hand counts as its URL does.
        ledger: by key, rows of an earlier run (`url`, `final_url`, `sha256`, `source_sha256`); those whose URL is not
            the listed one any more do not count.
    """
    found: dict[str, str] = {}
    if not opt_out:
        return found
    for row in listed:
        if row["status"] != "ok":
            continue
        key = sample_key(row["row"])
        before = ledger.get(key, {})
        if before.get("url") != row["url"]:
            before = {}
        if row.get("origin"):
            before = {**before, "final_url": row["origin"]}
        entry = entry_of(opt_out, row["url"], before)
        if entry:
            found[key] = entry
    return found


def entry_of(opt_out: OptOut, url: str, found: Mapping[str, Any]) -> str | None:
    """The entry that names a row by its URL and by what was found there."""
    return opt_out.entry_for(
        (url, found.get("final_url")),
        (found.get("sha256"), found.get("source_sha256")),
    )


def input_digest(entries: Mapping[str, str]) -> str:
    """Digest of the entries that match a shard, for its recipe."""
    return digest_json(sorted([key, entry] for key, entry in entries.items()))


def _entry(entry: str) -> tuple[str, str | None]:
    kind, colon, value = entry.partition(":")
    if not colon or kind not in ("domain", "url", "sha256"):
        kind, value = _bare_kind(entry), entry
    value = value.strip()
    if kind == "sha256":
        return kind, value.lower() if _DIGEST.fullmatch(value) else None
    if kind == "domain":
        domain = _plain_host(value.removeprefix("*."))
        return kind, domain if _DOMAIN.fullmatch(domain) else None
    host, plain = _host_and_plain(value)
    return kind, plain if host or value.startswith(("file:", "tar:")) else None


def _bare_kind(entry: str) -> str:
    if _DIGEST.fullmatch(entry):
        return "sha256"
    return "url" if ":" in entry or "/" in entry else "domain"


def _host_and_plain(url: str) -> tuple[str, str]:
    """Host of a URL, and the URL without scheme, credentials, default port and fragment; "" and itself for no web URL."""
    try:
        parts = urlsplit(url)
        host, port = _plain_host(parts.hostname or ""), str(parts.port or "")
    except ValueError:
        return "", url
    if not host or parts.scheme.lower() not in ("http", "https", ""):
        return "", url
    query = f"?{parts.query}" if parts.query else ""
    return host, f"//{host}{'' if port in _PORTS else f':{port}'}{parts.path or '/'}{query}"


def _plain_host(host: str) -> str:
    host = host.strip().rstrip(".").lower()
    if host.isascii():
        return host
    try:
        return host.encode("idna").decode()
    except UnicodeError:
        return host


def _path(digest: str) -> str:
    return f"source/opt_out/{digest}.txt"
