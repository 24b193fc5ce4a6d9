"""The one table of settings. It makes flags, environment variables, file entries and docs/settings.md; nothing else reads the environment.

Precedence: flag, then environment, then file, then default. What can be measured is not a setting.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from yoke.core.errors import SettingError


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One row: ``name`` is also the flag (``--like-this``), the environment variable (``YOKE_LIKE_THIS``) and the entry in yoke.yaml."""

    name: str
    default: str | int | float
    unit: str
    help: str
    least: float = -math.inf
    most: float = math.inf
    choices: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """What its value is, in a word: that of the default."""
        return {str: "text", int: "integer", float: "number"}[type(self.default)]

    @property
    def flag(self) -> str:
        """On the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """In the environment."""
        return "YOKE_" + self.name.upper()


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting's value, checked."""

    context: int
    cells: int
    chunk: int
    max_sessions: int
    backend: str
    library: str
    device: str
    threads: int
    memory_share: float
    cache_type: str
    wire_type: str
    spin_us: int
    host: str
    port: int
    api_key: str
    cluster_host: str
    cluster_port: int
    rejoin_s: float
    patience_s: float
    replicas: int
    store_gb: float
    profile: str
    chat_template: str
    state_dir: str


SETTINGS: tuple[Setting, ...] = (
    Setting(name="context", default=0, unit="tokens", help="room for one session: prompt and answer; 0 is the model's own, up to 8192", least=0, most=1 << 24),
    Setting(name="cells", default=0, unit="tokens", help="cache for all sessions together; 0 is four contexts, up to 16384", least=0, most=1 << 24),
    Setting(name="chunk", default=256, unit="tokens", help="prompt tokens computed in one step", least=1, most=4096),
    Setting(name="max_sessions", default=64, unit="sessions", help="sessions computed at once; more wait", least=1, most=1024),
    Setting(name="backend", default="ggml", unit="", help="what computes", choices=("ggml", "reference")),
    Setting(name="library", default="", unit="directory", help="where ggml's shared libraries lie; empty is the ones that llama-cpp-python installed"),
    Setting(name="device", default="", unit="name", help="the chip to compute on; empty is the fastest"),
    Setting(name="threads", default=0, unit="threads", help="compute threads; 0 is one for each core", least=0, most=512),
    Setting(name="memory_share", default=0.8, unit="", help="share of the free memory that Yoke may take", least=0.01, most=1.0),
    Setting(name="cache_type", default="f16", unit="", help="numbers in the key/value cache", choices=("f16", "f32")),
    Setting(
        name="wire_type",
        default="float32",
        unit="",
        help="numbers in the sums that ranks exchange; all but float32 round",
        choices=("float32", "float16", "q8_0"),
    ),
    Setting(
        name="spin_us", default=100, unit="microseconds", help="how long a receive asks again before it sleeps; 0 where nodes share cores", least=0, most=10_000
    ),
    Setting(name="host", default="127.0.0.1", unit="address", help="where the HTTP API listens; other than loopback needs api_key"),
    Setting(name="port", default=8080, unit="", help="port of the HTTP API; 0 is any", least=0, most=65535),
    Setting(name="api_key", default="", unit="", help="the key that HTTP clients must send; empty asks for none"),
    Setting(name="cluster_host", default="", unit="address", help="this machine's address for the other machines of the cluster; empty is the one that it has"),
    Setting(name="cluster_port", default=0, unit="", help="port where machines join; 0 is any", least=0, most=65535),
    Setting(name="rejoin_s", default=600.0, unit="seconds", help="how long a machine that has lost its cluster tries to find it again", least=0.0, most=1e9),
    Setting(
        name="patience_s",
        default=60.0,
        unit="seconds",
        help="how long answers wait for a machine to come back when those that are left cannot hold the model",
        least=0.0,
        most=1e9,
    ),
    Setting(
        name="replicas", default=0, unit="copies", help="copies of each part that spare machines hold ready loaded, for when a machine is lost", least=0, most=8
    ),
    Setting(
        name="store_gb",
        default=0.0,
        unit="GB",
        help="room on disk for weights that came from other machines; 0 is half of what is free, at most 200",
        least=0.0,
        most=1e6,
    ),
    Setting(
        name="profile",
        default="thorough",
        unit="",
        help="how much a machine measures of itself when it first gives its hardware to a cluster",
        choices=("thorough", "quick"),
    ),
    Setting(name="chat_template", default="", unit="file", help="a Jinja chat template to use instead of the model's own"),
    Setting(name="state_dir", default="", unit="directory", help="where this node keeps its key; empty is the system's place for such files"),
)


def resolve(flags: Mapping[str, object | None], environ: Mapping[str, str], file: Mapping[str, object]) -> Settings:
    """Every setting from the first place that has it. A flag of None was not given.

    Raises
    ------
    SettingError
        naming the setting, where it came from, what was found and what was expected.
    """
    known = {setting.name for setting in SETTINGS}
    for source, names in (("a flag", flags), ("yoke.yaml", file)):
        if unknown := sorted(set(names) - known):
            raise SettingError(f"{source} sets {unknown[0]!r}, which is no setting; known are {', '.join(sorted(known))}")
    values: dict[str, Any] = {}
    for setting in SETTINGS:
        places = ((setting.flag, flags.get(setting.name)), (setting.variable, environ.get(setting.variable)), ("yoke.yaml", file.get(setting.name)))
        source, found = next(((place, value) for place, value in places if value is not None), ("the default", setting.default))
        values[setting.name] = _checked(setting, source, found)
    return Settings(**values)


def _checked(setting: Setting, source: str, found: object) -> str | int | float:
    kind: Callable[[Any], str | int | float] = type(setting.default)
    try:
        if isinstance(found, bool) or not isinstance(found, str | int | float) or (isinstance(found, float) and kind is int and found != int(found)):
            raise ValueError
        value = kind(found)
        if not isinstance(value, str) and not setting.least <= value <= setting.most:
            raise ValueError
        if setting.choices and value not in setting.choices:
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise SettingError(f"{source} sets {setting.name} to {found!r}; expected {_expected(setting)}") from None
    return value


def _expected(setting: Setting) -> str:
    if setting.choices:
        return "one of " + ", ".join(setting.choices)
    if isinstance(setting.default, str):
        return "a text"
    kind = "a whole number" if isinstance(setting.default, int) else "a number"
    return f"{kind} from {setting.least} to {setting.most}"


def settings_markdown() -> str:
    """The text of docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "Made from the table in `src/yoke/core/settings.py`: change it there. Precedence: flag, then environment, then `yoke.yaml`, then default.",
        "",
        "| name | type | flag | environment | default | unit | what it does |",
        "|---|---|---|---|---|---|---|",
    ]
    for s in SETTINGS:
        text = s.help + (f" ({', '.join(s.choices)})" if s.choices else "")
        default = s.default if s.default != "" else "(empty)"
        lines.append(f"| {s.name} | {s.kind} | `{s.flag}` | `{s.variable}` | {default} | {s.unit} | {text} |")
    return "\n".join(lines) + "\n"


def field_names() -> tuple[str, ...]:
    """The names in :class:`Settings`, for the check that table and type agree."""
    return tuple(field.name for field in fields(Settings))
