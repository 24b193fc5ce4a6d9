"""A conversation at a terminal."""

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest

pty = pytest.importorskip("pty")
pytestmark = pytest.mark.processes

TAKE_TERMINAL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"


class Terminal:
    """`yoke chat` with a terminal of its own, so that Ctrl-C and Ctrl-D do what they do for a person."""

    def __init__(self, yoke, *arguments):
        self.screen = ""
        self.end, far = pty.openpty()
        command = [*yoke.program, "chat", *map(str, arguments)]
        options = {"stdin": far, "stdout": far, "stderr": far, "env": yoke.env | {"TERM": "dumb"}, "cwd": yoke.home}
        self.process = subprocess.Popen([sys.executable, "-c", TAKE_TERMINAL, *command], start_new_session=True, **options)
        os.close(far)

    def read(self, seconds):
        """Take what has come on the screen."""
        if select.select([self.end], [], [], seconds)[0]:
            with contextlib.suppress(OSError):  # nobody has the terminal open any more
                self.screen += os.read(self.end, 65536).decode(errors="replace")

    def wait_for(self, pattern, seconds=60.0):
        """Read until ``pattern`` is there; what was before it is forgotten."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.screen)):
            if time.monotonic() > deadline or self.process.poll() is not None:
                pytest.fail(f"{pattern!r} did not come; exit {self.process.poll()}, on the screen: {self.screen[-2000:]}")
            self.read(0.1)
        before, self.screen = self.screen[: found.start()], self.screen[found.end() :]
        return before

    def type(self, text):
        os.write(self.end, text.encode())

    def wait(self, seconds=10.0):
        """The exit code; meanwhile the screen is read, or the other side could not write."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"did not end; on the screen: {self.screen[-2000:]}"
            self.read(0.05)
        self.read(0)
        assert "Traceback" not in self.screen
        return self.process.returncode


@pytest.fixture
def chat(yoke):
    """Opens a conversation; closes its terminal in the end."""
    opened = []

    def start(*arguments):
        opened.append(Terminal(yoke, *arguments))
        return opened[-1]

    yield start
    for terminal in opened:
        os.close(terminal.end)
        with contextlib.suppress(ProcessLookupError):
            terminal.process.kill()
        terminal.process.wait(10)


def test_a_model_without_a_template_continues_each_line_until_bye(yoke, chat, kjv):
    terminal = chat(kjv, "--temperature", 0, "-n", 8)
    terminal.wait_for("it continues your text instead of answering it")
    terminal.wait_for("> ")
    terminal.type("And the LORD said unto\n")
    assert " Moses" in terminal.wait_for("\n> ")
    terminal.type("\n")
    terminal.wait_for("> ")
    terminal.type("In the\n")
    terminal.wait_for("\n> ")
    terminal.type("/bye\n")
    assert terminal.wait() == 0
    yoke.wait_gone()


def test_a_template_answers_with_the_whole_conversation(yoke, chat, kjv):
    (yoke.home / "t.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    terminal = chat(kjv, "--temperature", 0, "-n", 8, "--system", "And the LORD said", "--chat-template", "t.jinja")
    terminal.wait_for("> ")
    terminal.type(" unto\n")
    assert " Moses" in terminal.wait_for("\n> ")
    terminal.type("\x04")
    assert terminal.wait() == 0


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(yoke, chat, endless):
    terminal = chat(endless, "-n", 8000, "--local-nodes", 2, "--temperature", 0)  # a drawn token may be the end
    for _ in range(2):
        terminal.wait_for("> ")
        terminal.type("abc\n")
        terminal.wait_for("abc\r\n.{20}")
        terminal.type("\x03")
        terminal.wait_for(r"\[stopped\]")
    terminal.wait_for("> ")
    assert sum("join" in process.cmdline() for process in yoke.processes()) == 1
    terminal.type("\x03")
    assert terminal.wait() == 130
    yoke.wait_gone()
    assert yoke.leftovers() == []


def test_ctrl_c_at_the_first_prompt_leaves(yoke, chat, endless):
    terminal = chat(endless)
    terminal.wait_for("> ")
    terminal.type("\x03")
    assert terminal.wait() == 130
    yoke.wait_gone()


@pytest.mark.parametrize("is_answering", [False, True], ids=["at the prompt", "while it answers"])
def test_sigterm_ends_a_conversation(yoke, chat, endless, is_answering):
    terminal = chat(endless, "-n", 8000)
    terminal.wait_for("> ")
    if is_answering:
        terminal.type("abc\n")
        terminal.wait_for("abc\r\n.{20}")
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.wait() == 130
    yoke.wait_gone()


def test_a_line_that_is_too_long_is_refused_and_the_conversation_goes_on(yoke, chat, kjv):
    terminal = chat(kjv, "--temperature", 0, "-n", 8, "--context", 32)
    terminal.wait_for("> ")
    terminal.type("word " * 60 + "\n")
    terminal.wait_for("error: the prompt is .* tokens long; the context holds 32")
    terminal.wait_for("> ")
    terminal.type("And the LORD said unto\n")
    assert " Moses" in terminal.wait_for("\n> ")
    terminal.type("/bye\n")
    assert terminal.wait() == 0


def test_a_conversation_is_read_from_a_pipe_or_a_file_too(yoke, kjv, tmp_path):
    (tmp_path / "lines").write_text("And the LORD said unto\nIn the\n")
    with (tmp_path / "lines").open() as lines:
        assert " Moses" in yoke.run("chat", kjv, "--temperature", 0, "-n", 4, stdin=lines).out
    read, write = os.pipe()
    os.write(write, b"And the LORD said unto\nIn the")
    os.close(write)
    try:
        assert " Moses" in yoke.run("chat", kjv, "--temperature", 0, "-n", 4, stdin=read).out
    finally:
        os.close(read)
