"""What fits on a screen can be read. Caps over all code; exceptions are named, with their reason, and go when they are no longer needed.

A function's length is that of its body: decorators, signature and docstring are not counted. ``self`` and ``cls`` are no parameters.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
MAX_PARAMETERS = 7
MAX_PUBLIC_METHODS = 15

_FLAGS = "a command's parameters are its flags"
EXCEPTIONS = {
    "src/yoke/cli/bench.py: bench: parameters": _FLAGS,
    "src/yoke/cli/chat.py: chat: parameters": _FLAGS,
    "src/yoke/cli/join.py: join: parameters": _FLAGS,
    "src/yoke/cli/plan.py: plan: parameters": _FLAGS,
    "src/yoke/cli/run.py: run: parameters": _FLAGS,
    "src/yoke/cli/serve.py: serve: parameters": _FLAGS,
}


def sources() -> Iterator[Path]:
    yield from sorted((ROOT / "src" / "yoke").rglob("*.py"))
    yield from sorted((ROOT / "benchmarks").rglob("*.py"))
    if (ROOT / "dev.py").exists():
        yield ROOT / "dev.py"


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def n_parameters(arguments: ast.arguments) -> int:
    named = [argument for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs) if argument.arg not in {"self", "cls"}]
    return len(named) + (arguments.vararg is not None) + (arguments.kwarg is not None)


def excesses(text: str) -> Iterator[tuple[str, int]]:
    """What goes over a cap in one file, and by what number."""
    if (n_lines := len(text.splitlines())) > MAX_FILE_LINES:
        yield "file: lines", n_lines
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if (lines := body_lines(node)) > MAX_FUNCTION_LINES:
                yield f"{node.name}: lines", lines
            if (parameters := n_parameters(node.args)) > MAX_PARAMETERS:
                yield f"{node.name}: parameters", parameters
        elif isinstance(node, ast.ClassDef):
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) and not item.name.startswith("_")]
            if len(methods) > MAX_PUBLIC_METHODS:
                yield f"{node.name}: public methods", len(methods)


def test_caps_hold_but_for_the_named_exceptions() -> None:
    found = {f"{path.relative_to(ROOT).as_posix()}: {what}": number for path in sources() for what, number in excesses(path.read_text(encoding="utf-8"))}
    over = {place: number for place, number in found.items() if place not in EXCEPTIONS}
    assert not over, f"over the caps: {over}"
    unused = EXCEPTIONS.keys() - found.keys()
    assert not unused, f"exceptions that are no longer needed: {sorted(unused)}"


def test_every_cap_is_noticed() -> None:
    function = '@wraps\ndef f(self, a, *b, c=1, **d):\n    """Text\n\n    of three lines."""\n' + "    a = 1\n" * (MAX_FUNCTION_LINES + 1)
    many = "async def g(a, b, /, c, d, *, e, f, g, h): ...\n"
    methods = "class C:\n" + "".join(f"    def m{index}(self): ...\n" for index in range(MAX_PUBLIC_METHODS + 1)) + "    def _own(self): ...\n"
    assert dict(excesses(function)) == {"f: lines": MAX_FUNCTION_LINES + 1}
    assert dict(excesses(many)) == {"g: parameters": 8}
    assert dict(excesses(methods)) == {"C: public methods": MAX_PUBLIC_METHODS + 1}
    assert dict(excesses("\n" * (MAX_FILE_LINES + 1))) == {"file: lines": MAX_FILE_LINES + 1}
