"""Where a request comes from, and how often an address may guess keys.

The peer's address counts; `X-Forwarded-For` only as far as proxies that the operator named wrote
it. Knows nothing of keys or of what is guessed.
"""

import ipaddress
import math
import time
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from gateway.errors import InvalidRequest, LimitReached

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# Failed look-ups that an address may have at once, and how long one of them counts.
MAX_FAILURES = 20
FAILURE_S = 3.0
MAX_ADDRESSES = 10_000
MAX_RANGES = 64


def parse_networks(values: Iterable[str], *, param: str) -> tuple[Network, ...]:
    """CIDR ranges or single addresses. Raises InvalidRequest."""
    networks = []
    for value in values:
        try:
            networks.append(ipaddress.ip_network(value))
        except ValueError:
            raise InvalidRequest(
                f"{value!r} is no range of addresses: write 192.0.2.0/24, 2001:db8::/32 or one"
                " address, without bits below the prefix.",
                param=param,
            ) from None
    if len(networks) > MAX_RANGES:
        raise InvalidRequest(f"{param} takes at most {MAX_RANGES} ranges.", param=param)
    return tuple(networks)


def is_within(address: Address | None, networks: Sequence[Network]) -> bool:
    return address is not None and any(address in network for network in networks)


def client_address(
    peer: str | None, forwarded_for: str | None, *, trusted_proxies: Sequence[Network]
) -> Address | None:
    """The address of whoever called the outermost proxy that is trusted; None where unknown.

    A proxy appends whom it heard from, so the list is believed from its end, for as long as it was
    written by trusted ones.
    """
    address = _parse(peer)
    hops = (forwarded_for or "").split(",")
    while hops and is_within(address, trusted_proxies):
        hop = hops.pop().strip()
        if not hop:
            break
        address = _parse(hop)
    return address


def _parse(value: str | None) -> Address | None:
    try:
        address = ipaddress.ip_address(value or "")
    except ValueError:
        return None
    mapped = getattr(address, "ipv4_mapped", None)
    return address if mapped is None else mapped


class FailedLookUps:
    """Mutable: a leaky bucket for each address that has guessed wrongly of late.

    A bucket is kept as the moment at which it will be empty. Of an IPv6 address the first 64 bits
    count: the rest is its owner's to choose.
    """

    def __init__(self) -> None:
        # By the monotonic clock; the longest unchanged first.
        self._empty_at: dict[Address, float] = {}

    def check(self, address: Address | None) -> None:
        """Raises LimitReached where the address has failed too often."""
        empty_at = self._empty_at.get(_site(address), 0.0) if address is not None else 0.0
        wait_s = empty_at - time.monotonic() - (MAX_FAILURES - 1) * FAILURE_S
        if wait_s > 0:
            error = LimitReached(
                "Too many unknown keys came from this address. It may try again in"
                f" {math.ceil(wait_s)} s."
            )
            error.headers |= {
                "retry-after": str(math.ceil(wait_s)),
                "retry-after-ms": str(math.ceil(wait_s * 1000)),
            }
            raise error

    def add(self, address: Address | None) -> None:
        if address is None:
            return
        now, site = time.monotonic(), _site(address)
        self._empty_at[site] = max(self._empty_at.pop(site, 0.0), now) + FAILURE_S
        while len(self._empty_at) > MAX_ADDRESSES:
            del self._empty_at[next(iter(self._empty_at))]


def _site(address: Address) -> Address:
    if isinstance(address, IPv4Address):
        return address
    return IPv6Address(int(address) >> 64 << 64)
