"""The decoder, written once. A block is two sublayers; each maps the residual stream to a contribution that is summed over the stage's group and added to it.

Nothing here knows how many ranks or stages there are: counts of heads and columns are the shard's own. Legend of shapes as in ``backends.ops``:
T tokens, D width, H heads, K key/value heads, C head dim, F columns, A attended size H * C.
"""

from yoke.backends.ops import Ops, TensorT, Text
from yoke.core.plan import Plan, Shard, Stage
from yoke.core.spec import ModelSpec


def decoder(plan: Plan, stage_index: int, rank: int) -> Text:
    """The text of one shard: its blocks, and in the last stage norm and output matrix."""
    stage = plan.stages[stage_index]
    return _Decoder(plan.spec, stage, stage.shards[rank], is_last=stage_index == len(plan.stages) - 1)


class _Decoder:
    def __init__(self, spec: ModelSpec, stage: Stage, shard: Shard, *, is_last: bool) -> None:
        self._spec, self._stage, self._shard, self._is_last = spec, stage, shard, is_last

    def __call__(self, ops: Ops[TensorT], x_TD: TensorT, /) -> TensorT:
        """All blocks of the stage. In the model's last block, only rows whose next token is wanted go on after attention."""
        blocks = self._stage.blocks
        for block in range(blocks.start, blocks.stop):
            x_TD = ops.add(x_TD, ops.all_reduce(self._attention(ops, x_TD, block)))
            if self._is_last and block == blocks.stop - 1:
                x_TD = ops.output_rows(x_TD)
            x_TD = ops.add(x_TD, ops.all_reduce(self._feed_forward(ops, x_TD, block)))
        return self._head(ops, x_TD) if self._is_last and self._shard.vocabulary else x_TD

    def _attention(self, ops: Ops[TensorT], x_TD: TensorT, block: int) -> TensorT:
        spec, n_heads = self._spec, len(self._shard.heads)
        if n_heads == 0:
            return ops.zeros_like(x_TD)
        kv_start, kv_stop = spec.kv_heads_of(self._shard.heads.start, self._shard.heads.stop)
        normed_TD = ops.rms_norm(x_TD, ops.weight(f"blk.{block}.attn_norm.weight"), spec.norm_epsilon)
        q_THC = self._heads(ops, normed_TD, block, "q", n_heads)
        k_TKC = self._heads(ops, normed_TD, block, "k", kv_stop - kv_start)
        v_TKC = self._heads(ops, normed_TD, block, "v", kv_stop - kv_start)
        factors = ops.weight("rope_freqs.weight") if spec.rope.has_factors else None
        q_THC, k_TKC = ops.rope(q_THC, spec.rope, factors), ops.rope(k_TKC, spec.rope, factors)
        mixed_TA = ops.attention(q_THC, k_TKC, v_TKC, block=block - self._stage.blocks.start, scale=spec.head_dim**-0.5, window=spec.window)
        return ops.linear(mixed_TA, ops.weight(f"blk.{block}.attn_output.weight"))

    def _heads(self, ops: Ops[TensorT], x_TD: TensorT, block: int, part: str, n_heads: int) -> TensorT:
        """Project to queries, keys or values, with the family's bias and norm."""
        spec, name = self._spec, f"blk.{block}.attn_{part}"
        x_TA = ops.linear(x_TD, ops.weight(name + ".weight"))
        if spec.has_qkv_bias:
            x_TA = ops.add(x_TA, ops.weight(name + ".bias"))
        x_THC = ops.heads(x_TA, n_heads)
        if spec.has_qk_norm and part != "v":
            x_THC = ops.rms_norm(x_THC, ops.weight(name + "_norm.weight"), spec.norm_epsilon)
        return x_THC

    def _feed_forward(self, ops: Ops[TensorT], x_TD: TensorT, block: int) -> TensorT:
        if not self._shard.columns:
            return ops.zeros_like(x_TD)
        prefix = f"blk.{block}.ffn_"
        normed_TD = ops.rms_norm(x_TD, ops.weight(prefix + "norm.weight"), self._spec.norm_epsilon)
        gated_TF = ops.swiglu(ops.linear(normed_TD, ops.weight(prefix + "gate.weight")), ops.linear(normed_TD, ops.weight(prefix + "up.weight")))
        return ops.linear(gated_TF, ops.weight(prefix + "down.weight"))

    def _head(self, ops: Ops[TensorT], x_TD: TensorT) -> TensorT:
        normed_TD = ops.rms_norm(x_TD, ops.weight("output_norm.weight"), self._spec.norm_epsilon)
        return ops.linear(normed_TD, ops.weight("token_embd.weight" if self._spec.tied else "output.weight"))
