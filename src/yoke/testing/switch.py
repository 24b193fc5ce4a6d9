"""The process of a switch: frames from cards in network namespaces, to each its time, and commands on standard input while it runs. Linux only.

    python -m yoke.testing.switch --profile wired a=NAMESPACE=10.83.0.1/24 b=NAMESPACE=10.83.0.2/24

It prints ``ready``, then answers commands (`yoke.testing.control`) line by line, and ends when its input does: so it never outlives who started it.
Knows devices and the clock; what happens to a frame is decided in `yoke.testing.fabric`.
"""

import argparse
import contextlib
import errno
import gc
import math
import os
import select
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from yoke.core.errors import UserError
from yoke.testing.control import READY, Place, obey
from yoke.testing.fabric import Fabric
from yoke.testing.shape import PROFILES
from yoke.testing.tap import open_tap, set_carrier

# More than any frame: 64 KiB and its headers.
_FRAME_BYTES = 66_000
# Frames read from one card before the others, and those whose time has come, get their turn.
_TURN = 16
# Waking took 20 to 35 us on idle cores of a virtual machine (November 2026). What takes longer is not waking but a core that others hold.
_MOST_WAKING_S = 100e-6
_WAKING_SHARE = 1 / 16
_STANDARD_INPUT = 0


class Switch:
    """Cards, their fabric, and the loop between them.

    A process notices late that a frame has come, or that a time has: by what it takes to wake it. How late its own alarms ring is known, so they are set
    that much earlier, and frames that woke it are taken to have come that much earlier. It may also be told not to sleep but to ask for ``spin_s`` before
    something is due.
    """

    def __init__(self, fabric: Fabric, cards: dict[str, int], spin_s: float) -> None:
        self._fabric = fabric
        self._cards = cards
        self._outputs = list(cards.values())
        self._inputs = {fd: index for index, fd in enumerate(self._outputs)}
        self._spin_s = spin_s
        self._waking_s = 0.0
        self._line = b""

    def run(self) -> None:
        """Forward frames and obey commands until standard input ends."""
        sources = [*self._inputs, _STANDARD_INPUT]
        fabric, clock, wait = self._fabric, time.monotonic, select.select
        while True:
            next_s = fabric.next_s
            alarm_s = math.inf if next_s is None else next_s - max(self._spin_s, self._waking_s)
            if next_s is None:
                ready, _, _ = wait(sources, (), ())
                late_s = self._waking_s
            elif (patience_s := alarm_s - clock()) > 0:
                ready, _, _ = wait(sources, (), (), patience_s)
                late_s = self._waking_s if ready else self._ring(alarm_s)
            else:
                ready, _, _ = wait(sources, (), (), 0)
                late_s = 0.0
            for fd in ready:
                if fd != _STANDARD_INPUT:
                    self._take(fd, clock() - late_s)
                elif not self._listen():
                    return
            for index, frame in fabric.leave(clock()):
                self._hand_over(index, frame)

    def _ring(self, planned_s: float) -> float:
        """Learn from an alarm how long waking takes."""
        late_s = min(time.monotonic() - planned_s, _MOST_WAKING_S)
        self._waking_s += (late_s - self._waking_s) * _WAKING_SHARE
        return self._waking_s

    def _take(self, fd: int, now_s: float) -> None:
        index = self._inputs[fd]
        for _ in range(_TURN):
            try:
                frame = os.read(fd, _FRAME_BYTES)
            except BlockingIOError:
                return
            self._fabric.enter(now_s, index, frame)

    def _hand_over(self, index: int, frame: bytes) -> None:
        try:
            os.write(self._outputs[index], frame)
        except OSError as error:
            if error.errno != errno.EIO:  # the card is switched off: the frame finds nobody
                raise

    def _listen(self) -> bool:
        """Obey the commands that have come; False at the end of them."""
        text = os.read(_STANDARD_INPUT, 1 << 16)
        *lines, self._line = (self._line + text).split(b"\n")
        for line in lines:
            print(obey(self._fabric, line.decode(errors="replace"), self._set_carrier), flush=True)
        return bool(text)

    def _set_carrier(self, name: str, is_on: bool) -> None:
        set_carrier(self._cards[name], is_on=is_on)


def main(words: Sequence[str] | None = None) -> None:
    """Run a switch; exit code 2 and a line ``error`` if it cannot work."""
    parser = argparse.ArgumentParser(prog="python -m yoke.testing.switch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=PROFILES, default="wired", help="what the cables do to begin with")
    parser.add_argument("--seed", type=int, default=0, help="decides which packets are lost, and all other draws")
    parser.add_argument(
        "--spin-us", type=float, default=0.0, help="ask instead of sleeping for so long before something is due; where there are cores to spare"
    )
    parser.add_argument("--realtime", action="store_true", help="run before everything else on the machine; for measurements")
    parser.add_argument("machines", nargs="+", metavar="NAME=NAMESPACE=ADDRESS/LENGTH", help="namespaces that are there already")
    options = parser.parse_args(words)
    try:
        places = [Place.parse(text) for text in options.machines]
        cables = PROFILES[options.profile].cables_for(len(places))
        fabric = Fabric({place.name: cable for place, cable in zip(places, cables, strict=True)}, options.seed)
        cards = {place.name: open_tap(place.namespace, index, place.address) for index, place in enumerate(places)}
        _be_punctual(is_realtime=options.realtime)
    except UserError as error:
        print(f"error {error}", flush=True)
        sys.exit(error.exit_code)
    print(READY, flush=True)
    # Frames and what is kept of them form no cycles; a collection would only hold up frames.
    gc.freeze()
    gc.disable()
    with contextlib.suppress(KeyboardInterrupt):
        Switch(fabric, cards, options.spin_us / 1e6).run()


def _be_punctual(*, is_realtime: bool) -> None:
    # Else the system may ring up to 50 us late, to save power.
    Path("/proc/self/timerslack_ns").write_text("1")
    if is_realtime:
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
        except PermissionError:
            raise UserError("this process may not run before all others; expected the right to (be root), or do without --realtime") from None


if __name__ == "__main__":
    main()
