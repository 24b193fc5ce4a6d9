"""The real openai client against a real server on a loopback port."""

import asyncio
import http.client
import logging
import socket

import openai
import pytest

from yoke.api import server
from yoke.api.server import create_app, serve_http
from yoke.core.errors import NodeGone, SettingError
from yoke.testing.cluster import FakeCluster

HELLO = [{"role": "user", "content": "hello there"}]


def against(cluster, scenario, *, key=None, client_key="none"):
    """Run ``scenario(client)`` against a server over ``cluster``."""

    async def both():
        url = asyncio.get_running_loop().create_future()
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(serve_http(create_app(cluster, key=key), ready=url.set_result))
            async with openai.AsyncOpenAI(base_url=f"{await url}/v1", api_key=client_key, max_retries=0) as client:
                await scenario(client)
            serving.cancel()

    asyncio.run(both())
    assert cluster.running == 0


def test_models():
    async def scenario(client):
        assert [model.id async for model in client.models.list()] == ["tiny"]
        assert (await client.models.retrieve("tiny")).owned_by == "yoke"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("huge")

    against(FakeCluster(), scenario)


def test_chat_whole():
    async def scenario(client):
        answer = await client.chat.completions.create(model="tiny", messages=HELLO, extra_body={"yoke_timings": True, "top_k": 5})
        assert answer.choices[0].message.content == "Hello, world"
        assert answer.choices[0].finish_reason == "stop"
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 3, 5)
        assert answer.yoke["decode_s"] == pytest.approx(0.02)
        short = await client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1)
        assert (short.choices[0].message.content, short.choices[0].finish_reason) == ("Hello", "length")

    cluster = FakeCluster()
    against(cluster, scenario)
    assert cluster.requests[0].sampling.top_k == 5


def test_chat_streamed():
    async def scenario(client):
        stream = await client.chat.completions.create(
            model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}, extra_body={"yoke_timings": True}
        )
        chunks = [chunk async for chunk in stream]
        deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
        assert deltas[0].role == "assistant"
        assert "".join(delta.content or "" for delta in deltas) == "Hello, world"
        assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, None, None, "stop"]
        assert chunks[-1].choices == []
        assert chunks[-1].usage.total_tokens == 5
        assert [chunk.yoke["sampled_at_s"] for chunk in chunks[1:4]] == pytest.approx([0.01, 0.02, 0.03])
        assert len({chunk.id for chunk in chunks}) == 1

    against(FakeCluster(), scenario)


def test_completions_whole_and_streamed():
    async def scenario(client):
        answer = await client.completions.create(model="tiny", prompt="Once upon", seed=3)
        assert (answer.choices[0].text, answer.object) == ("Hello, world", "text_completion")
        stream = await client.completions.create(model="tiny", prompt=[1, 2, 3], stream=True)
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello, world"
        assert chunks[-1].choices[0].finish_reason == "stop"

    cluster = FakeCluster()
    against(cluster, scenario)
    assert cluster.requests[0].sampling.seed == 3
    assert cluster.requests[1].tokens == (1, 2, 3)


def test_errors_have_their_classes():
    async def scenario(client):
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="huge", messages=HELLO)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(model="tiny", messages=HELLO, temperature=-1)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.BadRequestError, match="tools"):
            await client.chat.completions.create(model="tiny", messages=HELLO, tools=[{"type": "function", "function": {"name": "f"}}])

    against(FakeCluster(), scenario)


def test_the_key_is_asked_for():
    async def wrong(client):
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()

    async def right(client):
        assert (await client.models.list()).data

    against(FakeCluster(), wrong, key="right", client_key="wrong")
    against(FakeCluster(), right, key="right", client_key="right")


def test_errors_in_a_stream_reach_the_client():
    async def scenario(client):
        stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError, match="attic-pc"):
            async for _ in stream:
                pass

    against(FakeCluster(error=NodeGone("attic-pc left"), fail_at=1), scenario)


@pytest.mark.parametrize("form", ["declared", "chunked"])
def test_a_body_of_100_mb_gets_its_answer(form):
    def send(host, port):
        connection = http.client.HTTPConnection(host, port, timeout=30)
        try:
            body = bytes(100_000_000) if form == "declared" else (bytes(1_000_000) for _ in range(100))
            connection.request("POST", "/v1/completions", body=body, encode_chunked=form == "chunked")
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    async def scenario(client):
        status, body = await asyncio.to_thread(send, client.base_url.host, client.base_url.port)
        assert status == 413
        assert b"body_too_large" in body
        assert (await client.completions.create(model="tiny", prompt="x")).choices[0].text

    against(FakeCluster(), scenario)


def test_a_client_that_vanishes_cancels_only_its_own_stream():
    cluster = FakeCluster()

    async def scenario(client):
        cluster.pause()
        leaver = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        stayer = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        await cluster.until_running(2)
        await leaver.close()
        await cluster.until_running(1)
        assert cluster.cancelled == cluster.requests[:1]
        cluster.resume()
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stayer]) == "Hello, world"

    against(cluster, scenario)
    assert len(cluster.cancelled) == 1


def test_a_server_that_stops_ends_its_streams_with_an_error(monkeypatch, caplog):
    monkeypatch.setattr(server, "GRACE_S", 0.1)
    caplog.set_level(logging.WARNING)

    async def scenario():
        url = asyncio.get_running_loop().create_future()
        cluster = FakeCluster()
        cluster.pause()
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(serve_http(create_app(cluster), ready=url.set_result))
            async with openai.AsyncOpenAI(base_url=f"{await url}/v1", api_key="none", max_retries=0) as client:
                stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
                serving.cancel()
                with pytest.raises(openai.APIError, match="shutting down"):
                    async for _ in stream:
                        pass
        assert len(cluster.cancelled) == 1
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((client.base_url.host, client.base_url.port), timeout=1)

    asyncio.run(scenario())
    assert not [record for record in caplog.records if record.exc_info]


def test_a_taken_port_is_a_named_error():
    async def scenario():
        async with asyncio.TaskGroup() as group:
            url = asyncio.get_running_loop().create_future()
            first = group.create_task(serve_http(create_app(FakeCluster()), ready=url.set_result))
            port = int((await url).rpartition(":")[2])
            with pytest.raises(SettingError, match=f"port {port}"):
                await serve_http(create_app(FakeCluster()), port=port)
            first.cancel()

    asyncio.run(scenario())
