"""Names say what a thing is: no room for leftovers, and a sentence for everything public."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "yoke"
MODULES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN = {"utils", "util", "common", "helpers", "helper", "manager", "managers", "misc"}

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Documented]]:
    """Public functions and classes, and the public ones inside public classes."""
    for node in body:
        if isinstance(node, Documented) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, prefix + node.name + ".")


def is_property_setter(node: Documented) -> bool:
    return any(isinstance(decorator, ast.Attribute) and decorator.attr in {"setter", "deleter"} for decorator in node.decorator_list)


def test_there_is_something_to_check() -> None:
    assert len(MODULES) > 20


def test_no_module_is_a_drawer_for_leftovers() -> None:
    drawers = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*") if path.stem in FORBIDDEN]
    assert not drawers, f"find the room where each of these belongs: {drawers}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_everything_public_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    silent = [name for name, node in public(tree.body) if not ast.get_docstring(node) and not is_property_setter(node)]
    assert not silent, f"without a docstring: {silent}"
    assert ast.get_docstring(tree), "the module says nothing about itself"
