import asyncio
import json
import logging
import tracemalloc

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yoke.api import gate, openai
from yoke.api.server import create_app, serve_http
from yoke.core.errors import InvariantError, NodeGone, RequestError, SettingError
from yoke.core.request import ModelCard, Piece, Started
from yoke.testing.cluster import CARD, FakeCluster

HELLO = {"messages": [{"role": "user", "content": "hello"}]}
CHAT = "/v1/chat/completions"


def ask(app, *requests, base="http://127.0.0.1"):
    """The responses of ``app`` to (method, path, options) in order."""

    async def all_of_them():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url=base) as client:
            return [await client.request(method, path, **options) for method, path, options in requests]

    return asyncio.run(all_of_them())


def post(app, body, path=CHAT, **options):
    return ask(app, ("POST", path, {"json": body, **options} if isinstance(body, dict) else {"content": body, **options}))[0]


def error_of(response):
    error = response.json()["error"]
    assert set(response.json()) == {"error"}
    assert set(error) == {"message", "type", "param", "code"}
    assert len(response.headers["x-request-id"]) == 24
    return error


class Caller:
    """An ASGI client that can leave at any time: what it was sent is in ``sent``."""

    def __init__(self, app, body, path=CHAT, headers=()):
        self.sent = []
        self.gone = asyncio.Event()
        self.received = asyncio.Event()
        self._body = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        scope = {"type": "http", "method": "POST", "path": path, "headers": list(headers), "query_string": b"", "root_path": "", "scheme": "http"}
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self):
        if self._body:
            return self._body.pop()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message):
        self.sent.append(message)
        self.received.set()
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.gone.set()

    async def until(self, text):
        while text not in self.text:
            self.received.clear()
            await self.received.wait()

    @property
    def text(self):
        return b"".join(message.get("body", b"") for message in self.sent).decode()


def test_models_are_listed_and_found():
    other = ModelCard(name="a/b", context=64, vocabulary=10, has_chat_template=False, created_at=5)
    app = create_app(FakeCluster(cards=[CARD, other]))
    listed, one, none = ask(app, ("GET", "/v1/models", {}), ("GET", "/v1/models/a/b", {}), ("GET", "/v1/models/c", {}))
    assert [model["id"] for model in listed.json()["data"]] == ["tiny", "a/b"]
    assert listed.json()["object"] == "list"
    own = {"context": 64, "vocabulary": 10, "has_chat_template": False}
    assert one.json() == {"id": "a/b", "object": "model", "created": 5, "owned_by": "yoke", "yoke": own}
    assert none.status_code == 404
    assert error_of(none)["code"] == "model_not_found"


def test_health_follows_the_plan_and_needs_no_key():
    (healthy,) = ask(create_app(FakeCluster(), key="k"), ("GET", "/health", {}))
    assert (healthy.status_code, healthy.json()) == (200, {"status": "ok", "running": 0, "queued": 0})
    (ill,) = ask(create_app(FakeCluster(plan=None)), ("GET", "/health", {}))
    assert ill.status_code == 503
    assert error_of(ill)["type"] == "server_error"


def test_one_core_request_for_each_call():
    cluster = FakeCluster()
    response = post(create_app(cluster), HELLO)
    (request,) = cluster.requests
    assert response.json()["id"] == "chatcmpl-" + request.id
    assert response.headers["x-request-id"] == request.id
    assert response.json()["choices"][0]["message"]["content"] == "Hello, world"
    assert cluster.running == 0
    assert not cluster.cancelled


