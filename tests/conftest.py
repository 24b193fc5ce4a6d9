"""What tests with real processes share: a model, the command `yoke` in a home of its own, and the certainty that nothing of it is left running."""

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from yoke.testing.models import write_random_model
from yoke.weights.convert import convert

ROOT = Path(__file__).resolve().parents[1]
KJV = ROOT / "models" / "kjv-9m"
MARK = "YOKE_TEST_HOME"
READY_S = 60.0
GONE_S = 5.0


def wait_until(condition, what, seconds=10.0):
    """Poll ``condition`` until it is true and return its value; fail with ``what`` after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:g} s: {what() if callable(what) else what}")
        time.sleep(0.02)
    return value


class Running:
    """A process of the command, with everything that it has printed so far."""

    def __init__(self, command, *, home, env, cwd, stdin=subprocess.DEVNULL, stdout=None, new_session=False):
        number = len(list(home.glob("*.out")))
        self.paths = home / f"{number}.out", home / f"{number}.err"
        with self.paths[0].open("wb") as out, self.paths[1].open("wb") as err:
            self.process = subprocess.Popen(command, stdin=stdin, stdout=stdout or out, stderr=err, env=env, cwd=cwd, start_new_session=new_session)

    @property
    def pid(self):
        return self.process.pid

    @property
    def out(self):
        return self.paths[0].read_text(errors="replace")

    @property
    def err(self):
        return self.paths[1].read_text(errors="replace")

    def story(self):
        return f"exit {self.process.poll()}\n--- standard output\n{self.out[-4000:]}\n--- standard error\n{self.err[-4000:]}"

    def wait_for(self, pattern, *, stream="out", seconds=READY_S):
        """The first match of ``pattern`` in what was printed; fails when the process ends without it."""

        def found():
            is_over = self.process.poll() is not None
            match = re.search(pattern, getattr(self, stream))
            if match is None and is_over:
                pytest.fail(f"ended without printing {pattern!r}: {self.story()}")
            return match

        return wait_until(found, lambda: f"{pattern!r} was not printed: {self.story()}", seconds)

    def wait(self, seconds=30.0):
        """The exit code."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"did not end in {seconds:g} s: {self.story()}")
        assert "Traceback" not in self.err, self.err
        return code

    def stop(self, signal_number=signal.SIGINT, seconds=10.0):
        """Send a signal and return the exit code."""
        self.process.send_signal(signal_number)
        return self.wait(seconds)


class Server(Running):
    """`yoke serve`, once it answers."""

    url = ""

    def ready(self):
        self.url = self.wait_for(r"serving \S+ at (http://\S+)")[1]
        return self

    @property
    def model(self):
        return re.search(r"serving (\S+) at", self.out)[1]

    def http(self, timeout=20.0):
        return httpx.Client(base_url=self.url, timeout=timeout, trust_env=False)

    def openai(self):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60.0)

    def complete(self, prompt, n=24, **fields):
        """The text of a completion; the likeliest tokens unless asked otherwise."""
        body = {"prompt": prompt, "max_tokens": n, "temperature": 0, **fields}
        with self.http() as client:
            answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    def status(self):
        with self.http() as client:
            return client.get("/yoke/status").json()

    def wait_idle(self, seconds=3.0):
        """Until no session is running or waiting."""

        def is_idle():
            status = self.status()
            return status["running"] == status["queued"] == 0

        wait_until(is_idle, "a session still runs", seconds)

    @contextlib.contextmanager
    def stream(self, prompt="abc", n=8000, **fields):
        """A streamed completion that goes on long after the model would stop; yields its lines after the first has come."""
        body = {"prompt": prompt, "max_tokens": n, "temperature": 0, "ignore_eos": True, "stream": True, **fields}
        with self.http() as client, client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
            next(lines)
            yield lines


