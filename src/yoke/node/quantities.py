"""Numbers with units as people write them: ``16 GB``, ``1 Gbit/s``, ``0.3 ms``. Read into bytes, seconds and operations, and written back."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from yoke.core.errors import SettingError

_SCALES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3})?)\s*(\S*)")


def _units(name: str, factor: float = 1.0) -> dict[str, float]:
    return {scale + name: factor * value for scale, value in _SCALES.items()}


@dataclass(frozen=True, slots=True)
class Quantity:
    """What may be written: its name, its units with what each is of the base unit, an example, and the largest value."""

    name: str
    units: Mapping[str, float]
    example: str
    most: float
    least: float = 0.0

    @property
    def expected(self) -> str:
        """What an error says."""
        return f"expected {self.name} such as {self.example}, in {', '.join(self.units)}, from {self.least:g} to {self.most:g} of the base unit"


BYTES = Quantity("an amount of memory", {**_units("B"), **{unit + "B": value for unit, value in _BINARY.items()}}, "16 GB", 1e15)
THREADS = Quantity("a number of threads", {"threads": 1.0, "thread": 1.0}, "8 threads", 4096, 1.0)
BITS_PER_S = Quantity("a bandwidth", {**_units("bit/s", 0.125), **_units("bps", 0.125)}, "1 Gbit/s", 1e15, 1.0)
BYTES_PER_S = Quantity("a speed", {**_units("B/s"), **BITS_PER_S.units}, "40 GB/s", 1e15, 1.0)
SECONDS = Quantity("a time", {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}, "0.3 ms", 60.0)
FLOP_PER_S = Quantity("operations a second", {**_units("FLOP/s"), **_units("FLOPS"), **_units("flops")}, "500 GFLOP/s", 1e18, 1.0)


def read_quantity(text: str, quantity: Quantity) -> float:
    """A number with its unit, in the base unit.

    Raises
    ------
    SettingError
        if it is something else, or out of bounds.
    """
    match = _NUMBER.fullmatch(text.strip())
    factor = quantity.units.get(match[2]) if match is not None else None
    value = float(match[1]) * factor if match is not None and factor is not None else math.nan
    if not quantity.least <= value <= quantity.most:
        raise SettingError(f"found {text[:80]!r}; {quantity.expected}")
    return value


def fits(text: str, quantity: Quantity) -> bool:
    """Whether a text ends in one of the quantity's units."""
    match = _NUMBER.fullmatch(text.strip())
    return match is not None and match[2] in quantity.units


def write_bytes(n_bytes: int) -> str:
    """Exactly so many bytes, in GB."""
    return f"{n_bytes / 1e9:.9f}".rstrip("0").rstrip(".") + " GB"


def write_quantity(value: float, scale: float, unit: str) -> str:
    """Six digits of a value, in ``unit``, which is ``scale`` of the base unit."""
    digits = 5 - math.floor(math.log10(value / scale)) if value > 0 else 0
    number = f"{value / scale:.{max(0, digits)}f}"
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}"
