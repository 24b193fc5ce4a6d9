"""Who is asked for which tile. Pure: takes what happened and the time, gives the tiles to ask for; knows no channel, thread or clock.

Tiles that wait are grouped by who has them, so that giving some out costs nothing for those that stay. A source is given about as much at a time as it brings
in half a second; so a slow one holds up little, and that little is asked for elsewhere too when others have nothing else to do. The source of last resort is
left in peace as long as the others have what is needed and bring it.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

LEAST_WINDOW_BYTES = 256 << 10
MOST_WINDOW_BYTES = 8 << 20
"""Between these lies what is asked of a source at a time: several tiles, and what a fast link carries while a request travels."""

MOST_TILES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """When others help out, in seconds.

    ``window_s`` : a source is asked for what it brings in this time. ``stall_s`` : one that holds tiles up for longer is slow. ``grace_s`` : so long the last
    resort waits for the others to say what they have. ``help_s`` : it helps when the others would take longer than this for what waits.
    """

    window_s: float = 0.5
    stall_s: float = 1.0
    grace_s: float = 2.0
    help_s: float = 30.0


@dataclass(slots=True)
class _Source:
    """What is known of one source. ``flying`` are the tiles that it was asked for and has not answered, with the time of asking, oldest first."""

    bit: int
    is_last_resort: bool
    bitmap: bytearray | None = None
    is_gone: bool = False
    flying: dict[int, float] = field(default_factory=dict)
    flying_bytes: int = 0
    done_bytes: int = 0
    busy_s: float = 0.0
    busy_since: float = 0.0
    heard_at: float = 0.0

    def has(self, tile_id: int) -> bool:
        return self.bitmap is not None and bool(self.bitmap[tile_id >> 3] >> (tile_id & 7) & 1)

    def bytes_per_s(self, now: float) -> float:
        """How fast it has been while it had something to do; 0 as long as it has brought nothing."""
        busy_s = self.busy_s + (now - self.busy_since if self.flying else 0.0)
        return self.done_bytes / max(busy_s, 1e-3)


class Allotment:
    """The tiles that are wanted, and who brings them.

    Parameters
    ----------
    sizes : bytes of every wanted tile, by id.
    last_resorts : for each source, whether it is one of last resort. A source is named by its place here.
    now : the time, in seconds, as in all methods.
    """

    def __init__(self, sizes: Mapping[int, int], last_resorts: tuple[bool, ...], now: float, pace: Pace | None = None) -> None:
        self._sizes, self._pace, self._began = sizes, pace or Pace(), now
        self._sources = [_Source(bit=1 << place, is_last_resort=is_last) for place, is_last in enumerate(last_resorts)]
        self.left = set(sizes)
        self.wasted_bytes = 0
        self._waiting: dict[int, deque[int]] = {0: deque(sorted(sizes))}
        self._waiting_bytes = sum(sizes.values())

    def done_bytes(self, source: int) -> int:
        """What a source has brought."""
        return self._sources[source].done_bytes

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come: all is here, or nobody is left who has any of the rest."""
        if not self.left:
            return True
        if any(not source.is_gone and (source.bitmap is None or source.flying) for source in self._sources):
            return False
        return not any(mask and tiles for mask, tiles in self._waiting.items())

    def offer(self, source: int, bitmap: bytes) -> None:
        """A source says which tiles it has, a bit for each, the lowest of each byte first."""
        who = self._sources[source]
        who.bitmap, who.is_gone = bytearray(bitmap), False
        before, self._waiting = self._waiting, {}
        for mask, tiles in before.items():
            for tile_id in tiles:
                self._put(tile_id, mask | who.bit if who.has(tile_id) else mask)

    def drop(self, source: int, *, is_coming_back: bool = False) -> None:
        """A source is gone, or not to be trusted: what it was asked for is for others. One that is coming back will make another offer."""
        who = self._sources[source]
        flying, who.flying, who.flying_bytes = who.flying, {}, 0
        who.bitmap, who.is_gone = None, not is_coming_back
        before, self._waiting = self._waiting, {}
        for mask, tiles in before.items():
            self._waiting.setdefault(mask & ~who.bit, deque()).extend(tiles)
        for tile_id in flying:
            self._return(tile_id)

    def lacks(self, source: int, tile_id: int) -> None:
        """A source has not the tile that it was asked for."""
        who = self._sources[source]
        self._landed(who, tile_id)
        if who.bitmap is not None:
            who.bitmap[tile_id >> 3] &= ~(1 << (tile_id & 7))
        self._return(tile_id)

    def arrived(self, source: int, tile_id: int, now: float) -> bool:
        """A source has brought a tile that it was asked for: whether it is the first to do so."""
        who = self._sources[source]
        self._landed(who, tile_id)
        who.done_bytes += self._sizes[tile_id]
        who.heard_at = now
        if not who.flying:
            who.busy_s += now - who.busy_since
        if tile_id not in self.left:
            self.wasted_bytes += self._sizes[tile_id]
            return False
        self.left.remove(tile_id)
        return True

    def take(self, source: int, now: float) -> list[int]:
        """The tiles to ask a source for now; none while it has enough to do, or there is nothing for it."""
        who = self._sources[source]
        window = min(MOST_WINDOW_BYTES, max(LEAST_WINDOW_BYTES, who.bytes_per_s(now) * self._pace.window_s))
        if who.bitmap is None or 2 * who.flying_bytes > window:
            return []
        room = window - who.flying_bytes
        taken = self._from_waiting(who, room, now) or ([] if who.flying else self._from_slow(who, room, now))
        if taken and not who.flying:
            who.busy_since = who.heard_at = now
        for tile_id in taken:
            who.flying[tile_id] = now
            who.flying_bytes += self._sizes[tile_id]
        return taken

    def _from_waiting(self, who: _Source, room: float, now: float) -> list[int]:
        """Tiles that nobody was asked for: first those that fewest have."""
        masks = sorted((mask for mask, tiles in self._waiting.items() if mask & who.bit and tiles), key=lambda mask: (mask.bit_count(), mask))
        if who.is_last_resort and not self._needs_help(now):
            if any(other.bitmap is None and not other.is_gone for other in self._others()) and now < self._began + self._pace.grace_s:
                return []
            masks = [mask for mask in masks if not any(mask & other.bit for other in self._others())]
        taken: list[int] = []
        for mask in masks:
            tiles = self._waiting[mask]
            while tiles and room > 0 and len(taken) < MOST_TILES:
                taken.append(tiles.popleft())
                room -= self._sizes[taken[-1]]
                self._waiting_bytes -= self._sizes[taken[-1]]
        return taken

    def _from_slow(self, who: _Source, room: float, now: float) -> list[int]:
        """Tiles that slow sources were asked for, the ones asked for last first."""
        slow = [other for other in self._sources if other is not who and other.flying and self._is_slow(other, who, now)]
        taken: list[int] = []
        for other in slow:
            for tile_id in reversed(other.flying):
                if room <= 0 or len(taken) >= MOST_TILES:
                    return taken
                if tile_id not in self.left or not who.has(tile_id) or tile_id in taken:
                    continue
                if all(holder in slow for holder in self._sources if tile_id in holder.flying):
                    taken.append(tile_id)
                    room -= self._sizes[tile_id]
        return taken

    def _is_slow(self, other: _Source, who: _Source, now: float) -> bool:
        """Whether waiting for ``other`` costs more than asking ``who`` as well."""
        if now - other.heard_at >= self._pace.stall_s:
            return True
        rate = other.bytes_per_s(now)
        return not who.is_last_resort and rate > 0 and other.flying_bytes / rate > self._pace.window_s + self._pace.stall_s

    def _needs_help(self, now: float) -> bool:
        """Whether the others would take too long for what waits."""
        if now < self._began + self._pace.grace_s:
            return False
        rate = sum(other.bytes_per_s(now) for other in self._others() if now - other.heard_at < self._pace.stall_s)
        return self._waiting_bytes > rate * self._pace.help_s

    def _others(self) -> list[_Source]:
        return [source for source in self._sources if not source.is_last_resort]

    def _landed(self, who: _Source, tile_id: int) -> None:
        del who.flying[tile_id]
        who.flying_bytes -= self._sizes[tile_id]

    def _return(self, tile_id: int) -> None:
        """A tile that somebody did not bring waits again, unless it came, or somebody else was asked for it too."""
        if tile_id in self.left and not any(tile_id in source.flying for source in self._sources):
            self._put(tile_id, sum(source.bit for source in self._sources if source.has(tile_id)))
            self._waiting_bytes += self._sizes[tile_id]

    def _put(self, tile_id: int, mask: int) -> None:
        self._waiting.setdefault(mask, deque()).append(tile_id)
