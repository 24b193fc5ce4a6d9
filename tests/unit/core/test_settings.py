"""The one table of settings, and what is made from it."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yoke.core.errors import SettingError
from yoke.core.settings import SETTINGS, Setting, field_names, resolve, settings_markdown

N_SETTINGS = 24
"""A new setting is a decision: what can be measured is not a setting. Change this number together with docs/settings.md."""

DOCS = Path(__file__).parents[3] / "docs" / "settings.md"


def another_value(setting: Setting, step: int) -> Any:
    if setting.choices:
        return setting.choices[-1]
    if isinstance(setting.default, str):
        return f"text {step}"
    return type(setting.default)(min(setting.most, max(setting.least, setting.least + step if setting.default != setting.least + step else setting.most)))


def test_number_of_settings_is_frozen() -> None:
    assert len(SETTINGS) == N_SETTINGS


def test_table_and_type_have_the_same_names_once_each() -> None:
    assert [s.name for s in SETTINGS] == list(field_names())
    assert len({s.name for s in SETTINGS}) == len(SETTINGS)


def test_defaults_pass_their_own_checks() -> None:
    settings = resolve({}, {}, {})
    assert {s.name: getattr(settings, s.name) for s in SETTINGS} == {s.name: s.default for s in SETTINGS}


def test_documentation_is_what_the_table_says() -> None:
    assert DOCS.read_text(encoding="utf-8") == settings_markdown(), "docs/settings.md is old: write core.settings.settings_markdown() into it"
    for setting in SETTINGS:
        assert f"`{setting.flag}`" in settings_markdown()
        assert f"`{setting.variable}`" in settings_markdown()
        assert setting.help


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_flag_beats_environment_beats_file_beats_default(setting: Setting) -> None:
    flag, variable, entry = (another_value(setting, step) for step in (1, 2, 3))
    name = setting.name
    assert getattr(resolve({name: flag}, {setting.variable: str(variable)}, {name: entry}), name) == flag
    assert getattr(resolve({name: None}, {setting.variable: str(variable)}, {name: entry}), name) == variable
    assert getattr(resolve({}, {}, {name: str(entry)}), name) == entry
    assert getattr(resolve({name: None}, {}, {}), name) == setting.default


def bad_values() -> list[tuple[Setting, Any]]:
    found: list[tuple[Setting, Any]] = []
    for setting in SETTINGS:
        if setting.choices:
            found += [(setting, "abacus"), (setting, ""), (setting, 3)]
        elif isinstance(setting.default, str):
            found += [(setting, True), (setting, ["x"])]
        else:
            found += [(setting, v) for v in ("many", "", True, math.nan, math.inf, -math.inf, "nan", setting.most + 1, setting.least - 1, 10**400, [], {})]
            found += [(setting, 1.5), (setting, "1.5")] if isinstance(setting.default, int) else []
    return found


@pytest.mark.parametrize(("setting", "value"), bad_values(), ids=lambda v: v.name if isinstance(v, Setting) else str(v)[:12])
def test_bad_value_names_setting_source_finding_and_expectation(setting: Setting, value: Any) -> None:
    sources: list[tuple[str, Any]] = [(setting.flag, ({setting.name: value}, {}, {})), ("yoke.yaml", ({}, {}, {setting.name: value}))]
    if isinstance(value, str):
        sources.append((setting.variable, ({}, {setting.variable: value}, {})))
    for source, places in sources:
        with pytest.raises(SettingError) as caught:
            resolve(*places)
        message = str(caught.value)
        assert message.startswith(f"{source} sets {setting.name} to {value!r}; expected ")


@pytest.mark.parametrize(("flags", "file", "source"), [({"colour": "red"}, {}, "a flag"), ({}, {"colour": "red"}, "yoke.yaml")])
def test_unknown_settings_are_refused_with_the_known_ones(flags: dict[str, Any], file: dict[str, Any], source: str) -> None:
    with pytest.raises(SettingError, match=f"{source} sets 'colour'.*known are api_key.*wire_type"):
        resolve(flags, {}, file)


def test_foreign_environment_variables_are_nobodys_business() -> None:
    assert resolve({}, {"YOKE_COLOUR": "red", "PORT": "1", "HOST": "x"}, {}) == resolve({}, {}, {})


@given(name=st.sampled_from([s.name for s in SETTINGS]), text=st.text(max_size=8))
def test_any_text_is_a_value_in_bounds_or_refused(name: str, text: str) -> None:
    setting = next(s for s in SETTINGS if s.name == name)
    try:
        value = getattr(resolve({}, {setting.variable: text}, {}), name)
    except SettingError:
        return
    assert type(value) is type(setting.default)
    if not isinstance(value, str):
        assert setting.least <= value <= setting.most
