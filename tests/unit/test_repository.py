"""What the repository says of itself is so: versions, files that documents name, settings, benchmarks, entry points."""

import re
import tomllib
from pathlib import Path

import pytest

import yoke
from yoke.core.settings import SETTINGS

ROOT = Path(__file__).resolve().parents[2]
WAY_HEADING = "## The way of a prompt in eight files"
DOCUMENTS = sorted(path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))


def links_of(text: str) -> list[str]:
    """Targets of relative links in Markdown, without anchors."""
    targets = (target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text))
    return [target for target in targets if target and "://" not in target]


def section(text: str, heading: str) -> str:
    """The text below a heading, up to the next of its level."""
    assert heading in text, f"no heading {heading!r}"
    level = heading.split()[0]
    return text.split(heading, 1)[1].split(f"\n{level} ", 1)[0]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_of_a_document_lead_somewhere(path: Path) -> None:
    dead = [target for target in links_of(path.read_text(encoding="utf-8")) if not (path.parent / target).exists()]
    assert not dead, f"{path.name} links to {dead}, which are not there"


def test_anchors_in_the_readme_are_headings() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    headings = {line.lstrip("# ").lower().replace(" ", "-") for line in text.splitlines() if line.startswith("#")}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


def test_the_way_of_a_prompt_names_eight_modules_that_exist() -> None:
    way = section((ROOT / "README.md").read_text(encoding="utf-8"), WAY_HEADING)
    named = re.findall(r"^\d+\. \[([^\]]+)\]\(([^)]+)\)", way, re.MULTILINE)
    assert len(named) == 8
    assert all(shown == target and (ROOT / target).is_file() for shown, target in named)


def test_every_room_is_in_the_readme_the_architecture_and_the_import_rules() -> None:
    rooms = {path.parent.name for path in (ROOT / "src" / "yoke").glob("*/__init__.py")}
    tree = section((ROOT / "README.md").read_text(encoding="utf-8"), "## The tree")
    assert set(re.findall(r"^  (\w+)/", tree, re.MULTILINE)) == rooms
    table = section((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), "## Rooms")
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == rooms
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    assert {room.strip() for layer in layers for room in layer.split("|")} == rooms


def test_the_changelog_has_a_section_for_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[([^\]]+)\]", text, re.MULTILINE)
    assert versions
    assert yoke.__version__ in versions[:2], "its section stands first, or after one for what is unreleased"


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_a_setting_is_documented(setting: object) -> None:
    name = getattr(setting, "name", "")
    page = ROOT / "docs" / "settings.md"
    assert re.search(rf"^\| {name} \|", page.read_text(encoding="utf-8"), re.MULTILINE), f"{name} is missing from docs/settings.md"


def test_no_setting_is_documented_that_is_not_there() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| (\w+) \|", page, re.MULTILINE)) - {"name"}
    assert rows == {setting.name for setting in SETTINGS}


def test_decisions_are_numbered_without_gaps() -> None:
    numbers = sorted(int(path.name[:4]) for path in (ROOT / "docs" / "decisions").glob("*.md"))
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "decisions").glob("*.md")), ids=lambda path: path.name[:4])
def test_a_decision_says_why_what_and_until_when(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"# {int(path.name[:4])}. ")
    assert all(f"**{part}.**" in text for part in ("Context", "Choice", "What would change our mind"))


def test_continuous_integration_runs_the_readmes_test_command_and_nothing_else() -> None:
    lines = [line for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert lines[0] == "set -eu"
    assert lines[-1] in (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(line.startswith(("set ", "cd ", "python3 dev.py test")) for line in lines)


def test_every_kind_of_test_is_in_the_readme() -> None:
    kinds = {path.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").rglob("test_*.py")}
    text = section((ROOT / "README.md").read_text(encoding="utf-8"), "## What is tested where")
    assert kinds <= set(re.findall(r"^\| `tests/(\w+)` \|", text, re.MULTILINE))


def test_the_commands_in_the_readme_are_the_ones_that_exist() -> None:
    from typer.main import get_command

    from yoke.cli.main import app

    text = section((ROOT / "README.md").read_text(encoding="utf-8"), "## On real machines")
    named = set(re.findall(r"^\| `yoke (\w+)", text, re.MULTILINE))
    assert named == set(get_command(app).commands)  # type: ignore[attr-defined]
