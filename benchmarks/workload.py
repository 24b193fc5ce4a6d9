"""What all benchmarks share: the 1B model with random weights, pinned child processes, medians."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
PROMPT_TOKENS = 512
DECODE_TOKENS = 128

Figures = dict[str, float]


def model_1b() -> Path:
    """A GGUF file of about 1.1 B parameters in Q4_0 (the shape of Llama 3.2 1B with a vocabulary of 32,000), made at the first call."""
    path = CACHE / "random-1b-q4_0.gguf"
    if not path.exists():
        from yoke.testing.models import write_random_model

        CACHE.mkdir(exist_ok=True)
        print(f"making {path.name} with random weights (a minute or two)", file=sys.stderr)
        draft = path.with_suffix(".draft")
        write_random_model(
            draft,
            architecture="llama",
            n_blocks=16,
            width=2048,
            n_heads=32,
            n_kv_heads=8,
            head_dim=64,
            columns=8192,
            vocabulary=32000,
            context=4096,
            type="q4_0",
            rope_base=500_000.0,
        )
        draft.replace(path)
    return path


def pinned_json(command: Sequence[str], cpus: str) -> Figures:
    """Run a command on the given processors (where the system can pin) and read the JSON object that it prints last."""
    prefix = ["taskset", "-c", cpus] if sys.platform == "linux" else []
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    result = subprocess.run([*prefix, *command], check=True, stdout=subprocess.PIPE, text=True, env=environment)
    figures: Figures = json.loads(result.stdout.strip().splitlines()[-1])
    return figures


def median_of(rounds: Sequence[Figures], name: str) -> float:
    """The median of one figure."""
    return statistics.median(figures[name] for figures in rounds)


def median_ratio(ours: Sequence[Figures], theirs: Sequence[Figures], name: str) -> float:
    """The median of the ratios pair by pair: holds when the machine's speed drifts."""
    return statistics.median(a[name] / b[name] for a, b in zip(ours, theirs, strict=True))
