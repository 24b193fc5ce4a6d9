"""Sets this project up, shows it, checks it and tests it. Standard library only; ``python3 dev.py`` lists what it can do.

Knows the order of the steps; knows nothing of Yoke's insides: it uses the commands as anybody would.
"""

from __future__ import annotations  # so that an old Python can still read this file, and be told that it is too old

import argparse
import ast
import contextlib
import hashlib
import http.client
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
CACHE = ROOT / ".cache"
STAMP = VENV / "yoke-setup.json"
MODEL = CACHE / "kjv-9m.gguf"
LEAST_PYTHON = (3, 11)
TORCH = "torch==2.13.0"  # the parity tests compare with it; installed in a step of its own because it is large
SHOWN_LINES = 30
STILL_S = 30.0
START_S, END_S, ANSWER_S = 180.0, 20.0, 120.0

PROMPT = "And the LORD said unto Moses, "
TOKENS = 64
NODES = 3
NODE_FLAGS = ["--cache-type", "f32", "--state-dir", str(CACHE / "demo-node")]  # nothing rounded, and a key of the demo's own instead of this user's

COMPILER_HINTS = {
    "Linux": "Install one, for example with `sudo apt install g++` (Debian, Ubuntu), `sudo dnf install gcc-c++` (Fedora) or `sudo pacman -S gcc` (Arch).",
    "Darwin": "Install Apple's command line tools with `xcode-select --install`.",
    "Windows": "Install the Build Tools for Visual Studio with the workload `Desktop development with C++`.",
}
PYTHON_HINTS = {
    "Linux": "Install one, for example with `sudo apt install python3 python3-venv` (Debian 12, Ubuntu 24.04 or later) or `sudo dnf install python3`.",
    "Darwin": "Install one from python.org, or with `brew install python`.",
    "Windows": "Install one from python.org, or with `winget install Python.Python.3.13`, and use `py dev.py` from a new terminal.",
}


class StepFailed(Exception):
    """A step went wrong; the message says what to do."""


def stop(message: str) -> NoReturn:
    """Give up, in plain words."""
    raise StepFailed(message)


def say(text: str) -> None:
    """A line for the person, at once even through a pipe."""
    print(text, flush=True)


# Setting up


def require_python() -> None:
    """Go on with a newer Python if this one is too old; end if there is none."""
    if sys.version_info >= LEAST_PYTHON:
        return
    for minor in range(20, LEAST_PYTHON[1] - 1, -1):
        newer = shutil.which(f"python3.{minor}")
        if newer is not None:
            say(f"This is Python {platform.python_version()}; going on with {newer}.")
            sys.exit(subprocess.call([newer, *sys.argv]))
    stop(f"Yoke needs Python {LEAST_PYTHON[0]}.{LEAST_PYTHON[1]} or later; this is {platform.python_version()}. {PYTHON_HINTS.get(platform.system(), '')}")


def has_compiler() -> bool:
    """Whether llama-cpp-python's build would find a compiler."""
    if platform.system() == "Darwin":  # c++ is there even without the tools; then all it does is ask for them
        return shutil.which("xcode-select") is not None and subprocess.run(["xcode-select", "-p"], capture_output=True, check=False).returncode == 0
    if any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        return True
    finder = Path(os.environ.get("PROGRAMFILES(X86)", "")) / "Microsoft Visual Studio" / "Installer" / "vswhere.exe"
    if platform.system() != "Windows" or not finder.exists():
        return False
    question = [str(finder), "-products", "*", "-requires", "Microsoft.VisualStudio.Component.VC.Tools.x86.x64", "-property", "installationPath"]
    return bool(subprocess.run(question, capture_output=True, check=False).stdout.strip())


