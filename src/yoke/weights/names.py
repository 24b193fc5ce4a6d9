"""Which tensors the model families have: their names in Hugging Face checkpoints and in GGUF, and their shapes. Tables only.

Legend of shapes: V vocabulary, D width, Q all query heads' dims, K all key/value heads' dims, C one head's dims, F feed-forward columns. Rows first.
GGUF names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#standardized-tensor-names.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRule:
    """One tensor, or with ``{i}`` in its names one in each block: its ``source`` and ``target`` name and its shape in letters.

    ``heads`` is the letter (Q or K) of the heads whose rows change order when the family permutes for interleaved rotary embedding, or empty.
    """

    source: str
    target: str
    shape: str
    heads: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture: its name in GGUF, its rules, and whether its query and key rows are permuted.

    Hugging Face turns halves of a head against each other; the GGUF architecture ``llama`` turns neighbours. ``window_flag`` is the configuration entry
    without which a sliding window does not count.
    """

    architecture: str
    rules: tuple[TensorRule, ...]
    permuted: bool = False
    window_flag: str = ""
    has_window: bool = True


OUTPUT: Final = "lm_head.weight"

_OUTER: Final = (
    TensorRule(source="model.embed_tokens.weight", target="token_embd.weight", shape="VD"),
    TensorRule(source="model.norm.weight", target="output_norm.weight", shape="D"),
    TensorRule(source=OUTPUT, target="output.weight", shape="VD"),
)


def _block(source: str, target: str, shape: str, heads: str = "") -> TensorRule:
    return TensorRule(source=f"model.layers.{{i}}.{source}", target=f"blk.{{i}}.{target}", shape=shape, heads=heads)


_LLAMA: Final = (
    *_OUTER,
    _block("input_layernorm.weight", "attn_norm.weight", "D"),
    _block("self_attn.q_proj.weight", "attn_q.weight", "QD", "Q"),
    _block("self_attn.k_proj.weight", "attn_k.weight", "KD", "K"),
    _block("self_attn.v_proj.weight", "attn_v.weight", "KD"),
    _block("self_attn.o_proj.weight", "attn_output.weight", "DQ"),
    _block("post_attention_layernorm.weight", "ffn_norm.weight", "D"),
    _block("mlp.gate_proj.weight", "ffn_gate.weight", "FD"),
    _block("mlp.up_proj.weight", "ffn_up.weight", "FD"),
    _block("mlp.down_proj.weight", "ffn_down.weight", "DF"),
)
_QWEN2: Final = (
    *_LLAMA,
    _block("self_attn.q_proj.bias", "attn_q.bias", "Q", "Q"),
    _block("self_attn.k_proj.bias", "attn_k.bias", "K", "K"),
    _block("self_attn.v_proj.bias", "attn_v.bias", "K"),
)
_QWEN3: Final = (
    *_LLAMA,
    _block("self_attn.q_norm.weight", "attn_q_norm.weight", "C"),
    _block("self_attn.k_norm.weight", "attn_k_norm.weight", "C"),
)

FAMILIES: Final = {
    "LlamaForCausalLM": Family(architecture="llama", rules=_LLAMA, permuted=True, has_window=False),
    "MistralForCausalLM": Family(architecture="llama", rules=_LLAMA, permuted=True),
    "Qwen2ForCausalLM": Family(architecture="qwen2", rules=_QWEN2, window_flag="use_sliding_window"),
    "Qwen3ForCausalLM": Family(architecture="qwen3", rules=_QWEN3, window_flag="use_sliding_window"),
}

# Buffers that old checkpoints carry and that are computed anew.
IGNORED_SUFFIXES: Final = ("rotary_emb.inv_freq",)
