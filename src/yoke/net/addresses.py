"""Which addresses this machine has on the networks that it is in. Connects to nobody."""

import contextlib
import ipaddress
import socket

import psutil

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_FAR = ("192.0.2.1", 9)  # reserved for documentation (RFC 5737): nobody has it


def local_addresses(most: int) -> tuple[str, ...]:
    """The addresses at which others may reach this machine, at most so many, the likeliest first: that of the way to the internet, then IPv4, then IPv6.

    Loopback if there is no other.
    """
    is_up = {name: status.isup for name, status in psutil.net_if_stats().items()}
    found: dict[Address, None] = {}
    for name, addresses in psutil.net_if_addrs().items():
        for entry in addresses if is_up.get(name, False) else ():
            if entry.family in {socket.AF_INET, socket.AF_INET6}:
                with contextlib.suppress(ValueError):
                    found[ipaddress.ip_address(entry.address.partition("%")[0])] = None
    # An address of one link alone means nothing without the name of the interface, which differs between machines.
    usable = [address for address in found if not (address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified)]
    first = _towards_others()
    return tuple(map(str, sorted(usable, key=lambda address: (str(address) != first, address.version))[:most])) or ("127.0.0.1",)


def _towards_others() -> str:
    """The address that this machine would use to reach the internet; empty if it has no way there. Nothing is sent."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.connect(_FAR)
        return str(asking.getsockname()[0])
    return ""
