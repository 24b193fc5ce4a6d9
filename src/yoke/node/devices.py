"""The chips of this machine: which library drives them, which is used, and what of it is offered to the cluster."""

from dataclasses import replace

from yoke.backends.ggml.backend import GgmlBackend
from yoke.backends.ops import Backend
from yoke.backends.reference import ReferenceBackend
from yoke.core.errors import SettingError
from yoke.core.node import Device


def open_backend(name: str, library: str, threads: int) -> Backend:
    """A backend by its name.

    Raises
    ------
    SettingError
        if there is none of that name.
    BackendError
        if its library is missing or too old.
    """
    match name:
        case "ggml":
            return GgmlBackend(library, threads)
        case "reference":
            return ReferenceBackend()
    raise SettingError(f"backend {name!r} is unknown; known are ggml and reference")


def choose_device(devices: tuple[Device, ...], wanted: str) -> Device:
    """The device of that name, or the fastest.

    Raises
    ------
    SettingError
        if there is none of that name.
    """
    if not wanted:
        return max(devices, key=lambda device: device.matvec_bytes_per_s)
    for device in devices:
        if device.name == wanted:
            return device
    raise SettingError(f"device {wanted!r} is not there; this build offers {', '.join(device.name for device in devices)}")


def offered(device: Device, share: float) -> Device:
    """A device with the part of its free memory that the cluster may take."""
    return replace(device, free_bytes=int(device.free_bytes * share))
