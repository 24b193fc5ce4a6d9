"""Conversion against transformers: every tensor against an independent reading of the checkpoint, and the logits of libllama on the converted file."""

import ctypes
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yoke.core.errors import ModelError
from yoke.core.tensor import TensorType
from yoke.testing.models import tiny_vocabulary
from yoke.weights.convert import convert
from yoke.weights.gguf import GgufFile, dequantize
from yoke.weights.tokenizer import Tokenizer, libllama

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

N_TOKENS, WIDTH, HEADS, KV_HEADS, COLUMNS, BLOCKS = 400, 64, 4, 2, 96, 2
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip

# By name: the configuration class, what differs from the common shape, the dtype of the checkpoint, and the largest shard.
CASES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "llama": ("LlamaConfig", {}, "float32", "1GB"),
    "llama, llama3 rope, sharded": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}, "bfloat16", "40KB"),
    "llama, tied, own head_dim": ("LlamaConfig", {"tie_word_embeddings": True, "head_dim": 32}, "float16", "1GB"),
    "llama, linear rope": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}}, "float32", "1GB"),
    "mistral, window": ("MistralConfig", {"sliding_window": 64}, "float32", "1GB"),
    "mistral, no window": ("MistralConfig", {"sliding_window": None, "head_dim": 32}, "bfloat16", "1GB"),
    "qwen2": ("Qwen2Config", {"sliding_window": 64, "use_sliding_window": False}, "bfloat16", "40KB"),
    "qwen2, tied": ("Qwen2Config", {"tie_word_embeddings": True}, "float32", "1GB"),
    "qwen3": ("Qwen3Config", {"head_dim": 32}, "bfloat16", "1GB"),
    "qwen3, tied": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}, "float32", "40KB"),
}


def write_tokenizer(directory: Path, n_tokens: int) -> None:
    vocabulary = tiny_vocabulary(n_tokens)
    content = {
        "added_tokens": [{"id": i, "content": vocabulary.tokens[i], "special": True} for i in (0, 1)],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "post_processor": None,
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(vocabulary.tokens)}, "merges": [m.split(" ") for m in vocabulary.merges]},
    }
    (directory / "tokenizer.json").write_text(json.dumps(content))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|begin|>", "eos_token": {"content": "<|endoftext|>"}}))


def write_huggingface_model(directory: Path, config_class: str, changes: dict[str, Any], dtype: str = "float32", max_shard_size: str = "1GB") -> Any:
    """A random model saved by transformers, with a tokenizer; returns the model in float32 with the weights as they were saved."""
    options = {
        "vocab_size": N_TOKENS, "hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "intermediate_size": COLUMNS, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
    }  # fmt: skip
    config = getattr(transformers, config_class)(**{**options, **changes})
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms and biases start as ones and zeros, which would hide a mix-up.
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (1.0 if "norm" in name else 0.0))
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    write_tokenizer(directory, N_TOKENS - 20)
    model = model.float().eval()
    # The rotary buffer is no weight; the dtype of the checkpoint must not round it.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def read_checkpoint(directory: Path) -> dict[str, np.ndarray]:
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors.update({name: tensor.float().numpy() for name, tensor in safetensors_torch.load_file(path).items()})
    return tensors


def halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Undo the interleaving, row by row: neighbour pair (2j, 2j + 1) of a head was rows j and j + C/2."""
    out = np.empty_like(rows)
    for row in range(rows.shape[0]):
        head, place = divmod(row, head_dim)
        out[head * head_dim + place // 2 + (place % 2) * (head_dim // 2)] = rows[row]
    return out


NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def huggingface_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{NAMES[parts[2]]}.{parts[3]}"
    return f"{NAMES[parts[0]]}.{parts[1]}"


def logits_of_libllama(path: Path, tokens: list[int]) -> np.ndarray:
    """Logits after the last token, float32 [vocabulary]."""
    library = libllama()
    model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
    assert model
    parameters = library.llama_context_default_params()
    parameters.n_ctx, parameters.n_threads, parameters.n_threads_batch = 128, 2, 2
    context = library.llama_init_from_model(model, parameters)
    try:
        assert library.llama_decode(context, library.llama_batch_get_one((ctypes.c_int32 * len(tokens))(*tokens), len(tokens))) == 0
        n = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
        return np.array(np.ctypeslib.as_array(library.llama_get_logits_ith(context, -1), shape=(n,)))
    finally:
        library.llama_free(context)
        library.llama_model_free(model)


@pytest.fixture(params=CASES, scope="module")
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, GgufFile, Any]]:
    config_class, changes, dtype, shard_size = CASES[request.param]
    directory = tmp_path_factory.mktemp("huggingface")
    model = write_huggingface_model(directory, config_class, changes, dtype, shard_size)
    assert ((directory / "model.safetensors.index.json").exists()) == (shard_size == "40KB")
    target = directory / "model.gguf"
    convert(directory, target, "F32", lambda _what, _share: None)
    with GgufFile.open(target) as file:
        yield directory, file, model
    gc.collect()


def test_every_tensor_is_the_checkpoints(converted: tuple[Path, GgufFile, Any]) -> None:
    directory, file, model = converted
    checkpoint = read_checkpoint(directory)
    permuted = file.metadata["general.architecture"] == "llama"
    head_dim = file.metadata["llama.attention.key_length"] if permuted else 0
    seen = set()
    for name, info in file.tensors.items():
        if name == "rope_freqs.weight":
            continue
        found = dequantize(info.type, np.frombuffer(file.read(name).data, dtype=np.uint8)).reshape(info.shape)
        if permuted and ("attn_q." in name or "attn_k." in name):
            found = halves(found, head_dim)
        np.testing.assert_array_equal(found, checkpoint[huggingface_name(name)], err_msg=name)
        seen.add(huggingface_name(name))
    left = set(checkpoint) - seen
    assert left <= ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    assert ("output.weight" in file.tensors) != model.config.tie_word_embeddings


def test_rope_and_window_are_the_configurations(converted: tuple[Path, GgufFile, Any]) -> None:
    _, file, model = converted
    config, architecture = model.config, file.metadata["general.architecture"]
    rope = config.rope_parameters
    assert file.metadata[f"{architecture}.rope.freq_base"] == rope["rope_theta"]
    assert file.metadata[f"{architecture}.rope.dimension_count"] == model.model.layers[0].self_attn.head_dim
    assert file.metadata.get(f"{architecture}.rope.scaling.factor") == (2.0 if rope["rope_type"] == "linear" else None)
    window = 64 if config.model_type == "mistral" and config.sliding_window else None
    assert file.metadata.get(f"{architecture}.attention.sliding_window") == window
    if rope["rope_type"] == "llama3":
        head_dim = model.model.layers[0].self_attn.head_dim
        plain = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
        factors = np.frombuffer(file.read("rope_freqs.weight").data, dtype=np.float32)
        np.testing.assert_allclose(plain / factors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)
        assert factors[0] == 1.0
        assert factors.max() == 4.0
    else:
        assert "rope_freqs.weight" not in file.tensors


def test_libllama_computes_what_transformers_computes(converted: tuple[Path, GgufFile, Any]) -> None:
    _, file, model = converted
    tokens = [0, 17, 300, 379, 5, 5, 42, 211, 90, 8, 133, 260]
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0, -1].numpy()
    # libllama rounds its key/value cache to float16.
    np.testing.assert_allclose(logits_of_libllama(file.path, tokens), expected, atol=0.02, rtol=0.02)


def test_vocabulary_is_padded_to_the_embedding(converted: tuple[Path, GgufFile, Any]) -> None:
    with Tokenizer.load(converted[1].path) as tokenizer:
        assert tokenizer.n_tokens == N_TOKENS
        assert (tokenizer.bos, tokenizer.eos, tokenizer.add_bos) == (0, 1, False)
        assert tokenizer.is_end(1)
        assert not tokenizer.is_end(N_TOKENS - 1)


@pytest.mark.parametrize(
    ("type_name", "least"), [("F16", 0.9999), ("BF16", 0.9999), ("Q8_0", 0.999), ("Q6_K", 0.99), ("Q5_K_M", 0.97), ("Q4_K_M", 0.9), ("Q4_0", 0.9)]
)
def test_every_type_loads_and_stays_close(tmp_path: Path, type_name: str, least: float) -> None:
    changes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
    model = write_huggingface_model(tmp_path, "LlamaConfig", changes, "bfloat16")
    target = tmp_path / "model.gguf"
    convert(tmp_path, target, type_name, lambda _what, _share: None)
    # Only the target is there: nothing is left of what was written on the way.
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    with GgufFile.open(target) as file:
        types = {info.type for info in file.tensors.values() if len(info.shape) > 1}
        expected = TensorType[type_name.removesuffix("_M")]
        assert expected in types
    tokens = [0, 17, 300, 379, 5]
    with torch.no_grad():
        exact = model(torch.tensor([tokens])).logits[0, -1].numpy()
    found = logits_of_libllama(target, tokens)
    assert np.corrcoef(found, exact)[0, 1] > least


def test_mixed_windows_are_refused(tmp_path: Path) -> None:
    write_huggingface_model(tmp_path, "Qwen2Config", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1})
    with pytest.raises(ModelError, match="1 of 2 layers have a sliding window"):
        convert(tmp_path, tmp_path / "model.gguf", "F32", lambda _what, _share: None)
