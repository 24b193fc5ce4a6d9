"""The chips of this machine: which library drives them, which is used, and what of it is offered to the cluster."""

from dataclasses import replace
from pathlib import Path

from yoke.backends.ggml.backend import GgmlBackend
from yoke.backends.ops import Backend
from yoke.backends.reference import ReferenceBackend
from yoke.core.errors import SettingError
from yoke.core.node import Device
from yoke.node.messages import Start
from yoke.node.profile import Ask, Tell, introduction, take_profile


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


def look_at_devices(backend: Backend, start: Start, tell: Tell) -> tuple[tuple[Device, ...], tuple[str, ...]]:
    """The chips with their speeds, and what people should know of this machine.

    Raises
    ------
    BackendError
        if no chip can compute with the type of weights that is asked for.
    SettingError
        if what was measured cannot be kept.
    """
    if start.known:
        free_bytes = {chip.name: chip.free_bytes for chip in backend.chips()}
        return tuple(replace(device, free_bytes=free_bytes.get(device.name, 0)) for device in start.known), start.notes
    ask = Ask() if start.is_thorough else introduction(start.weight_type) if start.weight_type else introduction()
    profile = take_profile(backend, Path(start.state_dir), ask, tell=tell)
    return profile.devices, profile.notes


def offered(device: Device, share: float) -> Device:
    """A device with the part of its free memory that the cluster may take."""
    return replace(device, free_bytes=int(device.free_bytes * share))
