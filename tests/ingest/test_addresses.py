import asyncio
import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourmill.ingest.addresses import AddressPolicy, RefusedAddressError, is_public
from fourmill.ingest.resolver import CheckedResolver


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "2606:4700::1111", "1.1.1.1"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",  # the metadata service of clouds
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:8.8.8.8",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:0:1234::1",
        "127.1",
        "not an address",
        "",
    ],
)
def test_all_others_are_refused(address: str) -> None:
    assert not is_public(address)


@given(st.ip_addresses(v=4, network="10.0.0.0/8") | st.ip_addresses(v=4, network="127.0.0.0/8"))
def test_inner_addresses_are_refused_in_every_disguise(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    disguises = [
        str(address),
        str(number),
        hex(number),
        f"0x{number >> 24:x}.{number & 0xFFFFFF}",
        f"{number >> 24}.{number & 0xFFFFFF}",
        f"::ffff:{address}",
        f"64:ff9b::{number >> 16:x}:{number & 0xFFFF:x}",
        f"2002:{number >> 16:x}:{number & 0xFFFF:x}::",
    ]
    for disguise in disguises:
        with pytest.raises(RefusedAddressError):
            AddressPolicy(()).check_literal(disguise)


def test_names_pass_the_literal_check_and_allowed_hosts_pass_all() -> None:
    AddressPolicy(()).check_literal("example.com")
    AddressPolicy(()).check_literal("1.example.com")
    policy = AddressPolicy(("127.0.0.1", "Mirror.Local", "::1"))
    policy.check_literal("127.0.0.1")
    policy.check_literal("[::1]")
    assert policy.check_resolved("mirror.local.", ["10.0.0.1"]) == ["10.0.0.1"]
    with pytest.raises(RefusedAddressError, match=r"127\.0\.0\.2"):
        policy.check_literal("127.0.0.2")


def test_only_public_addresses_of_a_name_are_answered() -> None:
    async def resolve() -> list[str]:
        resolver = CheckedResolver(AddressPolicy(()), {}, lambda host: ["10.0.0.1", "8.8.8.8", "::1"])
        try:
            return [one["host"] for one in await resolver.resolve("mixed.test", 80)]
        finally:
            await resolver.close()

    assert asyncio.run(resolve()) == ["8.8.8.8"]


def test_connect_to_needs_host_and_port() -> None:
    async def resolve(port: int) -> list[tuple[str, int]]:
        resolver = CheckedResolver(AddressPolicy(()), {"A.test:80": "127.0.0.1:5000"}, lambda host: ["127.0.0.1"])
        try:
            return [(one["host"], one["port"]) for one in await resolver.resolve("a.test", port)]
        finally:
            await resolver.close()

    assert asyncio.run(resolve(80)) == [("127.0.0.1", 5000)]
    with pytest.raises(RefusedAddressError):
        asyncio.run(resolve(81))
