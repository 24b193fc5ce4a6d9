import json

from yoke.api.answers import CHAT, COMPLETION, DONE, Answer
from yoke.core.request import Finished, FinishReason, Piece

FINISHED = Finished(reason=FinishReason.LENGTH, prompt_tokens=5, completion_tokens=3, queue_s=0.5, prefill_s=0.25, decode_s=0.1)


def answer(dialect, **more):
    return Answer(dialect=dialect, request_id="1f", model='ti"ny', created=7, **more)


def events(stream: bytes):
    *lines, last = stream.decode().split("\n\n")
    assert last == ""
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def piece(text):
    return Piece(text=text, tokens=(1,), sampled_at_s=1.5)


def test_chat_stream_is_role_then_text_then_reason():
    chunks = answer(CHAT).chunks()
    first, text, last, done = events(chunks.opening() + chunks.piece(piece('a"\n\u2028é')) + chunks.closing(FINISHED))
    assert first == {
        "id": "chatcmpl-1f",
        "object": "chat.completion.chunk",
        "created": 7,
        "model": 'ti"ny',
        "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}],
    }
    assert text["choices"] == [{"index": 0, "delta": {"content": 'a"\n\u2028é'}, "logprobs": None, "finish_reason": None}]
    assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}]
    assert done == "[DONE]"


def test_completion_stream_has_no_opening():
    chunks = answer(COMPLETION).chunks()
    assert chunks.opening() == b""
    text, last, _ = events(chunks.piece(piece("x")) + chunks.closing(FINISHED))
    assert (text["id"], text["object"]) == ("cmpl-1f", "text_completion")
    assert text["choices"] == [{"index": 0, "text": "x", "logprobs": None, "finish_reason": None}]
    assert last["choices"] == [{"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}]


def test_usage_is_null_in_every_chunk_but_the_last():
    chunks = answer(CHAT, include_usage=True).chunks()
    *before, last, _ = events(chunks.opening() + chunks.piece(piece("x")) + chunks.closing(FINISHED))
    assert [chunk["usage"] for chunk in before] == [None, None, None]
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}


def test_timings_are_in_the_chunks_and_at_the_end():
    for dialect in (CHAT, COMPLETION):
        for include_usage in (False, True):
            chunks = answer(dialect, timings=True, include_usage=include_usage).chunks()
            text, last, *_ = events(chunks.piece(piece("x")) + chunks.closing(FINISHED))
            assert text["yoke"] == {"sampled_at_s": 1.5}
            assert last["yoke"] == {"queue_s": 0.5, "prefill_s": 0.25, "decode_s": 0.1, "prefill_tokens_per_s": 20.0, "decode_tokens_per_s": 20.0}


def test_whole_answers_have_their_own_shapes():
    chat = json.loads(answer(CHAT, timings=True).whole("hi", FINISHED))
    assert chat["object"] == "chat.completion"
    assert chat["choices"] == [{"index": 0, "message": {"role": "assistant", "content": "hi", "refusal": None}, "logprobs": None, "finish_reason": "length"}]
    assert chat["usage"]["total_tokens"] == 8
    assert chat["yoke"]["decode_s"] == 0.1
    text = json.loads(answer(COMPLETION).whole("hi", FINISHED))
    assert text["object"] == "text_completion"
    assert text["choices"] == [{"index": 0, "text": "hi", "logprobs": None, "finish_reason": "length"}]
    assert "yoke" not in text


def test_the_end_mark_is_the_last_event():
    assert answer(CHAT, include_usage=True).chunks().closing(FINISHED).endswith(DONE)
