"""A TAP device: a network card of a namespace whose cable ends in this process. Linux only.

Knows the device's flags and how it gets into a namespace; knows nothing of what is done with frames.
"""

import fcntl
import os
import struct
import subprocess

from yoke.core.errors import UserError
from yoke.testing.control import CARD, DEVICE
from yoke.testing.ethernet import address_of

MTU_BYTES = 1500
# Packets that wait for the switch to read them: some tens of milliseconds of small ones, should it be kept from running.
_QUEUE_PACKETS = 4000

# linux/if_tun.h
_TUNSETIFF, _TUNSETOFFLOAD, _TUNSETCARRIER = 0x400454CA, 0x400454D0, 0x400454E2
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6 = 0x01, 0x02, 0x04


def open_tap(namespace: str, index: int, address: str) -> int:
    """A descriptor that reads and writes frames of the card `CARD` in a namespace, without blocking; closing it takes the card away.

    Check sums are left to us, and TCP streams come in frames of up to 64 KiB. ``address`` is an IPv4 address with its prefix length.

    Raises
    ------
    UserError
        if the device cannot be made, or not be brought into the namespace.
    """
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"{DEVICE} cannot be opened ({error.strerror}); expected a kernel with tun, and the right to read and write that file") from None
    try:
        # The kernel puts a number for %d; the name is for a moment only.
        made = fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", b"yoke%d", _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
        fcntl.ioctl(fd, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6)
        _furnish(made[:16].rstrip(b"\0").decode(), namespace, address_of(index).hex(":"), address)
    except OSError as error:
        os.close(fd)
        raise UserError(f"no network card could be made ({error.strerror}); expected the right to administer networks: be root") from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def set_carrier(fd: int, *, is_on: bool) -> None:
    """Let the machine see that its cable is plugged in, or that it is not."""
    fcntl.ioctl(fd, _TUNSETCARRIER, struct.pack("i", is_on))


def _furnish(device: str, namespace: str, hardware: str, address: str) -> None:
    """Bring a new device into a namespace, with its addresses, and switch it on."""
    inside = [
        f"link set {device} name {CARD}",
        f"link set {CARD} address {hardware} mtu {MTU_BYTES} txqueuelen {_QUEUE_PACKETS}",
        f"addr add {address} dev {CARD}",
        f"link set {CARD} up",
        "link set lo up",
    ]
    for command, lines in ((["ip"], [f"link set {device} netns {namespace}"]), (["ip", "-n", namespace], inside)):
        done = subprocess.run([*command, "-batch", "-"], input="\n".join(lines), capture_output=True, text=True, check=False, timeout=30)
        if done.returncode:
            raise UserError(f"a network card could not be brought into the namespace {namespace!r}: {done.stderr.strip()}")
