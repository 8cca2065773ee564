"""vLLM's offline LLM.generate on a CPU: python run_vllm.py MODEL REQUESTS DTYPE CORES

Settings are the fastest found on two cores.
"""

import os

from timing import arguments, measure


def main() -> None:
    """Prints the time that all requests took."""
    model, requests, dtype, cores = arguments()
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = cores
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GB
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vllm import LLM, SamplingParams

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

    measure(generate, requests)


if __name__ == "__main__":
    main()