def python(*arguments: str) -> list[str]:
    """A call of the virtual environment's Python. Programs are started as its modules: their own scripts hold a path, and break when this directory moves."""
    return [str(VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")), *arguments]


def venv_python_version() -> str:
    """The virtual environment's Python version; empty if there is no environment that works."""
    try:
        asked = subprocess.run(python("-c", "import sys, pip; print(*sys.version_info[:3], sep='.')"), capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return asked.stdout.strip() if asked.returncode == 0 else ""


def set_up(*, dev: bool) -> None:
    """Make the virtual environment and install what is missing in it; with ``dev`` also what checks and tests need."""
    version = venv_python_version()
    if not version or tuple(map(int, version.split(".")[:2])) < LEAST_PYTHON:
        hint = "On Debian and Ubuntu, `sudo apt install python3-venv` may be missing."
        quiet("making a virtual environment in .venv", [sys.executable, "-m", "venv", "--clear", str(VENV)], hint)
        version = venv_python_version()
    project = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + f"{version} {ROOT}".encode()).hexdigest()
    done = read_stamp()
    if dev and done.get("torch") != TORCH + version:
        install(f"installing {TORCH} (only the tests need it)", [TORCH])
        STAMP.write_text(json.dumps(done := {**done, "torch": TORCH + version}), encoding="utf-8")
    if project not in (done.get("dev"), None if dev else done.get("demo")):
        if not has_compiler():
            hint = COMPILER_HINTS.get(platform.system(), "Install one.")
            stop(f"A C++ compiler is needed to compile ggml, and none was found (looked for c++, g++, clang++, cl). {hint} Then run this again.")
        install("installing Yoke and what it needs (the first time, ggml is compiled: some minutes)", ["-e", ".[dev]" if dev else "."])
        STAMP.write_text(json.dumps({**done, "dev" if dev else "demo": project}), encoding="utf-8")


def install(words: str, what: list[str]) -> None:
    """One call of pip."""
    quiet(words, python("-m", "pip", "install", "--disable-pip-version-check", *what))


def read_stamp() -> dict[str, str]:
    """What was installed when, by name; a stamp that cannot be read is none."""
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def quiet(words: str, command: Sequence[str], hint: str = "") -> None:
    """Run a step whose output matters only if it fails."""
    say(f"- {words} ...")
    CACHE.mkdir(exist_ok=True)
    log, started = CACHE / "step.log", time.monotonic()
    with log.open("wb") as output, subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT) as child:
        while True:
            try:
                code = child.wait(STILL_S)
                break
            except subprocess.TimeoutExpired:
                say(f"  still at it after {time.monotonic() - started:.0f} s")
    if code != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:]
        stop("\n".join([*lines, f"That failed (exit code {code}): {words}. The lines above are the end of what it said. {hint}".rstrip()]))
    say(f"  done in {time.monotonic() - started:.1f} s")


def environment() -> dict[str, str]:
    """The environment of all children: UTF-8 on every system."""
    return {**os.environ, "PYTHONUTF8": "1"}


# Checking


def checks() -> list[tuple[str, list[str]]]:
    """What must hold before any test is run."""
    return [
        ("ruff check", python("-m", "ruff", "check", ".")),
        ("ruff format", python("-m", "ruff", "format", "--check", ".")),
        ("mypy", python("-m", "mypy")),
        ("import rules", python("-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache", "--no-logo")),
        ("docstrings", python("-m", "interrogate", "src", "dev.py")),
    ]


def run_all(steps: Sequence[tuple[str, list[str]]]) -> int:
    """Run every step, even after one failed, and sum up."""
    results: list[tuple[str, int, float]] = []
    for name, command in steps:
        say(f"\n== {name}")
        started = time.monotonic()
        try:
            code = subprocess.call(command, cwd=ROOT, env=environment())
        except OSError as error:
            say(f"{command[0]} cannot be started: {error}")
            code = 127
        results.append((name, code, time.monotonic() - started))
        say(f"== {name}: {'passed' if code == 0 else f'FAILED (exit code {code})'} in {results[-1][2]:.1f} s")
    say("\nSummary")
    for name, code, seconds in results:
        say(f"  {'passed' if code == 0 else 'FAILED'}  {name:14} {seconds:6.1f} s")
    return 0 if all(code == 0 for _, code, _ in results) else 1


def benchmarks() -> dict[str, str]:
    """The programs in benchmarks/ by name, each with the first line of what it says of itself."""
    found = {}
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "__main__" in text:
            found[path.stem] = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    return found


# Showing


def demo() -> int:
    """One model, once in one process and once split over three node processes: the same text."""
    model = convert()
    say(f"\nThe prompt is {PROMPT!r}. First, the whole model in one process:")
    alone = ask_alone(model)
    say(f"{PROMPT}{alone['text']}\n[{alone['completion_tokens']} tokens, {alone['decode_tokens_per_s']:.1f} tokens/s]")
    say(f"\nNow the same model split over {NODES} node processes, each with its own key, joined over encrypted sockets, behind the HTTP API:")
    with served(model) as url:
        text, n_tokens, tokens_per_s = stream(url)
    say(f"[{n_tokens} tokens, {tokens_per_s:.1f} tokens/s]")
    say("(All nodes share this machine's cores, so nothing gets faster by being split here. What it shows is that the text does not change.)")
    if text != alone["text"]:
        say("\nFAILED: the text of the split model differs from the text of the single process.")
        return 1
    say(f"\nThe text of the model split over {NODES} nodes equals the text of the single process, character by character. All processes have ended.")
    return 0


def convert() -> str:
    """The demo's model as GGUF, with unrounded weights; made once."""
    source = ROOT / "models" / "kjv-9m"
    makers = [*source.iterdir(), *(ROOT / "src" / "yoke" / "weights").glob("*.py")]
    if not MODEL.exists() or MODEL.stat().st_mtime < max(path.stat().st_mtime for path in makers):
        fresh = MODEL.with_name("kjv-9m.new.gguf")
        quiet("converting models/kjv-9m to .cache/kjv-9m.gguf", python("-m", "yoke", "convert", str(source), str(fresh), "--type", "f32"))
        fresh.replace(MODEL)
    return str(MODEL)


def ask_alone(model: str) -> dict[str, Any]:
    """What one process, with the whole model, makes of the prompt."""
    command = python("-m", "yoke", "run", model, "-p", PROMPT, "-n", str(TOKENS), "--json", *NODE_FLAGS)
    asked = subprocess.run(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, encoding="utf-8", check=False)
    if asked.returncode != 0:
        stop(f"`yoke run` ended with exit code {asked.returncode}; what it said stands above.")
    answer: dict[str, Any] = json.loads(asked.stdout)
    return answer


