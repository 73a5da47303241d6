"""Which addresses a download may connect to: public ones only, checked after names are resolved."""

import functools
import ipaddress
import re
from collections.abc import Collection

_NUMERIC = re.compile(r"^(0x[0-9a-f]*|[0-9]+)$")
_GLOBAL_V6 = ipaddress.ip_network("2000::/3")  # all that is handed out; site-local fec0::/10 passes `is_global`
# What `is_global` lets through: tunnels that carry an IPv4 address inside, documentation, and addresses that look
# public but lead into a provider's own network.
_DENIED = tuple(
    ipaddress.ip_network(net)
    for net in (
        "64:ff9b::/96",  # NAT64
        "64:ff9b:1::/48",  # NAT64 of a site
        "2002::/16",  # 6to4
        "2001::/32",  # Teredo
        "2001:20::/28",  # ORCHID, never routed
        "3fff::/20",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.0.0.0/24",  # protocol assignments; one cloud keeps its metadata there
        "168.63.129.16/32",  # the platform's own service on every Azure machine
    )
)
_MOST_KEPT = 16_384  # a shard's hosts, asked about at every request
_address_of = functools.lru_cache(_MOST_KEPT)(ipaddress.ip_address)


class RefusedAddressError(OSError):
    """A host lies at no address that may be connected to."""


def is_public(address: str) -> bool:
    """Whether an address is reachable by everybody: no private, shared, loopback, link-local, multicast, reserved or
    unspecified one, no metadata service, and no IPv6 form that carries an IPv4 address inside (mapped, 6to4, Teredo,
    NAT64).
    """
    try:
        ip = _address_of(address)
    except ValueError:
        return False
    if ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_loopback or ip.is_link_local:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and (ip.scope_id or ip not in _GLOBAL_V6):
        return False
    return ip.is_global and not any(ip in net for net in _DENIED if net.version == ip.version)


@functools.lru_cache(_MOST_KEPT)
def plain(host: str) -> str:
    """A host name as it is compared: lower case, without brackets and final dot."""
    return host.lower().strip("[]").rstrip(".")


class AddressPolicy:
    """Public addresses at the web's ports, and anything of the hosts that are allowed by name."""

    def __init__(self, allow_hosts: Collection[str], allow_ports: Collection[int] = (80, 443)) -> None:
        self._hosts = {plain(host) for host in allow_hosts}
        self._ports = frozenset(allow_ports)

    def allows(self, host: str) -> bool:
        """Whether a host may lie anywhere, private networks included, and listen at any port."""
        return plain(host) in self._hosts

    def check_port(self, host: str, port: int | None) -> None:
        """Check the port of a URL.

        Raises:
            RefusedAddressError: not one of the allowed ports.
        """
        if port not in self._ports and not self.allows(host):
            raise RefusedAddressError(f"port {port} of {host} is not among {sorted(self._ports)}")

    def check_literal(self, host: str) -> bool:
        """Check a host that is an address itself; resolvers are never asked about those.

        Returns:
            Whether it is an address; names are not checked here.

        Raises:
            RefusedAddressError: an address that is not public, or a number that only some resolvers read as one.
        """
        try:
            _address_of(host.strip("[]"))
        except ValueError:
            if not self.allows(host) and _NUMERIC.match(plain(host).rpartition(".")[2]):
                raise RefusedAddressError(f"host {host!r} is an address in disguise") from None
            return False
        if not self.allows(host) and not is_public(host.strip("[]")):
            raise RefusedAddressError(f"{host} is not a public address")
        return True

    def check_resolved(self, host: str, addresses: Collection[str]) -> list[str]:
        """Those of a host's addresses that may be connected to.

        Raises:
            RefusedAddressError: none.
        """
        good = [one for one in addresses if self.allows(host) or is_public(one)]
        if not good:
            raise RefusedAddressError(f"{host} lies at {', '.join(addresses)}: not a public address")
        return good
