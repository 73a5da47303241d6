"""Which addresses a download may connect to: public ones only, checked after names are resolved."""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor

from aiohttp.abc import AbstractResolver, ResolveResult

_TUNNELS = tuple(ipaddress.ip_network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32"))
_NUMERIC = re.compile(r"^(0x[0-9a-f]*|[0-9]+)$")
_LOOKUPS = 16  # at once; getaddrinfo blocks a thread each

Lookup = Callable[[str], list[str]]
"""Host name to addresses; blocks. Raises OSError."""


class RefusedAddressError(OSError):
    """A host lies at no address that may be connected to."""


def is_public(address: str) -> bool:
    """Whether an address is reachable by everybody: no private, loopback, link-local, multicast, reserved or
    unspecified one, and no IPv6 form that carries an IPv4 address inside (mapped, 6to4, Teredo, NAT64).
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_loopback or ip.is_link_local:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and (ip.ipv4_mapped or ip.scope_id or any(ip in net for net in _TUNNELS)):
        return False
    return ip.is_global


class AddressPolicy:
    """Public addresses, and those of the hosts that are allowed by name."""

    def __init__(self, allow_hosts: Collection[str]) -> None:
        self._allowed = {_plain(host) for host in allow_hosts}

    def allows(self, host: str) -> bool:
        """Whether a host may lie anywhere, private networks included."""
        return _plain(host) in self._allowed

    def check_literal(self, host: str) -> None:
        """Check a host that is an address itself; resolvers are never asked about those.

        Raises:
            RefusedAddressError: an address that is not public, or a number that only some resolvers read as one.
        """
        if self.allows(host):
            return
        try:
            ipaddress.ip_address(host)
        except ValueError:
            if _NUMERIC.match(_plain(host).rpartition(".")[2]):
                raise RefusedAddressError(f"host {host!r} is an address in disguise") from None
            return
        if not is_public(host):
            raise RefusedAddressError(f"{host} is not a public address")

    def check_resolved(self, host: str, addresses: Collection[str]) -> list[str]:
        """Those of a host's addresses that may be connected to.

        Raises:
            RefusedAddressError: none.
        """
        good = [one for one in addresses if self.allows(host) or is_public(one)]
        if not good:
            raise RefusedAddressError(f"{host} lies at {', '.join(addresses)}: not a public address")
        return good


class CheckedResolver(AbstractResolver):
    """Resolves names to addresses that the policy lets through; connections go to just these."""

    def __init__(self, policy: AddressPolicy, connect_to: Mapping[str, str], lookup: Lookup | None = None) -> None:
        """Make a resolver.

        Args:
            connect_to: "host:port" of a URL to "address:port" to connect to instead; taken as allowed.
            lookup: replaces getaddrinfo.
        """
        self._policy = policy
        self._connect_to = {key.lower(): value for key, value in connect_to.items()}
        self._lookup = lookup or _getaddrinfo
        self._threads = ThreadPoolExecutor(_LOOKUPS, thread_name_prefix="dns")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Addresses of a host. Raises RefusedAddressError, or OSError when there is no such host."""
        instead = self._connect_to.get(f"{_plain(host)}:{port}")
        if instead:
            address, _, other_port = instead.rpartition(":")
            return [_result(host, address.strip("[]"), int(other_port))]
        loop = asyncio.get_running_loop()
        addresses = await loop.run_in_executor(self._threads, self._lookup, host)
        if not addresses:
            raise OSError(f"{host} has no address")
        return [_result(host, one, port) for one in self._policy.check_resolved(host, addresses)]

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _getaddrinfo(host: str) -> list[str]:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _result(host: str, address: str, port: int) -> ResolveResult:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=socket.AI_NUMERICHOST)


def _plain(host: str) -> str:
    return host.lower().strip("[]").rstrip(".")
