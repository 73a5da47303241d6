import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourmill.ingest.addresses import AddressPolicy, RefusedAddressError, is_public


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "2606:4700::1111", "1.1.1.1", "2a00:1450::1"])
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
        "100.100.100.200",  # another cloud's
        "192.0.0.192",  # and another's
        "168.63.129.16",  # looks public, is the platform of every Azure machine
        "fd00:ec2::254",
        "192.88.99.1",
        "198.18.0.1",
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
        "64:ff9b:1::7f00:1",
        "fec0::1",  # site-local, which the library takes for global
        "3fff::1",
        "2001:20::1",
        "4000::1",
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


def test_ports_of_the_web_and_any_of_hosts_allowed_by_name() -> None:
    policy = AddressPolicy(("mirror.local",), (80, 443))
    policy.check_port("example.com", 443)
    policy.check_port("mirror.local", 9000)
    for port in (22, 6379, 8265, None):
        with pytest.raises(RefusedAddressError, match=f"port {port} of example.com"):
            policy.check_port("example.com", port)
