"""Which slice of which tensor a shard needs. Pure: names and ranges, no bytes."""

from dataclasses import dataclass

from yoke.core.plan import Plan, Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A slice of a stored tensor: half-open ranges of rows and columns; None is all of them."""

    name: str
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None


EMBEDDING = "token_embd.weight"
"""Where tokens' first hidden states are looked up, by the engine."""


def shard_cuts(plan: Plan, stage_index: int, rank: int) -> tuple[Cut, ...]:
    """The slices that one rank of one stage loads, block by block. The token embedding is not among them: it is looked up where the text enters."""
    spec, stage = plan.spec, plan.stages[stage_index]
    shard = stage.shards[rank]
    kv_heads = plan.kv_heads(shard)
    queries, keys, columns = _range(shard.heads, spec.head_dim), _range(kv_heads, spec.head_dim), _range(shard.columns)
    cuts: list[Cut] = []
    if spec.rope.has_factors and shard.heads:
        cuts.append(Cut(name="rope_freqs.weight"))
    for block in range(stage.blocks.start, stage.blocks.stop):
        prefix = f"blk.{block}."
        if shard.heads:
            cuts.append(Cut(name=prefix + "attn_norm.weight"))
            for part, rows in (("q", queries), ("k", keys), ("v", keys)):
                cuts.append(Cut(name=f"{prefix}attn_{part}.weight", rows=rows))
                if spec.has_qkv_bias:
                    cuts.append(Cut(name=f"{prefix}attn_{part}.bias", rows=rows))
            if spec.has_qk_norm:
                cuts += [Cut(name=f"{prefix}attn_{part}_norm.weight") for part in "qk"]
            cuts.append(Cut(name=prefix + "attn_output.weight", columns=queries))
        if shard.columns:
            cuts += [Cut(name=prefix + "ffn_norm.weight"), Cut(name=prefix + "ffn_gate.weight", rows=columns)]
            cuts += [Cut(name=prefix + "ffn_up.weight", rows=columns), Cut(name=prefix + "ffn_down.weight", columns=columns)]
    if shard.vocabulary:
        cuts.append(Cut(name="output_norm.weight"))
        cuts.append(Cut(name=EMBEDDING if spec.tied else "output.weight", rows=_range(shard.vocabulary)))
    return tuple(cuts)


def _range(span: Span, size: int = 1) -> tuple[int, int]:
    return (span.start * size, span.stop * size)
