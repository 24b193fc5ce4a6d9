"""The machine that people ask computes nothing: another one has the engine, and the text goes on when that one is lost."""

import json
import signal
import threading

import pytest

pytestmark = pytest.mark.processes

PROMPT = "And the LORD said unto"
N_TOKENS = 300
PLAN = """
nodes:
  - {name: hall, memory: 1 GB, speed: 1 GB/s}
  - {name: attic, memory: 1 GB, speed: 1 GB/s}
  - {name: cellar, memory: 1 GB, speed: 1 GB/s}
plan:
  stages: [[attic], [cellar]]
"""


@pytest.fixture
def cluster(yoke, make_yoke, kjv, server_kind, tmp_path):
    """A server that computes nothing, by a plan by hand, and two members that do."""
    by_hand = tmp_path / "cluster.yaml"
    by_hand.write_text(PLAN)
    flags = ["--port", 0, "--cluster", by_hand, "--cluster-host", "127.0.0.1", "--cache-type", "f32"]
    server = yoke.start("serve", kjv, *flags, kind=server_kind)
    invite = server.wait_for(r"yoke join (\S+)")[1]
    members = {name: make_yoke(name).start("join", invite, "--name", name) for name in ("attic", "cellar")}
    return server.ready(), members


def stream(server, texts, is_far):
    body = {"prompt": PROMPT, "max_tokens": N_TOKENS, "temperature": 0.8, "seed": 7, "ignore_eos": True, "stream": True}
    with server.http(timeout=60) as client, client.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line and line != "data: [DONE]":
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                texts.append(event["choices"][0]["text"])
                if len(texts) == 40:
                    is_far.set()


@pytest.mark.parametrize("how", ["KILL", "INT"])
def test_the_engine_moves_and_the_text_goes_on(cluster, how, make_yoke, kjv):
    server, members = cluster
    texts, is_far = [], threading.Event()
    reader = threading.Thread(target=stream, args=(server, texts, is_far))
    reader.start()
    assert is_far.wait(30)
    before = server.status()
    assert before["running"] == 1, "the engine's own numbers come from where it is"
    assert [stage["node"] for stage in before["stages"]] == ["attic", "cellar"]
    for process in members["attic"].yoke.processes() if how == "KILL" else [members["attic"].process]:
        process.send_signal(getattr(signal, f"SIG{how}"))
    reader.join(60)
    assert not reader.is_alive(), server.story()
    assert "attic" not in {stage["node"] for stage in server.status()["stages"]}
    alone = make_yoke("alone").run("run", kjv, "-p", PROMPT, "-n", N_TOKENS, "--temperature", 0.8, "--seed", 7, "--ignore-eos", "--cache-type", "f32", "--json")
    assert "".join(texts) == json.loads(alone.out)["text"]
    assert server.stop(seconds=20) == 130
    assert members["cellar"].wait(10) == 0


def test_a_chat_is_told_by_the_model_s_own_template_wherever_the_engine_is(cluster):
    server, _ = cluster
    with server.http() as client:
        refused = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4})
    assert refused.status_code == 400
    assert "chat template" in refused.json()["error"]["message"]
    with server.http() as client:
        too_long = client.post("/v1/completions", json={"prompt": "word " * 200_000, "max_tokens": 4})
    assert too_long.status_code == 400, "what is wrong with a request is said by the engine"
    assert server.stop(seconds=20) == 130


def test_a_plan_by_hand_that_cannot_be_is_refused_before_anybody_waits(yoke, kjv, tmp_path):
    by_hand = tmp_path / "cluster.yaml"
    by_hand.write_text(PLAN)
    assert "give one or the other" in yoke.run("serve", kjv, "--cluster", by_hand, "--ranks", 2, code=2).err
    by_hand.write_text(PLAN[: PLAN.index("plan:")])
    assert "has no plan by hand" in yoke.run("serve", kjv, "--cluster", by_hand, code=2).err
