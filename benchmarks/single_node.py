"""One machine, no tax: `yoke bench` against llama.cpp on the same file, same threads, in turn, and both processes' memory.

usage: python benchmarks/single_node.py [--threads 1,2] [--rounds 5]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
from workload import DECODE_TOKENS, PROMPT_TOKENS, Figures, median_of, median_ratio, model_1b, pinned_json

HERE = Path(__file__).resolve().parent
CACHE_BYTES = 768 * 16 * 2 * 8 * 64 * 2  # cells x blocks x (keys, values) x heads x dim x bytes of F16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    path = model_1b()
    weights = path.stat().st_size
    print(f"{path.name}: {weights / 1e6:.0f} MB of weights, cache of {CACHE_BYTES / 1e6:.0f} MB, prompt {PROMPT_TOKENS}, answer {DECODE_TOKENS}")
    for threads in map(int, arguments.threads.split(",")):
        cpus = ",".join(map(str, range(threads)))
        ours, theirs = [], []
        for _ in range(arguments.rounds):
            ours.append(yoke_figures(path, threads, cpus))
            theirs.append(pinned_json([sys.executable, str(HERE / "llama_cpp_peer.py"), str(path), str(threads), "1"], cpus))
        report(threads, ours, theirs, weights)


def yoke_figures(path: Path, threads: int, cpus: str) -> Figures:
    """Speed by `yoke bench`, and the resident and peak memory of its worker."""
    flags = ["--threads", str(threads), "--runs", "1", "--json"]
    prefix = ["taskset", "-c", cpus] if sys.platform == "linux" else []
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    with subprocess.Popen([*prefix, sys.executable, "-m", "yoke", "bench", str(path), *flags], stdout=subprocess.PIPE, text=True, env=environment) as process:
        resident = peak = 0
        while process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                try:
                    memory = Path(f"/proc/{child.pid}/status").read_text(encoding="ascii")
                except OSError:
                    continue
                values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in memory.splitlines() if line.startswith(("VmRSS", "VmHWM"))}
                resident, peak = values.get("VmRSS", resident), max(peak, values.get("VmHWM", 0))
            time.sleep(0.1)
        figures: Figures = json.loads(process.stdout.read().strip().splitlines()[-1] if process.stdout else "{}")
    return {**figures, "resident_bytes": resident, "peak_bytes": peak}


def report(threads: int, ours: list[Figures], theirs: list[Figures], weights: int) -> None:
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s"):
        mine, peer, ratio = median_of(ours, name), median_of(theirs, name), median_ratio(ours, theirs, name)
        print(f"{threads} thread(s) {name}: yoke {mine:.1f}, llama.cpp {peer:.1f}, ratio {ratio:.3f}")
    for name in ("resident_bytes", "peak_bytes"):
        mine, peer = median_of(ours, name), median_of(theirs, name)
        beyond = (mine - CACHE_BYTES) / weights - 1
        print(f"{threads} thread(s) {name}: yoke {mine / 1e6:.0f} MB (weights {beyond:+.1%} + cache), llama.cpp {peer / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
