"""libllama on the converted vocabulary gives exactly the ids of the tokenizers package."""

import json
from pathlib import Path

import pytest

from yoke.core.errors import ModelError
from yoke.weights.convert import convert
from yoke.weights.tokenizer import IncrementalDecoder, Tokenizer

tokenizers = pytest.importorskip("tokenizers")
np = pytest.importorskip("numpy")

KJV = Path(__file__).parents[2] / "models" / "kjv-9m"
needs_kjv = pytest.mark.skipif(not (KJV / "heldout.txt").is_file(), reason="models/kjv-9m is not there")

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = WORDS + r"\p{N}{1,3}" + TAIL
QWEN2 = WORDS + r"\p{N}" + TAIL
SAMPLES = [
    "", " ", "  two  spaces ", "In the beginning God created the heaven and the earth.", "It's what they'LL say; we'd've gone.\n\n\tAnd 12345 67 8.",
    "def f(x):\n    return x**2  # naïve\r\n", "Ωmega ñandú 漢字かな交じり 🐂🐂 עברית", "a\u00a0b\u200bc", "1234567890", "...!!??--", "tab\tnew\nline \n \n  end",
]  # fmt: skip


def train(split: str, **model: object) -> "tokenizers.Tokenizer":
    """A byte-level BPE trained on a few sentences."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(**model))
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in ("gpt-2", "digits"))
    before = {"gpt-2": [], "digits": [tokenizers.pre_tokenizers.Digits(individual_digits=True)]}.get(split)
    if before is None:
        before = [tokenizers.pre_tokenizers.Split(tokenizers.Regex(split), "isolated")]
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*before, byte_level])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SAMPLES * 3 + ["the quick brown fox 2024 12 123 don't"] * 5, trainer)
    return tokenizer


def write_directory(directory: Path, tokenizer: "tokenizers.Tokenizer", vocabulary: int) -> None:
    """A one-block model around the tokenizer, its weights all zero."""
    from safetensors.numpy import save_file

    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 32,
        "max_position_embeddings": 64, "vocab_size": vocabulary, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    shapes = {"model.embed_tokens.weight": (vocabulary, 32), "model.norm.weight": (32,)}
    for name in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"model.layers.0.{name}.weight"] = (32,)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        shapes[f"model.layers.0.{name}.weight"] = (32, 32)
    save_file({name: np.zeros(shape, dtype=np.float16) for name, shape in shapes.items()}, directory / "model.safetensors")


def load(directory: Path, tokenizer: "tokenizers.Tokenizer") -> Tokenizer:
    write_directory(directory, tokenizer, tokenizer.get_vocab_size() + 7)
    convert(directory, directory / "model.gguf", "F16", lambda _what, _share: None)
    return Tokenizer.load(directory / "model.gguf")


@needs_kjv
def test_the_trained_model_tokenises_its_heldout_text_alike(tmp_path: Path) -> None:
    convert(KJV, tmp_path / "kjv.gguf", "Q8_0", lambda _what, _share: None)
    text = (KJV / "heldout.txt").read_text(encoding="utf-8")
    expected = tokenizers.Tokenizer.from_file(str(KJV / "tokenizer.json")).encode(text).ids
    with Tokenizer.load(tmp_path / "kjv.gguf") as tokenizer:
        assert tokenizer.encode(text, add_special=True, parse_special=True) == expected
        decoder = IncrementalDecoder()
        assert "".join(decoder.feed(tokenizer.piece(token)) for token in expected) + decoder.flush() == text
        assert tokenizer.piece(0) == b"<|endoftext|>"
        assert tokenizer.is_end(0)
        assert not tokenizer.add_bos


@pytest.mark.parametrize(
    ("split", "ignores_merges"),
    [("gpt-2", False), ("digits", False), (LLAMA3, True), (LLAMA3, False), (QWEN2, False)],
    ids=["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2"],
)
def test_byte_level_tokenizers_agree(tmp_path: Path, split: str, ignores_merges: bool) -> None:
    reference = train(split, ignore_merges=ignores_merges)
    with load(tmp_path, reference) as tokenizer:
        for text in SAMPLES:
            assert tokenizer.encode(text, add_special=True, parse_special=True) == reference.encode(text).ids, text
            assert b"".join(tokenizer.piece(token) for token in reference.encode(text).ids).decode() == text
        assert tokenizer.encode("a</s>b", add_special=False, parse_special=True) == reference.encode("a</s>b").ids
        assert 1 not in tokenizer.encode("a</s>b", add_special=False, parse_special=False)


def test_first_and_last_tokens_follow_the_template(tmp_path: Path) -> None:
    reference = train(LLAMA3, ignore_merges=True)
    reference.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    with load(tmp_path, reference) as tokenizer:
        assert tokenizer.add_bos
        assert tokenizer.encode("hello", add_special=True, parse_special=False) == reference.encode("hello").ids
        assert tokenizer.encode("hello", add_special=False, parse_special=False) == reference.encode("hello", add_special_tokens=False).ids


def sentencepiece_style(metaspace: bool) -> "tokenizers.Tokenizer":
    """Llama 2's kind of tokenizer: spaces become ▁, unknown characters fall back to bytes."""
    special = ["<unk>", "<s>", "</s>"]
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    # Pieces do not cross spaces, as sentencepiece has it; merging itself is then free of any splitting.
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    trained.train_from_iterator([*(sample for sample in SAMPLES if sample.isascii()), "the quick brown fox and the other earth"] * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    pieces = [piece for piece, _ in sorted(model["vocab"].items(), key=lambda item: item[1]) if piece not in special]
    tokens = special + [f"<0x{byte:02X}>" for byte in range(256)] + pieces
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[(left, right) for left, right in model["merges"]],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    if metaspace:
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.mark.parametrize("metaspace", [True, False])
def test_sentencepiece_style_tokenizers_agree(tmp_path: Path, metaspace: bool) -> None:
    reference = sentencepiece_style(metaspace)
    with load(tmp_path, reference) as tokenizer:
        assert (tokenizer.bos, tokenizer.eos, tokenizer.add_bos) == (1, 2, True)
        for text in SAMPLES:
            # The tokenizers package's Metaspace puts no space before a text that starts with one; sentencepiece and libllama always do.
            if not (metaspace and text.startswith(" ")):
                assert tokenizer.encode(text, add_special=True, parse_special=True) == reference.encode(text).ids, text


def test_an_unknown_pre_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"splits by \('\[a-z\]\+',\).*known are those of dbrx, gpt-2, llama-bpe"):
        load(tmp_path, train("[a-z]+"))
