"""vLLM's offline LLM.generate on a CPU: python run_vllm.py MODEL REQUESTS DTYPE CORES

Settings are the fastest found on two cores.
"""

import json
import os
import sys
import time


def main() -> None:
    """Prints the time that all requests took."""
    model, requests_file, dtype, cores = sys.argv[1:]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = cores
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GB
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vllm import LLM, SamplingParams

    with open(requests_file) as file:
        requests = json.load(file)
    longest = max(len(ids) + length for ids, length in requests)
    engine = LLM(
        model,
        dtype=dtype,
        max_model_len=max(longest, 2048),
        max_num_seqs=128,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,
    )

    def generate(jobs):  # type: ignore[no-untyped-def]
        results = engine.generate(
            [{"prompt_token_ids": ids} for ids, _ in jobs],
            [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for _, length in jobs],
            use_tqdm=False,
        )
        return [list(result.outputs[0].token_ids) for result in results]

    generate([(ids[:32], 4) for ids, _ in requests[:4]])
    started = time.perf_counter()
    outputs = generate(requests)
    seconds = time.perf_counter() - started
    wrong = sum(len(ids) != length for ids, (_, length) in zip(outputs, requests, strict=True))
    print(json.dumps({"seconds": seconds, "wrong_length": wrong}), flush=True)


if __name__ == "__main__":
    main()
