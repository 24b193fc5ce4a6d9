"""What the switch's process and whoever starts it have agreed on: machines on the command line, commands and replies as lines of text.

One line is one command, and is answered by one line: ``ok``, ``ok`` and JSON, or ``error`` and a sentence. Knows words; reads and writes nothing.

    cut NAME...                     nothing passes these machines' cables; they do not see it
    mend NAME...                    it does again
    unplug NAME                     as cut, and the machine sees it
    plug NAME                       as mend, and the machine sees it
    close FROM TO                   nothing passes this way; the way back stays open
    part NAME,NAME... NAME,...      machines of different sets cannot reach each other
    heal                            undo every close and part
    shape NAME up|down|both FIELD=VALUE...      fields of `Shape`; the others stay
    between FROM TO FIELD=VALUE...  on this way, besides the cables
    counts                          what has become of each machine's packets
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from yoke.core.errors import UserError
from yoke.testing.fabric import Fabric, Way
from yoke.testing.shape import Shape

DEVICE = "/dev/net/tun"
"""Where the system makes network cards whose cables end in a process."""
CARD = "net"
"""What a machine's network card is called in its namespace."""
READY = "ready"
"""The first line of a switch that works."""
_TRUTHS = {"yes": True, "no": False}
_WAYS = {"up": (Way.UP,), "down": (Way.DOWN,), "both": (Way.UP, Way.DOWN)}

SetCarrier = Callable[[str, bool], None]
"""Lets a machine see its cable plugged in, or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A machine on the switch's command line: what commands call it, its namespace, its IPv4 address with the prefix length.

    Raises
    ------
    UserError
        if a part of it is empty or would not survive being one word among others.
    """

    name: str
    namespace: str
    address: str

    def __post_init__(self) -> None:
        for part in (self.name, self.namespace, self.address):
            if not part or set(part) & set("=, \t\n"):
                raise UserError(f"a machine has {part!r} as a name, namespace or address; expected a word without spaces, commas and equals signs")

    @classmethod
    def parse(cls, text: str) -> "Place":
        """From ``NAME=NAMESPACE=ADDRESS``.

        Raises
        ------
        UserError
            if it is something else.
        """
        parts = text.split("=")
        if len(parts) != 3:
            raise UserError(f"{text!r} is no machine; expected NAME=NAMESPACE=ADDRESS, such as attic=yoke-attic=10.83.0.2/24")
        return cls(name=parts[0], namespace=parts[1], address=parts[2])

    def __str__(self) -> str:
        return f"{self.name}={self.namespace}={self.address}"


def shape_words(shape: Shape) -> list[str]:
    """All fields of a shape, as a command takes them."""
    values = {each.name: getattr(shape, each.name) for each in fields(shape)}
    return [f"{name}={('yes' if value else 'no') if isinstance(value, bool) else repr(value)}" for name, value in values.items()]


def reshaped(shape: Shape, words: Sequence[str]) -> Shape:
    """A shape with other values for the fields that are named.

    Raises
    ------
    UserError
        if a field is unknown, or a value no number or out of bounds.
    """
    known = {each.name for each in fields(shape)}
    changes: dict[str, float | bool] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in known:
            raise UserError(f"{word!r} sets no field of a cable; expected FIELD=VALUE with one of {', '.join(sorted(known))}")
        try:
            changes[name] = _TRUTHS[text] if isinstance(getattr(shape, name), bool) else float(text)
        except (KeyError, ValueError):
            raise UserError(f"{word!r} has no value that fits; expected a number, or yes or no for keeps_order") from None
    return replace(shape, **changes)  # type: ignore[arg-type] # each value has the type of its field: see above


def obey(fabric: Fabric, line: str, set_carrier: SetCarrier) -> str:
    """Carry out one command, and the reply; a command that cannot be carried out changes nothing."""
    name, *words = line.split() or [""]
    try:
        answer = _carry_out(fabric, name, words, set_carrier)
    except UserError as error:
        return f"error {' '.join(str(error).split())}"
    return f"ok {answer}".rstrip()


def _carry_out(fabric: Fabric, name: str, words: Sequence[str], set_carrier: SetCarrier) -> str:
    match name, *words:
        case "cut", _, *_:
            fabric.cut(words)
        case "mend", _, *_:
            fabric.mend(words)
        case "unplug", machine:
            fabric.cut([machine])
            set_carrier(machine, False)
        case "plug", machine:
            fabric.mend([machine])
            set_carrier(machine, True)
        case "close", source, destination:
            fabric.close(source, destination)
        case "part", _, _, *_:
            fabric.part([word.split(",") for word in words])
        case ("heal",):
            fabric.heal()
        case "shape", machine, "up" | "down" | "both" as ways, *changes:
            shapes = [(way, reshaped(fabric.shape_of(machine, way), changes)) for way in _WAYS[ways]]
            for way, shape in shapes:
                fabric.reshape(machine, way, shape)
        case "between", source, destination, *changes:
            fabric.shape_between(source, destination, reshaped(Shape(), changes))
        case ("counts",):
            return json.dumps({machine: counts.numbers() for machine, counts in fabric.counts().items()})
        case _:
            raise UserError(f"{' '.join((name, *words))!r} is no command; expected one of those in the docstring of yoke.testing.control")
    return ""
