"""A YAML file as entries that know their line. Small, bounded, without anchors' references, tags and repeated names; knows nothing of what the entries mean."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml  # type: ignore[import-untyped]

from yoke.core.errors import SettingError

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 8

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the first one is much faster, but not everywhere


@dataclass(frozen=True, slots=True)
class Entry:
    """One value in the file. ``name`` is what it is called there, such as ``nodes[2].memory``."""

    path: Path
    name: str
    node: Any

    @property
    def text(self) -> str:
        """A plain value as it is written.

        Raises
        ------
        SettingError
            if it is a list, has entries of its own, or is empty.
        """
        if not isinstance(self.node, yaml.ScalarNode) or not self.node.value.strip():
            self.refuse("expected a value")
        return str(self.node.value)

    @property
    def is_map(self) -> bool:
        """Whether it has entries of its own."""
        return isinstance(self.node, yaml.MappingNode)

    def items(self) -> list["Entry"]:
        """The values of a list.

        Raises
        ------
        SettingError
            if it is something else.
        """
        if not isinstance(self.node, yaml.SequenceNode):
            self.refuse("expected a list")
        return [Entry(self.path, f"{self.name}[{index}]", node) for index, node in enumerate(self.node.value)]

    def entries(self, known: Collection[str] | None = None, needed: Collection[str] = ()) -> dict[str, "Entry"]:
        """The entries of its own, by name.

        Raises
        ------
        SettingError
            if it is something else, a name comes twice, is not ``known`` or is ``needed`` and missing.
        """
        if not isinstance(self.node, yaml.MappingNode):
            self.refuse("expected entries, each with a name and a colon")
        found: dict[str, Entry] = {}
        for key, value in self.node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else ""
            entry = Entry(self.path, f"{self.name}.{name}" if self.name else name, value)
            if name in found:
                entry.refuse("it is there twice")
            if known is not None and name not in known:
                Entry(self.path, entry.name, key).refuse(f"it is not known; known are {', '.join(known)}")
            found[name] = entry
        if missing := [name for name in needed if name not in found]:
            self.refuse(f"{missing[0]} is missing")
        return found

    def refuse(self, why: str) -> NoReturn:
        """Raise a SettingError that names file, line and entry."""
        found = f" is {self.node.value[:80]!r}" if isinstance(self.node, yaml.ScalarNode) else ""
        raise SettingError(f"{self.path}, line {self.node.start_mark.line + 1}: {self.name or 'the file'}{found}: {why}")


def read_entries(path: Path) -> Entry:
    """The whole file as one entry.

    Raises
    ------
    SettingError
        if it cannot be read, is too long or too deep, is no YAML, or refers from one place to another.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise SettingError(f"{path} has {path.stat().st_size} bytes; expected at most {MAX_FILE_BYTES}")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} cannot be read: {error}") from error
    try:
        _check(path, yaml.parse(text, Loader=_LOADER))
        root = yaml.compose(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark is not None else ""
        raise SettingError(f"{path}{place}: {getattr(error, 'problem', None) or error}; expected YAML") from error
    if root is None:
        raise SettingError(f"{path} is empty")
    return Entry(path, "", root)


def _check(path: Path, events: Iterator[Any]) -> None:
    """Before a tree is made of it: a file may be short and yet stand for a tree that is deep or huge."""
    depth = 0
    for event in events:
        line = event.start_mark.line + 1
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise SettingError(f"{path}, line {line}: more than {MAX_DEPTH} levels; expected fewer")
        if isinstance(event, yaml.AliasEvent):
            raise SettingError(f"{path}, line {line}: found a reference (*{event.anchor}); expected every value to be written out")
