"""llama.cpp itself on the same file, through libllama as llama-cpp-python installs it: prefill and decode speed, and memory. Prints one JSON object.

usage: python benchmarks/llama_cpp_peer.py MODEL THREADS [RUNS]
"""

import ctypes
import json
import resource
import statistics
import sys
import time

import llama_cpp
import psutil
from workload import DECODE_TOKENS, PROMPT_TOKENS


def main() -> None:
    path, threads = sys.argv[1], int(sys.argv[2])
    runs = int(sys.argv[3]) if len(sys.argv) > 3 else 5
    quiet = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 1024, PROMPT_TOKENS, PROMPT_TOKENS
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = 1  # on, as ours is
    params.no_perf = True
    context = llama_cpp.llama_init_from_model(model, params)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    prompt = [(7 * position) % (vocabulary - 3) + 3 for position in range(PROMPT_TOKENS)]
    one_round(context, prompt, vocabulary)
    rounds = [one_round(context, prompt, vocabulary) for _ in range(runs)]
    print(
        json.dumps(
            {
                "prefill_tokens_per_s": statistics.median(prefill for prefill, _ in rounds),
                "decode_tokens_per_s": statistics.median(decode for _, decode in rounds),
                "resident_bytes": psutil.Process().memory_info().rss,
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


def one_round(context: object, prompt: list[int], vocabulary: int) -> tuple[float, float]:
    """Tokens a second of reading the prompt and of writing greedily after it."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    started = time.perf_counter()
    token = step(context, prompt, vocabulary)
    read = time.perf_counter()
    for _ in range(DECODE_TOKENS - 1):
        token = step(context, [token], vocabulary)
    done = time.perf_counter()
    return len(prompt) / (read - started), (DECODE_TOKENS - 1) / (done - read)


def step(context: object, tokens: list[int], vocabulary: int) -> int:
    """Compute some tokens; the likeliest next one."""
    import numpy as np

    array = (llama_cpp.llama_token * len(tokens))(*tokens)
    if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens))) != 0:
        raise SystemExit("llama_decode failed")
    logits = llama_cpp.llama_get_logits_ith(context, -1)
    return int(np.argmax(np.ctypeslib.as_array(logits, (vocabulary,))))


if __name__ == "__main__":
    main()