def test_empty_pieces_are_not_sent():
    response = post(create_app(FakeCluster(["a", "", "b"])), HELLO | {"stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.text.count('"content":""') == 1, "only the opening is empty"
    assert response.text.count("data: ") == 1 + 2 + 1 + 1
    assert response.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("header", "status"),
    [(None, 401), ("Bearer wrong", 401), ("secret", 401), ("Basic secret", 401), ("Bearer s\xe9cret", 401), ("Bearer secret", 200), ("bearer  secret", 200)],
)
def test_the_key_opens(header, status):
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    app = create_app(FakeCluster(), key="secret")
    models, lost = ask(app, ("GET", "/v1/models", {"headers": headers}), ("GET", "/nowhere", {"headers": headers}), base="http://pool.example")
    assert models.status_code == status
    assert lost.status_code == (404 if status == 200 else 401)
    if status == 401:
        assert error_of(models)["code"] == "invalid_api_key"
        assert models.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost:80"}, 200),
        ({"host": "[::1]:80"}, 200),
        ({"host": "127.0.0.1", "origin": "http://127.0.0.1"}, 200),
        ({"host": "127.0.0.1", "origin": "http://evil.example"}, 403),
        ({"host": "127.0.0.1", "origin": "null"}, 403),
        ({"host": "evil.example"}, 403),
        ({"host": "[::"}, 403),
        ({"host": "localhost@evil.example"}, 403),
    ],
)
def test_without_a_key_foreign_web_pages_are_refused(headers, status):
    (response,) = ask(create_app(FakeCluster()), ("GET", "/v1/models", {"headers": headers}))
    assert response.status_code == status


def test_an_empty_key_is_a_mistake():
    for key in ("", "  "):
        with pytest.raises(SettingError, match="empty"):
            create_app(FakeCluster(), key=key)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/v1/models/", 404), ("POST", CHAT + "/", 404), ("GET", CHAT, 405), ("DELETE", "/v1/models", 405), ("BREW", "/health", 405)],
)
def test_wrong_paths_and_methods_get_the_apis_error(method, path, status):
    (response,) = ask(create_app(FakeCluster()), (method, path, {}))
    assert response.status_code == status
    assert error_of(response)["type"] == "invalid_request_error"
    assert ("allow" in response.headers) == (status == 405)


FAILURES = [
    (NodeGone("attic-pc left"), 503, "attic-pc left"),
    (RequestError("the prompt takes 500 tokens; the context holds 128", field="prompt"), 400, "context holds"),
    (RequestError("the queue is full", status=429), 429, "queue is full"),
    (InvariantError("the story of slot 7"), 500, "under request"),
    (ZeroDivisionError("in secret.py"), 500, "under request"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "words"), FAILURES, ids=[type(e).__name__ + str(s) for e, s, _ in FAILURES])
def test_errors_before_the_answer_are_statuses(error, status, words, stream):
    cluster = FakeCluster(error=error, fail_at=-1)
    response = post(create_app(cluster), HELLO | {"stream": stream})
    assert response.status_code == status
    assert words in error_of(response)["message"]
    assert "secret" not in response.text
    assert "story" not in response.text
    assert cluster.running == 0


@pytest.mark.parametrize("fail_at", [0, 2, 3])
def test_errors_in_a_stream_are_its_last_event(fail_at):
    response = post(create_app(FakeCluster(error=NodeGone("attic-pc left"), fail_at=fail_at)), HELLO | {"stream": True})
    assert response.status_code == 200
    last = response.text.split("\n\n")[-2]
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "attic-pc left"
    assert response.text.count('"content":') == 1 + fail_at
    assert "[DONE]" not in response.text


def test_errors_in_a_whole_answer_are_statuses():
    response = post(create_app(FakeCluster(error=NodeGone("attic-pc left"), fail_at=2)), HELLO)
    assert response.status_code == 503


@pytest.mark.parametrize("events", [[], [Started(prompt_tokens=1)], [Piece(text="x", tokens=(1,), sampled_at_s=0.0)]])
def test_a_cluster_that_breaks_its_contract_is_a_500(events):
    class Broken(FakeCluster):
        async def generate(self, request):
            for event in events:
                yield event

    assert post(create_app(Broken()), HELLO).status_code == 500


def test_a_model_without_chat_template_refuses_chats():
    card = ModelCard(name="plain", context=64, vocabulary=10, has_chat_template=False, created_at=5)
    response = post(create_app(FakeCluster(cards=[card])), HELLO)
    assert response.status_code == 400
    assert "chat template" in error_of(response)["message"]


def test_declared_large_bodies_are_refused_unread():
    response = post(create_app(FakeCluster()), b" " * (9 * 2**20))
    assert response.status_code == 413
    assert error_of(response)["code"] == "body_too_large"
    assert response.headers["connection"] == "close"


@pytest.mark.parametrize("headers", [{}, {"content-length": "10"}, {"content-length": "x"}])
def test_endless_bodies_are_refused_in_little_memory(headers, monkeypatch):
    monkeypatch.setattr(gate, "LINGER_BYTES", 100 * 2**20)
    chunk = bytes(2**20)

    async def endless():
        while True:
            yield chunk

    tracemalloc.start()
    response = post(create_app(FakeCluster()), endless(), headers=headers)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert response.status_code == 413
    assert peak < 32 * 2**20


