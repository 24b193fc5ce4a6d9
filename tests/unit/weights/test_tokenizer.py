"""Tokenizer: what libllama would abort on is refused first; the decoder never splits a character."""

import dataclasses
import itertools
import threading
from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yoke.core.errors import InvariantError, ModelError
from yoke.testing.models import tiny_vocabulary, write_random_model
from yoke.weights.tokenizer import IncrementalDecoder, Tokenizer
from yoke.weights.vocabulary import write_vocabulary


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_random_model(path, architecture="llama", n_blocks=1, width=32, n_heads=2, n_kv_heads=1, head_dim=16, columns=32, vocabulary=400)
    return path


def test_text_comes_back(model: Path) -> None:
    with Tokenizer.load(model) as tokenizer:
        assert (tokenizer.n_tokens, tokenizer.bos, tokenizer.eos, tokenizer.add_bos) == (400, 0, 1, False)
        for text in ("", "hello there", "naïve 漢字 🐂\n", "\x00\x01", "a" * 5000):
            tokens = tokenizer.encode(text, add_special=True, parse_special=False)
            assert b"".join(tokenizer.piece(token) for token in tokens).decode() == text
        assert [token for token in range(400) if tokenizer.is_end(token)] == [1]
        assert tokenizer.encode("<|endoftext|>", add_special=False, parse_special=True) == [1]
        assert 1 not in tokenizer.encode("<|endoftext|>", add_special=False, parse_special=False)
        assert not tokenizer.is_end(-1)
        assert not tokenizer.is_end(400)
        for outside in (-1, 400, 1 << 40):
            with pytest.raises(ModelError, match="outside the vocabulary of 400"):
                tokenizer.piece(outside)


def test_a_closed_tokenizer_says_so(model: Path) -> None:
    tokenizer = Tokenizer.load(model)
    tokenizer.close()
    tokenizer.close()
    with pytest.raises(InvariantError, match="after it was closed"):
        tokenizer.encode("ox", add_special=False, parse_special=False)


def test_lone_surrogates_do_no_harm(model: Path) -> None:
    with Tokenizer.load(model) as tokenizer:
        tokens = tokenizer.encode("a\udc80b", add_special=False, parse_special=False)
        assert b"".join(map(tokenizer.piece, tokens)) == b"a?b"


def test_threads_may_encode_at_once(model: Path) -> None:
    texts = [f"the ox number {i} pulls " * 50 for i in range(8)]
    with Tokenizer.load(model) as tokenizer:
        expected = [tokenizer.encode(text, add_special=False, parse_special=False) for text in texts]
        found: list[list[int]] = [[] for _ in texts]

        def work(i: int) -> None:
            for _ in range(20):
                found[i] = tokenizer.encode(texts[i], add_special=False, parse_special=False)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(texts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == expected


def write(path: Path, *, tokens: list[str], pre: str = "gpt-2", **arrays: list[int]) -> None:
    """A file that holds nothing but a vocabulary."""
    writer = gguf.GGUFWriter(path, "llama")
    write_vocabulary(writer, dataclasses.replace(tiny_vocabulary(300), pre=pre))
    writer.kv_data[0]["tokenizer.ggml.tokens"].value = tokens
    for key, values in arrays.items():
        writer.kv_data[0][f"tokenizer.ggml.{key}"].value = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def test_broken_vocabularies_are_refused(tmp_path: Path) -> None:
    tokens = list(tiny_vocabulary(300).tokens)
    path = tmp_path / "broken.gguf"
    write(path, tokens=[*tokens[:-1], tokens[0]])
    with pytest.raises(ModelError, match="1 tokens of its vocabulary are there twice"):
        Tokenizer.load(path)
    write(path, tokens=tokens, token_type=[1] * 299)
    with pytest.raises(ModelError, match="token_type has 299 entries for 300 tokens"):
        Tokenizer.load(path)
    write(path, tokens=[*tokens[:-2], "[EMPTY_299]", ""])
    with pytest.raises(ModelError, match="there twice"):
        Tokenizer.load(path)
    write(path, tokens=tokens, pre="ox")
    with pytest.raises(ModelError, match=r"libllama cannot load its vocabulary: .*'ox'"):
        Tokenizer.load(path)


@given(text=st.text(), cuts=st.lists(st.integers(0, 40)))
def test_decoder_never_splits_a_character(text: str, cuts: list[int]) -> None:
    data = text.encode("utf-8", "replace")
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    decoder = IncrementalDecoder()
    parts = [decoder.feed(data[start:stop]) for start, stop in itertools.pairwise(places)]
    assert "".join(parts) + decoder.flush() == data.decode()
    assert data.decode().startswith("".join(parts))


def test_decoder_replaces_only_what_is_broken() -> None:
    decoder = IncrementalDecoder()
    assert decoder.feed("ñ".encode()[:1]) == ""
    assert decoder.feed("ñ".encode()[1:]) == "ñ"
    assert decoder.feed(b"\xff!") == "\ufffd!"
    assert decoder.feed("漢".encode()[:2]) == ""
    assert decoder.flush() == "\ufffd"
