"""Settings from where they may stand: flags, environment, a file named yoke.yaml in the working directory. Read once, at the start."""

import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from yoke.core.errors import SettingError
from yoke.core.settings import Settings, resolve

FILE_NAME = "yoke.yaml"
MAX_FILE_BYTES = 1 << 20

_COMMENT = re.compile(r"(^|\s)#.*")
"""As in YAML, a ``#`` begins a comment only at the start of a line or after a space: a key may hold one."""


def read_settings(flags: Mapping[str, object | None], environ: Mapping[str, str], directory: Path | None = None) -> Settings:
    """Every setting, checked.

    Raises
    ------
    SettingError
        if the file cannot be read, or a value anywhere is wrong.
    """
    return resolve(flags, environ, _read_file((directory or Path.cwd()) / FILE_NAME))


def state_directory(settings: Settings, environ: Mapping[str, str]) -> Path:
    """Where this node keeps its key: the setting, or the system's place for such files."""
    if settings.state_dir:
        return Path(settings.state_dir).expanduser()
    if sys.platform == "win32":
        return Path(environ.get("LOCALAPPDATA", str(Path.home() / "AppData" / "Local"))) / "yoke"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "yoke"
    return Path(environ.get("XDG_DATA_HOME", str(Path.home() / ".local" / "share"))) / "yoke"


def machine_name() -> str:
    """What this machine is called in tables."""
    return socket.gethostname().split(".")[0] or "node"


def _read_file(path: Path) -> Mapping[str, object]:
    """A file of ``name: value`` lines, a plain subset of YAML: no nesting, so no parser is needed."""
    if not path.exists():
        return {}
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise SettingError(f"{path} has more than {MAX_FILE_BYTES} bytes; expected a few lines of name: value")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} cannot be read: {error}") from error
    entries: dict[str, object] = {}
    for number, line in enumerate(lines, 1):
        text = _COMMENT.sub("", line).strip()
        if not text:
            continue
        name, colon, value = text.partition(":")
        if not colon or name.strip() in entries:
            raise SettingError(f"{path}, line {number}: found {line.strip()!r}; expected one `name: value`, each name once")
        entries[name.strip()] = value.strip().strip("\"'")
    return entries
