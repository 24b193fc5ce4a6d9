"""Is HTTP in the way? Clients stream from `yoke serve`: the gap between a token's draw and its SSE line, and the speed against `yoke bench`.

usage: python benchmarks/http_stream.py [--clients 8] [--tokens 64] [--rounds 5]
"""

import argparse
import asyncio
import json
import os
import sys
import time
from typing import Any

from workload import median_of, median_ratio, model_1b, pinned_json

PROMPT = 1  # so that reading prompts, in whatever order they come, takes no part in the speed of writing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    path, n, tokens = model_1b(), arguments.clients, arguments.tokens
    bench = [sys.executable, "-m", "yoke", "bench", str(path), "--threads", "1", "--sessions", str(n), "--prompt-tokens", str(PROMPT)]
    bench += ["--decode-tokens", str(tokens), "--runs", "1", "--json"]
    direct, served, gaps = [], [], []
    for _ in range(arguments.rounds):
        direct.append(pinned_json(bench, "0,1"))
        speed, gap = asyncio.run(serve_and_stream(str(path), n, tokens))
        served.append({"decode_tokens_per_s": speed})
        gaps += gap
    gaps.sort()
    half, most = gaps[len(gaps) // 2], gaps[int(len(gaps) * 0.99)]
    print(f"{n} clients, {len(gaps)} tokens: draw to SSE line {half * 1e3:.2f} ms median, {most * 1e3:.2f} ms 99th percentile, {gaps[-1] * 1e3:.1f} ms at most")
    name = "decode_tokens_per_s"
    print(f"decode over HTTP {median_of(served, name):.1f} tokens/s, without {median_of(direct, name):.1f}, ratio {median_ratio(served, direct, name):.3f}")


async def serve_and_stream(path: str, n: int, tokens: int) -> tuple[float, list[float]]:
    """Decode speed of all clients together, and each token's gap in seconds, after one warm-up round."""
    cells = str(-(-n * (PROMPT + tokens) // 256) * 256)
    command = [sys.executable, "-m", "yoke", "serve", path, "--threads", "1", "--port", "0", "--context", str(PROMPT + tokens), "--cells", cells]
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    server = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=environment)
    try:
        line = await server.stdout.readline() if server.stdout else b""
        port = int(line.rsplit(b":", 1)[1])
        await asyncio.gather(*(stream(port, index, tokens) for index in range(n)))
        results = await asyncio.gather(*(stream(port, index, tokens) for index in range(n)))
    finally:
        server.terminate()
        await server.wait()
    decoded = sum(r["completion_tokens"] - 1 for r in results)
    return decoded / max(r["decode_s"] for r in results), [gap for r in results for gap in r["gaps"]]


async def stream(port: int, index: int, tokens: int) -> dict[str, Any]:
    """One client: a bare HTTP/1.1 stream, so that the client's own library costs nothing."""
    prompt = [(7 * position + 13 * index) % 31000 + 3 for position in range(PROMPT)]
    body = json.dumps(
        {"model": "", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True, "yoke_timings": True}
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    gaps, figures = [], {}
    while True:
        line = (await reader.readline()).strip()
        now = time.monotonic()
        if line == b"data: [DONE]":
            break
        if line.startswith(b"data: "):
            timing = json.loads(line[6:]).get("yoke", {})
            if "sampled_at_s" in timing:
                gaps.append(now - timing["sampled_at_s"])
            figures.update(timing)
        elif not line and reader.at_eof():
            raise SystemExit("the server ended the stream")
    writer.close()
    return {"gaps": gaps, "decode_s": figures["decode_s"], "completion_tokens": tokens}


if __name__ == "__main__":
    main()
