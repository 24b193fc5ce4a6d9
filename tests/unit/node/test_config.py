"""yoke.yaml: a few lines of name: value, and errors that say which line."""

from pathlib import Path

import pytest

from yoke.core.errors import SettingError
from yoke.core.settings import resolve
from yoke.node import config
from yoke.node.config import read_settings, state_directory


def write(directory: Path, text: str | bytes) -> Path:
    (directory / "yoke.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return directory


def test_no_file_means_defaults(tmp_path: Path) -> None:
    assert read_settings({}, {}, tmp_path) == resolve({}, {}, {})


def test_lines_quotes_and_comments_are_read(tmp_path: Path) -> None:
    text = "# my machine\n\nport: 9000 # the usual\nhost: \"0.0.0.0\"\r\nlibrary: 'C:\\ggml'\nmemory_share:0.5\n  chunk : 64\napi_key:\n"
    settings = read_settings({}, {}, write(tmp_path, text))
    assert (settings.port, settings.host, settings.library, settings.memory_share, settings.chunk) == (9000, "0.0.0.0", "C:\\ggml", 0.5, 64)
    assert settings.api_key == ""


def test_hash_inside_a_key_is_part_of_it(tmp_path: Path) -> None:
    assert read_settings({}, {}, write(tmp_path, "api_key: abc#def # mine")).api_key == "abc#def"


def test_mark_that_windows_editors_put_first_does_no_harm(tmp_path: Path) -> None:
    assert read_settings({}, {}, write(tmp_path, b"\xef\xbb\xbfport: 9000")).port == 9000


def test_flag_and_environment_beat_the_file(tmp_path: Path) -> None:
    write(tmp_path, "port: 1\nchunk: 1\nthreads: 1")
    settings = read_settings({"port": 3, "chunk": None}, {"YOKE_PORT": "2", "YOKE_CHUNK": "2"}, tmp_path)
    assert (settings.port, settings.chunk, settings.threads) == (3, 2, 1)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("port 9000", "line 1: found 'port 9000'; expected one `name: value`"),
        ("port: 1\n\nport: 2", "line 3: found 'port: 2'.*each name once"),
        ("port: many", "yoke.yaml sets port to 'many'; expected a whole number from 0 to 65535"),
        ("colour: red", "yoke.yaml sets 'colour', which is no setting"),
        ("- port: 1", "no setting"),
        ("port:\n  - 1", "line 2"),
        (b"\xff\xfe", "cannot be read"),
        ("# x\n" * 300_000, "more than 1048576 bytes"),
    ],
)
def test_errors_say_where_and_what(tmp_path: Path, text: str | bytes, told: str) -> None:
    with pytest.raises(SettingError, match=told):
        read_settings({}, {}, write(tmp_path, text))


def test_directory_in_place_of_the_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "yoke.yaml").mkdir()
    with pytest.raises(SettingError, match="cannot be read"):
        read_settings({}, {}, tmp_path)


@pytest.mark.parametrize(
    ("platform", "environ", "end"),
    [
        ("linux", {"XDG_DATA_HOME": "/data"}, "/data/yoke"),
        ("linux", {}, ".local/share/yoke"),
        ("darwin", {}, "Library/Application Support/yoke"),
        ("win32", {"LOCALAPPDATA": "/appdata"}, "/appdata/yoke"),
        ("win32", {}, "AppData/Local/yoke"),
    ],
)
def test_key_is_kept_where_the_system_keeps_such_files(monkeypatch: pytest.MonkeyPatch, platform: str, environ: dict[str, str], end: str) -> None:
    monkeypatch.setattr(config.sys, "platform", platform)
    assert state_directory(resolve({}, {}, {}), environ).as_posix().endswith(end)
    chosen = resolve({"state_dir": "/mine"}, {}, {})
    assert state_directory(chosen, environ) == Path("/mine")