@contextlib.contextmanager
def served(model: str) -> Iterator[str]:
    """``yoke serve`` over several node processes; yields the address that it prints, and ends it with the block."""
    command = python("-m", "yoke", "serve", model, "--local-nodes", str(NODES), "--port", "0", *NODE_FLAGS)
    group: dict[str, Any] = {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0), "start_new_session": os.name == "posix"}
    server = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, encoding="utf-8", **group)
    watchdog = threading.Timer(START_S, server.kill)
    watchdog.start()
    try:
        url = read_url(server)
        watchdog.cancel()
        yield url
    finally:
        watchdog.cancel()
        end(server)
    with contextlib.suppress(OSError), socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=1.0):
        stop(f"The server has ended, but something still listens at {url}.")


def read_url(server: subprocess.Popen[str]) -> str:
    """The server's address, from the first line that has one."""
    for line in server.stdout or ():
        say(line.rstrip())
        for word in line.split():
            if word.startswith("http://"):
                return word
    stop(f"`yoke serve` ended or hung before it served (exit code {server.poll()}); what it said stands above.")


def stream(url: str) -> tuple[str, int, float]:
    """Ask for the prompt's continuation and print it as it comes: the text, its tokens, and tokens a second as the server measured them."""
    body = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}, "yoke_timings": True}
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=ANSWER_S)
    pieces: list[str] = []
    n_tokens, tokens_per_s = 0, 0.0
    print(PROMPT, end="", flush=True)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            stop(f"The server answered {response.status}: {response.read(2000).decode(errors='replace')}")
        for line in response:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            event = json.loads(line[len(b"data: ") :])
            if "error" in event:
                stop(f"The stream ended with an error: {event['error'].get('message')}")
            for choice in event.get("choices", ()):
                pieces.append(choice["text"])
                print(choice["text"], end="", flush=True)
            n_tokens = (event.get("usage") or {}).get("completion_tokens", n_tokens)
            tokens_per_s = (event.get("yoke") or {}).get("decode_tokens_per_s", tokens_per_s)
    say("")
    return "".join(pieces), n_tokens, tokens_per_s


def end(server: subprocess.Popen[str]) -> None:
    """End the server as Ctrl-C would, and see that it left nothing behind."""
    if server.poll() is None:
        server.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGINT))
    try:
        server.wait(END_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
        sweep(server.pid)
        stop(f"The server did not end within {END_S:.0f} s and was killed.")
    if server.stdout is not None:
        server.stdout.close()
    if sweep(server.pid):
        stop("The server had ended but processes that it started had not; they were killed.")


def sweep(group: int) -> bool:
    """Kill what is left of a process group; whether anything was. Windows has no such groups: there the closed port must do."""
    if sys.platform == "win32":
        return False
    try:
        os.killpg(group, 0)
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


# Choosing


def run_benchmark(name: str | None, arguments: Sequence[str]) -> int:
    """Run one of the programs in benchmarks/, or list them."""
    known = benchmarks()
    if name not in known:
        listed = "\n".join(f"  {key:20} {line}" for key, line in known.items())
        say(f"{'Which one?' if name is None else f'There is no benchmark {name!r}.'} Known are:\n{listed}")
        return 2
    set_up(dev=True)
    return subprocess.call(python(str(ROOT / "benchmarks" / f"{name}.py"), *arguments), cwd=ROOT, env=environment())


def perform(task: str, name: str | None, arguments: Sequence[str]) -> int:
    """Do one task; its exit code."""
    require_python()
    if task == "bench":
        return run_benchmark(name, arguments)
    set_up(dev=task != "demo")
    if task == "demo":
        return demo()
    if task == "check":
        return run_all(checks())
    if task == "test":
        return run_all([*checks(), ("tests", python("-m", "pytest"))])
    say(f"Everything is installed in .venv; the command yoke lies in {Path(python()[0]).parent}.")
    return 0


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="dev.py", description="Sets up, shows, checks and tests Yoke.")
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    tasks.add_parser("demo", help="a small model split over three local node processes writes the same text as one process")
    tasks.add_parser("test", help="all checks and all tests that this machine can run")
    tasks.add_parser("check", help="the checks alone: lint, format, types, import rules, docstrings")
    tasks.add_parser("setup", help="make the virtual environment with all that development needs")
    bench = tasks.add_parser("bench", help="run a benchmark; without a name, list them")
    bench.add_argument("name", nargs="?")
    bench.add_argument("arguments", nargs=argparse.REMAINDER)
    chosen = parser.parse_args()
    started = time.monotonic()
    try:
        code = perform(chosen.task, getattr(chosen, "name", None), getattr(chosen, "arguments", ()))
    except StepFailed as failure:
        print(failure, file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    say(f"\n{chosen.task}: {'done' if code == 0 else 'FAILED'} in {time.monotonic() - started:.1f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
