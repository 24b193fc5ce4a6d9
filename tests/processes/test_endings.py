"""However a command ends, nothing of it is left running, and nothing lies about."""

import contextlib
import os
import signal
import subprocess
import sys
import threading

import httpx
import pytest

pytestmark = pytest.mark.processes

if sys.platform == "win32":
    pytest.skip("these signals are POSIX's", allow_module_level=True)

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 130, signal.SIGHUP: 130, signal.SIGKILL: -9}


def check_ended(yoke, running, signal_number):
    """The exit code is right, all processes are gone, and so are temporary files unless there was no time to remove them."""
    assert running.wait(10) == CODES[signal_number]
    yoke.wait_gone()
    assert "Traceback" not in running.err
    if signal_number != signal.SIGKILL:
        assert yoke.leftovers() == []


def test_ctrl_c_while_the_program_is_read_is_no_traceback(yoke):
    command = [sys.executable, "-X", "importtime", "-m", "yoke", "run", "model.gguf", "-p", "a"]
    running = subprocess.Popen(command, env=yoke.env, stderr=subprocess.PIPE, text=True)
    told = []
    for line in running.stderr:
        told.append(line)
        if line.rstrip().endswith(" typer.colors"):
            running.send_signal(signal.SIGINT)
            break
    told += running.stderr
    assert running.wait(10) == 130
    running.stderr.close()
    assert not [line for line in told if "Traceback" in line]


@pytest.mark.parametrize("signal_number", SIGNALS, ids=lambda number: number.name)
def test_nothing_is_left_when_it_is_ended_while_nodes_start(yoke, kjv, wait_until, signal_number):
    running = yoke.start("serve", kjv, "--port", 0, "--local-nodes", 3)
    wait_until(lambda: len(yoke.processes()) >= 4, "local nodes did not start")
    running.process.send_signal(signal_number)
    check_ended(yoke, running, signal_number)


@pytest.mark.parametrize("signal_number", SIGNALS, ids=lambda number: number.name)
def test_nothing_is_left_when_it_is_ended_while_it_waits_for_a_node_to_join(yoke, kjv, signal_number):
    running = yoke.start("serve", kjv, "--port", 0, "--nodes", 2)
    running.wait_for("yoke join")
    running.process.send_signal(signal_number)
    check_ended(yoke, running, signal_number)


@pytest.mark.parametrize("signal_number", [*SIGNALS, signal.SIGHUP], ids=lambda number: number.name)
def test_nothing_is_left_when_it_is_ended_idle_and_in_the_middle_of_a_stream(yoke, endless, signal_number):
    server = yoke.serve(endless, "--local-nodes", 3)
    seen = []

    def read(lines):
        with contextlib.suppress(httpx.HTTPError):
            seen.extend(lines)

    with server.stream() as lines:
        reader = threading.Thread(target=read, args=(lines,))
        reader.start()
        server.process.send_signal(signal_number)
        check_ended(yoke, server, signal_number)
        reader.join(10)
        assert not reader.is_alive()
    if signal_number != signal.SIGKILL:
        assert "shutting down" in seen[-1]


@pytest.mark.parametrize("signal_number", SIGNALS, ids=lambda number: number.name)
def test_nothing_is_left_of_a_server_that_was_ended_idle(yoke, endless, signal_number):
    server = yoke.serve(endless, "--local-nodes", 2)
    server.process.send_signal(signal_number)
    check_ended(yoke, server, signal_number)


@pytest.mark.parametrize("signal_number", SIGNALS, ids=lambda number: number.name)
def test_nothing_is_left_of_a_run_in_the_middle_of_its_text(yoke, endless, wait_until, signal_number):
    running = yoke.start("run", endless, "-p", "abc", "-n", 8000, "--ignore-eos", "--local-nodes", 2)
    wait_until(lambda: len(running.out) > 20, running.story, 30)
    running.process.send_signal(signal_number)
    check_ended(yoke, running, signal_number)


def test_ctrl_c_in_a_terminal_reaches_the_whole_group_and_ends_it_once(yoke, endless):
    server = yoke.serve(endless, "--local-nodes", 3, new_session=True)
    os.killpg(server.pid, signal.SIGINT)
    check_ended(yoke, server, signal.SIGINT)


def test_an_impatient_second_ctrl_c_leaves_nothing_either(yoke, endless):
    server = yoke.serve(endless, "--local-nodes", 3)
    server.process.send_signal(signal.SIGINT)
    with contextlib.suppress(ProcessLookupError):
        server.process.send_signal(signal.SIGINT)
    assert server.wait(10) == 130
    yoke.wait_gone()


def test_a_reader_that_closes_the_pipe_ends_the_run(yoke, endless):
    read, write = os.pipe()
    running = yoke.start("run", endless, "-p", "abc", "-n", 8000, "--ignore-eos", "--local-nodes", 2, stdout=write)
    os.close(write)
    assert os.read(read, 1)
    os.close(read)
    assert running.wait(10) != 0
    yoke.wait_gone()
    assert yoke.leftovers() == []


def test_a_stopped_node_does_not_keep_the_command_from_ending(yoke, endless):
    server = yoke.serve(endless, "--local-nodes", 2)
    node = next(process for process in yoke.processes() if "join" in process.cmdline())
    node.suspend()
    assert server.stop(seconds=20) == 130
    yoke.wait_gone()