def test_a_body_of_exactly_the_limit_passes():
    body = json.dumps(HELLO).encode()
    assert post(create_app(FakeCluster(), max_body_bytes=len(body)), body).status_code == 200
    assert post(create_app(FakeCluster(), max_body_bytes=len(body) - 1), body).status_code == 413


def test_a_body_that_does_not_come_times_out(monkeypatch):
    monkeypatch.setattr(openai, "BODY_DEADLINE_S", 0.01)

    async def silent():
        yield b"{"
        await asyncio.Event().wait()

    response = post(create_app(FakeCluster()), silent())
    assert response.status_code == 408


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_its_generation_and_no_other(stream):
    async def scenario():
        cluster = FakeCluster(lambda request: ["a", "b", "c"])
        app = create_app(cluster)
        cluster.pause()
        leaver, stayer = Caller(app, HELLO | {"stream": stream}), Caller(app, HELLO | {"stream": True})
        await cluster.until_running(2)
        leaver.gone.set()
        await cluster.until_running(1)
        await leaver.task
        assert [request.id for request in cluster.cancelled] == [cluster.requests[0].id]
        cluster.resume()
        await stayer.task
        assert stayer.text.endswith("data: [DONE]\n\n")
        assert len(cluster.cancelled) == 1
        assert cluster.running == 0

    asyncio.run(scenario())


def test_a_cancelled_server_says_so_in_its_streams():
    async def scenario():
        cluster = FakeCluster()
        cluster.pause()
        caller = Caller(create_app(cluster), HELLO | {"stream": True})
        await caller.until("assistant")
        caller.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller.task
        assert "shutting down" in caller.text
        assert len(cluster.cancelled) == 1

    asyncio.run(scenario())


def test_a_client_that_leaves_while_it_sends_is_forgotten():
    async def scenario():
        app = create_app(FakeCluster())
        caller = Caller(app, HELLO)
        caller._body.clear()
        caller.gone.set()
        await caller.task
        assert caller.sent == []

    asyncio.run(scenario())


def test_one_line_in_the_log_and_no_prompt(caplog):
    caplog.set_level(logging.INFO, "yoke.api")
    ask(create_app(FakeCluster()), ("POST", CHAT, {"json": HELLO | {"messages": [{"role": "user", "content": "my secret"}]}}), ("GET", "/a%0Ab", {}))
    first, second = (record.getMessage() for record in caplog.records if record.name == "yoke.api")
    for fact in ("method=POST", "path='/v1/chat/completions'", "status=200", "outcome=done", "prompt_tokens=2", "completion_tokens=3", "model=tiny"):
        assert fact in first
    assert "secret" not in first
    assert "Hello" not in first
    assert "path='/a\\nb'" in second


def test_other_machines_need_a_key():
    for host in ("0.0.0.0", "::", "192.0.2.1", "pool.example"):
        with pytest.raises(SettingError, match="key"):
            asyncio.run(serve_http(create_app(FakeCluster()), host=host))


def test_a_port_is_a_port():
    for port in (-1, 65_536, 99_999):
        with pytest.raises(SettingError, match=str(port)):
            asyncio.run(serve_http(create_app(FakeCluster()), port=port))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = """
    model messages prompt max_tokens max_completion_tokens stop temperature top_p seed top_k min_p ignore_eos stream stream_options yoke_timings
    tools tool_choice response_format logprobs n echo suffix logit_bias presence_penalty
""".split()  # noqa: SIM905 - a list of names reads better as words
VALID = {"messages": [{"role": "user", "content": "x"}], "prompt": "x"}


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3), st.sampled_from([CHAT, "/v1/completions"]))
def test_no_json_body_is_our_fault(fields, path):
    response = post(create_app(FakeCluster()), json.dumps(VALID | fields).encode(), path)
    assert response.status_code < 500
    if response.status_code != 200:
        error_of(response)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60), st.sampled_from([CHAT, "/v1/completions"]))
def test_no_bytes_are_our_fault(body, path):
    assert 400 <= post(create_app(FakeCluster()), body, path).status_code < 500
