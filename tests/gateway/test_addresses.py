"""Facts about addresses: whose word is taken for where a request comes from."""

import ipaddress

import pytest

from gateway import addresses
from gateway.addresses import FailedLookUps, client_address, is_within, parse_networks
from gateway.errors import InvalidRequest, LimitReached

PROXIES = parse_networks(["10.0.0.0/8", "fd00::/8"], param="proxies")


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "found"),
    [
        ("192.0.2.1", None, "192.0.2.1"),
        # Nobody trusted wrote this.
        ("192.0.2.1", "198.51.100.1", "192.0.2.1"),
        ("10.0.0.1", "198.51.100.1", "198.51.100.1"),
        # The client wrote the first, the outer proxy the second.
        ("10.0.0.1", "203.0.113.9, 198.51.100.1", "198.51.100.1"),
        ("10.0.0.1", "198.51.100.1, 10.0.0.2", "198.51.100.1"),
        ("10.0.0.1", None, "10.0.0.1"),
        ("10.0.0.1", "10.0.0.2", "10.0.0.2"),
        ("fd00::1", "2001:db8::1", "2001:db8::1"),
        ("::ffff:10.0.0.1", "198.51.100.1", "198.51.100.1"),
        # What is no address is nobody's.
        ("10.0.0.1", "198.51.100.1, nonsense", None),
        (None, "198.51.100.1", None),
    ],
)
def test_only_trusted_proxies_are_believed(
    peer: str | None, forwarded_for: str | None, found: str | None
) -> None:
    address = client_address(peer, forwarded_for, trusted_proxies=PROXIES)
    assert (address and str(address)) == found


def test_nobody_is_within_no_range() -> None:
    assert not is_within(None, PROXIES)
    assert not is_within(ipaddress.ip_address("fd00::1"), PROXIES[:1])


@pytest.mark.parametrize("value", ["10.0.0.1/8", "ten", "10.0.0.0/33", ""])
def test_a_range_that_cannot_be_meant_is_refused_by_name(value: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_networks([value], param="ip_ranges")
    assert refused.value.param == "ip_ranges"


def test_an_address_that_guesses_is_made_to_wait_and_others_are_not() -> None:
    failed, guesser = FailedLookUps(), ipaddress.ip_address("192.0.2.1")
    for _ in range(addresses.MAX_FAILURES):
        failed.check(guesser)
        failed.add(guesser)
    with pytest.raises(LimitReached) as refused:
        failed.check(guesser)
    assert 0 < int(refused.value.headers["retry-after"]) <= addresses.FAILURE_S
    failed.check(ipaddress.ip_address("192.0.2.2"))
    failed.check(None)


def test_of_an_ipv6_address_its_network_counts() -> None:
    failed = FailedLookUps()
    for number in range(addresses.MAX_FAILURES):
        failed.add(ipaddress.ip_address(f"2001:db8::{number:x}"))
    with pytest.raises(LimitReached):
        failed.check(ipaddress.ip_address("2001:db8::ffff"))
    failed.check(ipaddress.ip_address("2001:db8:0:1::1"))


def test_no_more_addresses_are_remembered_than_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(addresses, "MAX_ADDRESSES", 10)
    failed = FailedLookUps()
    for number in range(50):
        failed.add(ipaddress.IPv4Address(number))
    assert len(failed._empty_at) == 10