class Yoke:
    """The command in a home of its own: directories, key, temporary files, and a mark by which every process that comes of it is found."""

    def __init__(self, home: Path, program=(sys.executable, "-m", "yoke")):
        self.home, self.program = home, list(program)
        self.mark = secrets.token_hex(8)
        self.started = []
        self.temporary = home / "tmp"
        self.temporary.mkdir(parents=True)
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("YOKE_", "XDG_"))}
        self.env = plain | {
            "HOME": str(home),
            "XDG_DATA_HOME": str(home / "data"),
            "TMPDIR": str(self.temporary),
            "YOKE_PROFILE": "quick",  # measuring takes seconds, and each home is a machine that nobody has measured
            "YOKE_THREADS": "1",  # the machine's few cores are shared by the nodes of a test
            "PYTHONWARNINGS": "error,default::ResourceWarning",
            "NO_COLOR": "1",
            "COLUMNS": "160",
            MARK: self.mark,
        }

    def start(self, *arguments, kind=Running, env=None, cwd=None, prefix=(), **options):
        """Start the command and return at once."""
        command = [*prefix, *self.program, *map(str, arguments)]
        running = kind(command, home=self.home, env=self.env | (env or {}), cwd=cwd or self.home, **options)
        running.yoke = self
        self.started.append(running)
        return running

    def run(self, *arguments, code=0, seconds=60.0, env=None, **options):
        """Run the command to its end, which must be exit code ``code``."""
        running = self.start(*arguments, env=env, **options)
        assert running.wait(seconds) == code, running.story()
        return running

    def serve(self, model, *arguments, **options):
        """A server that answers, on a port of the system's choice."""
        return self.start("serve", model, "--port", 0, *arguments, kind=Server, **options).ready()

    def processes(self):
        """Every living process that came of this command, orphans too."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def wait_gone(self, seconds=GONE_S):
        """Fail if a process is left after ``seconds``."""
        wait_until(lambda: not self.processes(), lambda: f"still running: {[p.cmdline() for p in self.processes()]}", seconds)

    def leftovers(self):
        """Temporary files that were not removed."""
        return sorted(path.name for path in self.temporary.iterdir())

    def kill_all(self):
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        for running in self.started:
            running.process.wait(10)


@pytest.fixture(scope="session", name="yoke_in")
def _yoke_in():
    """:func:`yoke_in`, for fixtures of modules."""
    return yoke_in


@contextlib.contextmanager
def yoke_in(home: Path) -> Iterator[Yoke]:
    """The command for one test or one module; when it is over, no process of it may be left."""
    if sys.platform == "win32":
        pytest.skip("processes are ended here by signals that only POSIX has")
    command = Yoke(home)
    try:
        yield command
        command.wait_gone()
    finally:
        command.kill_all()


@pytest.fixture
def server_kind():
    """:class:`Server`, for tests that must do something before it answers."""
    return Server


@pytest.fixture(name="wait_until")
def _wait_until():
    """:func:`wait_until`, for tests."""
    return wait_until


@pytest.fixture(scope="session")
def repository():
    """The project's directory."""
    return ROOT


@pytest.fixture
def yoke(tmp_path):
    """The command in a fresh home."""
    with yoke_in(tmp_path / "home") as command:
        yield command


@pytest.fixture
def make_yoke(tmp_path):
    """More homes: other machines, as far as the command knows."""
    with contextlib.ExitStack() as stack:
        yield lambda name: stack.enter_context(yoke_in(tmp_path / name))


@pytest.fixture(scope="session")
def kjv(tmp_path_factory):
    """The small trained model of this repository as a GGUF file; its texts are worth comparing."""
    path = tmp_path_factory.mktemp("models") / "kjv.gguf"
    convert(KJV, path, "F32", lambda _stage, _share: None)
    return path


@pytest.fixture(scope="session")
def endless(tmp_path_factory):
    """A tiny random model with so long a context that a stream of it is still running when something happens to it."""
    path = tmp_path_factory.mktemp("models") / "endless.gguf"
    write_random_model(path, architecture="llama", n_blocks=6, width=64, n_heads=4, n_kv_heads=2, head_dim=16, columns=128, vocabulary=400, context=8192)
    return path


@pytest.fixture(scope="session")
def pool(tmp_path_factory, kjv):
    """A server of the trained model over three local nodes, for tests that leave it as it was."""
    with yoke_in(tmp_path_factory.mktemp("pool") / "home") as command:
        server = command.serve(kjv, "--local-nodes", 3, "--chat-template", _template(command.home))
        yield server
        assert server.stop() == 130
        assert command.leftovers() == []


def _template(home):
    path = home / "template.jinja"
    path.write_text("{% for message in messages %}{{ message.content }}\n{% endfor %}")
    return path
