"""Architectures as functions over Ops: what a GGUF's metadata means, which tensors a shard needs, and the one decoder text."""
