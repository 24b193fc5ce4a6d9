"""A node or a worker dies, stops or goes while a stream runs: the stream goes on, and its text is the text that would have been."""

import json
import signal
import threading
import time

import psutil
import pytest

pytestmark = pytest.mark.processes

PROMPT = "And the LORD said unto"
N_TOKENS = 300
KILL_AFTER = 40
ENDS_S = 40.0


def nodes_of(yoke):
    """The local node processes by name; this machine's own node is the server itself."""
    found = {}
    for process in yoke.processes():
        line = process.cmdline()
        if "join" in line:
            found[line[line.index("--name") + 1]] = process
    return found


def worker_of(yoke, parent):
    return next(process for process in yoke.processes() if process.ppid() == parent and "yoke.node.worker" in process.cmdline())


class Stream:
    """A streamed completion in a thread, and what has come of it."""

    def __init__(self, server, n=N_TOKENS, prompt=PROMPT):
        self.texts, self.times, self.error = [], [], None
        self.is_far = threading.Event()
        self.body = {"prompt": prompt, "max_tokens": n, "temperature": 0.8, "seed": 7, "ignore_eos": True, "stream": True}
        self.server = server
        self.thread = threading.Thread(target=self.read)
        self.thread.start()

    def read(self):
        with self.server.http(timeout=ENDS_S) as client, client.stream("POST", "/v1/completions", json=self.body) as answer:
            for line in answer.iter_lines():
                if not line or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    self.error = event["error"]
                    return
                self.texts.append(event["choices"][0]["text"])
                self.times.append(time.monotonic())
                if len(self.texts) == KILL_AFTER:
                    self.is_far.set()

    def end(self):
        self.thread.join(ENDS_S)
        assert not self.thread.is_alive(), f"hangs after {len(self.texts)} tokens: {self.server.story()}"
        return "".join(self.texts)


@pytest.fixture(scope="module")
def text(tmp_path_factory, yoke_in, kjv):
    """What the model writes when nothing happens."""
    with yoke_in(tmp_path_factory.mktemp("undisturbed") / "home") as command:
        server = command.serve(kjv, "--cache-type", "f32")
        text = Stream(server).end()
        assert server.stop() == 130
    return text


@pytest.mark.parametrize(
    ("victims", "how", "layout"),
    [
        (["worker 1"], "KILL", ["--stages", 3]),
        (["worker 0"], "KILL", ["--stages", 3]),
        (["node 2"], "KILL", ["--stages", 3]),
        (["worker 1"], "KILL", ["--ranks", 3]),
        (["worker 0", "node 1"], "KILL", ["--stages", 3]),
        (["worker 2"], "STOP", ["--stages", 3]),
        (["node 1"], "INT", ["--stages", 3]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else value,
)
def test_the_text_goes_on(yoke, kjv, text, victims, how, layout):
    server = yoke.serve(kjv, "--local-nodes", 3, "--cache-type", "f32", *layout)
    nodes = nodes_of(yoke)
    names = [stage["node"] for stage in server.status()["stages"]]
    stream = Stream(server)
    assert stream.is_far.wait(30)
    for victim in victims:
        kind, place = victim.split()
        node = nodes.get(names[int(place)])
        process = node if kind == "node" else worker_of(yoke, server.pid if node is None else node.pid)
        process.send_signal(getattr(signal, f"SIG{how}"))
    while stream.thread.is_alive() and time.monotonic() < stream.times[0] + ENDS_S:
        assert {stage["node"] for stage in server.status()["stages"]} <= set(names)  # and it is answered at any moment
        time.sleep(0.01)
    assert stream.end() == text
    assert stream.error is None
    assert server.complete(PROMPT, 8)
    assert server.status()["plan_version"] > 1
    assert server.stop(seconds=20) == 130


def test_a_worker_that_died_is_replaced_and_its_node_is_used_again(yoke, kjv, wait_until):
    server = yoke.serve(kjv, "--local-nodes", 2, "--stages", 2)
    (node,) = nodes_of(yoke).values()
    worker_of(yoke, node.pid).kill()
    wait_until(lambda: len(server.status()["nodes"]) == 1, "the loss is not noticed")
    wait_until(lambda: len(server.status()["nodes"]) == 2, "the node did not come back", 20)
    assert server.complete(PROMPT, 8)
    assert server.stop() == 130


def test_a_run_goes_on_too(yoke, kjv, wait_until):
    command = ["run", kjv, "-p", PROMPT, "-n", 800, "--ignore-eos", "--cache-type", "f32"]
    running = yoke.start(*command, "--local-nodes", 3)
    wait_until(lambda: len(running.out) > 20, running.story, 30)
    nodes_of(yoke).popitem()[1].kill()
    assert running.wait(60) == 0, running.story()
    assert running.out == yoke.run(*command).out


WEIGHTS_BYTES, CELL_BYTES, WORKER_BYTES = 45e6, 5120, 128 * 2**20  # of the trained model, of its cache in float16, and what the planner counts for a worker


def test_too_few_left_is_said_and_a_machine_that_comes_mends_it(yoke, make_yoke, kjv, server_kind, wait_until):
    """Two machines have room for the cache, one has not."""
    free = psutil.virtual_memory().available
    share = max(0.01, 3e8 / free)
    room = share * free - WORKER_BYTES
    cells = int((1.5 * room - WEIGHTS_BYTES) / CELL_BYTES) // 256 * 256
    environment = {"YOKE_MEMORY_SHARE": str(share), "YOKE_PATIENCE_S": "1"}
    server = yoke.start("serve", kjv, "--port", 0, "--nodes", 2, "--cluster-host", "127.0.0.1", "--cells", cells, env=environment, kind=server_kind)
    invite = server.wait_for(r"yoke join (\S+)")[1]
    first = make_yoke("attic").start("join", invite, "--name", "attic", env=environment)
    stream = Stream(server.ready(), n=1500)
    assert stream.is_far.wait(30)
    first.process.kill()
    stream.end()
    assert "missing" in stream.error["message"]
    with server.http() as client:
        assert client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 4}).status_code == 503
    second = make_yoke("cellar").start("join", invite, "--name", "cellar", env=environment)
    second.wait_for("joined as cellar", stream="err")
    wait_until(lambda: server.status()["model"], "the model is not served again", 20)
    assert server.complete(PROMPT, 8)
    assert server.stop() == 130
    assert second.wait(10) == 0
