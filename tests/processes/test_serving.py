"""`yoke serve` over several nodes, and machines that join it."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

pytestmark = pytest.mark.processes

PROMPTS = [
    "And the LORD said unto",
    "In the beginning",
    "Blessed are the",
    "And it came to pass",
    "Thou shalt not",
    "The LORD is my",
    "And God saw",
    "Now when",
    "Behold",
]


@pytest.fixture(scope="module")
def texts(pool):
    """What the pool writes after each prompt when nothing else runs."""
    return {prompt: pool.complete(prompt, 40) for prompt in PROMPTS}


def test_a_client_of_openai_completes_whole_and_streamed(pool):
    with pool.openai() as client:
        whole = client.completions.create(model=pool.model, prompt=PROMPTS[0], max_tokens=16, temperature=0)
        assert whole.choices[0].text.startswith(" Moses")
        assert whole.usage.completion_tokens == 16
        stream = client.completions.create(
            model=pool.model, prompt=PROMPTS[0], max_tokens=16, temperature=0, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
        assert chunks[-1].usage.completion_tokens == 16


def test_a_client_of_openai_chats_with_a_template_from_a_file(pool):
    messages = [{"role": "system", "content": "In the"}, {"role": "user", "content": "beginning"}]
    with pool.openai() as client:
        whole = client.chat.completions.create(model=pool.model, messages=messages, max_tokens=16, temperature=0)
        stream = client.chat.completions.create(model=pool.model, messages=messages, max_tokens=16, temperature=0, stream=True)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert streamed == whole.choices[0].message.content != ""
        assert client.models.list().data[0].id == pool.model


def test_nine_requests_at_once_get_the_nine_texts_that_they_get_alone(pool, texts):
    assert len(set(texts.values())) == len(PROMPTS)
    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        together = dict(zip(PROMPTS, threads.map(lambda prompt: pool.complete(prompt, 40), PROMPTS), strict=True))
    assert together == texts


def test_the_pool_writes_what_one_node_writes(pool, texts, yoke, kjv):
    alone = json.loads(yoke.run("run", kjv, "-p", PROMPTS[1], "-n", 40, "--json").out)
    assert alone["text"] == texts[PROMPTS[1]]


def test_status_shows_every_worker(pool, yoke):
    status = json.loads(yoke.run("status", "--url", pool.url, "--json").out)
    assert (status["model"], len(status["nodes"]), len(status["stages"])) == (pool.model, 3, 3)
    text = yoke.run("status", "--url", pool.url).out
    assert all(node["name"] in text for node in status["nodes"])
    assert "3 node(s), 0 session(s) running, 0 waiting" in text
    assert "where the time went" in text


def test_status_is_exported_for_the_planner(pool, yoke, kjv):
    path = yoke.home / "cluster.yaml"
    yoke.run("status", "--url", pool.url, "--export", path)
    plan = json.loads(yoke.run("plan", kjv, "--cluster", path, "--json").out)
    known = {node["name"] for node in pool.status()["nodes"]}
    assert {shard["node"] for shard in plan["shards"]} | set(plan["left_out"]) == known


def test_status_as_json_has_every_documented_field(pool, yoke, repository):
    section = (repository / "docs" / "cli.md").read_text().partition("\n## `yoke status`")[2].partition("\n## ")[0]
    assert set(json.loads(yoke.run("status", "--url", pool.url, "--json").out)) == set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))


def test_a_client_that_leaves_frees_its_session(yoke, endless):
    server = yoke.serve(endless, "--local-nodes", 2)
    with server.stream(n=8000) as lines:
        next(lines)
        assert server.status()["running"] == 1
    server.wait_idle()
    assert server.complete("abc", 8) != ""
    assert server.stop() == 130
    assert yoke.leftovers() == []


def test_a_machine_without_the_model_joins_and_holds_a_part(yoke, make_yoke, kjv, pool, texts):
    server = yoke.start("serve", kjv, "--port", 0, "--nodes", 2, "--stages", 2, "--cluster-host", "127.0.0.1", kind=type(pool))
    invite = server.wait_for(r"yoke join (\S+)")[1]
    other = make_yoke("attic")
    member = other.start("join", invite, "--name", "attic-pc")
    member.wait_for("joined as attic-pc", stream="err")
    server.ready()
    assert "attic-pc joined" in server.err
    assert {node["name"] for node in server.status()["nodes"]} >= {"attic-pc"}
    assert {stage["node"] for stage in server.status()["stages"]} >= {"attic-pc"}
    assert not list(other.home.rglob("*.gguf"))
    assert server.complete(PROMPTS[1], 40) == texts[PROMPTS[1]]
    late = make_yoke("cellar").start("join", invite, "--name", "late")
    late.wait_for("joined as late", stream="err")
    assert server.complete(PROMPTS[2], 40) == texts[PROMPTS[2]]
    assert late.stop() == 130
    assert server.complete(PROMPTS[3], 40) == texts[PROMPTS[3]]
    assert server.stop() == 130
    assert member.wait(10) == 0
    assert "the cluster has let this machine go" in member.err


def test_two_machines_with_one_key_are_told_so(yoke, kjv, pool):
    server = yoke.start("serve", kjv, "--port", 0, "--nodes", 2, kind=type(pool))
    invite = server.wait_for(r"yoke join (\S+)")[1]
    member = yoke.start("join", invite)
    assert member.wait(20) == 3
    assert "--state-dir" in member.err
    assert "joined" not in member.err
    assert server.stop() == 130


def test_other_streams_go_on_while_requests_come_and_go(pool, texts):
    seen = []
    with pool.stream(PROMPTS[4], 400, ignore_eos=True) as lines:
        reader = threading.Thread(target=lambda: seen.extend(lines))
        reader.start()
        for prompt in PROMPTS[:3]:
            assert pool.complete(prompt, 40) == texts[prompt]
        reader.join(30)
    assert seen[-1] == "[DONE]"


def test_a_machine_that_is_asked_to_leave_hands_over_first(yoke, make_yoke, kjv, server_kind):
    server = yoke.start("serve", kjv, "--port", 0, "--nodes", 2, "--stages", 2, "--cluster-host", "127.0.0.1", kind=server_kind)
    attic = make_yoke("attic")
    member = attic.start("join", server.wait_for(r"yoke join (\S+)")[1], "--name", "attic")
    server.ready()
    text = server.complete(PROMPTS[0], 40)
    with server.stream(n=600) as lines:
        attic.run("leave")
        assert member.wait(5) == 0
        assert not any('"error"' in line for line in lines)
    assert [node["name"] for node in server.status()["nodes"]] != ["attic"]
    assert server.complete(PROMPTS[0], 40) == text
    assert "joined no cluster" in attic.run("leave", code=2).err
    assert server.stop() == 130


def test_machines_are_invited_and_seen_while_they_are_waited_for(yoke, make_yoke, kjv, server_kind, wait_until):
    server = yoke.start("serve", kjv, "--port", 0, "--nodes", 2, "--cluster-host", "127.0.0.1", kind=server_kind)
    server.wait_for("waiting until 2 nodes", stream="err")
    wait_until(lambda: list(yoke.home.rglob("serving.json")), "the API did not open")
    status = json.loads(yoke.run("status", "--json").out)
    assert (status["phase"], status["model"]) == ("starting", None)
    url = json.loads(next(yoke.home.rglob("serving.json")).read_text())["url"]
    with httpx.Client(base_url=url) as client:
        assert client.get("/health").status_code == 503
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 503
    invite = yoke.run("nodes", "invite").out.split()[2]
    member = make_yoke("attic").start("join", invite, "--name", "attic")
    assert server.ready().complete(PROMPTS[0], 8)
    assert server.stop() == 130
    assert member.wait(10) == 0


def test_nodes_are_shown_invited_and_removed(yoke, make_yoke, kjv, server_kind, wait_until):
    server = yoke.start("serve", kjv, "--port", 0, "--cluster-host", "127.0.0.1", kind=server_kind).ready()
    invite = yoke.run("nodes", "invite", "--uses", 1, "--expires", "1h").out.split()[2]
    member = make_yoke("attic").start("join", invite, "--name", "attic")
    member.wait_for("joined as attic", stream="err")
    wait_until(lambda: "attic" in yoke.run("nodes").out, server.story)  # once its worker has introduced itself
    refused = make_yoke("cellar").run("join", invite, "--name", "cellar", code=3)
    assert "refused" in refused.err
    yoke.run("nodes", "remove", "attic")
    assert member.wait(10) == 3
    assert "removed" in member.err
    assert "no machine named" in yoke.run("nodes", "remove", "attic", code=2).err
    with server.http() as client:
        assert client.post("/yoke/invites", json={}).status_code == 403
    assert server.stop() == 130
