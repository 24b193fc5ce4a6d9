"""A Hugging Face directory small enough to be written in a millisecond."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from yoke.testing.models import tiny_vocabulary

N_TOKENS = 300
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64, "vocab_size": N_TOKENS + 4, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
    "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip

WriteDirectory = Callable[..., Path]


def tensors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Random float32 tensors of a Llama with this configuration."""
    rng = np.random.default_rng(0)
    width, columns = config["hidden_size"], config["intermediate_size"]
    key = width // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width), "model.norm.weight": (width,), "lm_head.weight": (config["vocab_size"], width)}
    block = {
        "input_layernorm": (width,), "post_attention_layernorm": (width,), "self_attn.q_proj": (width, width), "self_attn.k_proj": (key, width),
        "self_attn.v_proj": (key, width), "self_attn.o_proj": (width, width), "mlp.gate_proj": (columns, width), "mlp.up_proj": (columns, width),
        "mlp.down_proj": (width, columns),
    }  # fmt: skip
    for i in range(config["num_hidden_layers"]):
        shapes.update({f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()})
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def tokenizer_content() -> dict[str, Any]:
    """tokenizer.json of the tiny vocabulary."""
    vocabulary = tiny_vocabulary(N_TOKENS)
    return {
        "added_tokens": [{"id": i, "content": vocabulary.tokens[i], "special": True} for i in (0, 1)],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "post_processor": None,
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(vocabulary.tokens)}, "merges": list(vocabulary.merges)},
    }


@pytest.fixture
def write_directory(tmp_path: Path) -> WriteDirectory:
    """Writes a model directory; ``change_config`` and ``change_tokenizer`` edit the JSON, ``change_tensors`` the weights."""

    def write(
        *,
        change_config: Callable[[dict[str, Any]], Any] = lambda _: None,
        change_tokenizer: Callable[[dict[str, Any]], Any] = lambda _: None,
        change_tensors: Callable[[dict[str, np.ndarray]], Any] = lambda _: None,
        settings: dict[str, Any] | None = None,
    ) -> Path:
        config, tokenizer, weights = json.loads(json.dumps(CONFIG)), tokenizer_content(), tensors(CONFIG)
        change_config(config)
        change_tokenizer(tokenizer)
        change_tensors(weights)
        directory = tmp_path / "source"
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(config))
        (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
        (directory / "tokenizer_config.json").write_text(json.dumps(settings or {}))
        save_file(weights, directory / "model.safetensors")
        return directory

    return write
