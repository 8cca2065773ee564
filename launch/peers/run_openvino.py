"""openvino-genai's continuous batching: python run_openvino.py MODEL REQUESTS DTYPE CORES

Settings are the fastest found on two cores; the precision of the KV cache is OpenVINO's own choice.
"""

import json
import sys
import time

import numpy as np
import openvino as ov
import openvino_genai as genai

model, requests_file, dtype, cores = sys.argv[1:]
with open(requests_file) as file:
    requests = json.load(file)
scheduler = genai.SchedulerConfig()
scheduler.cache_size = 3  # GB
scheduler.max_num_seqs = 128
scheduler.max_num_batched_tokens = 256
scheduler.dynamic_split_fuse = True
scheduler.enable_prefix_caching = False
properties = {
    "INFERENCE_PRECISION_HINT": {"bfloat16": "bf16", "float32": "f32"}[dtype],
    "INFERENCE_NUM_THREADS": len(cores.split(",")),
    "PERFORMANCE_HINT": "LATENCY",
}
pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)


def generate(jobs):
    """Returns the generated ids of each (prompt ids, output length)."""
    configs = []
    for _, length in jobs:
        config = genai.GenerationConfig()
        config.max_new_tokens = length
        config.ignore_eos = True
        config.do_sample = False
        configs.append(config)
    prompts = [ov.Tensor(np.array([ids], dtype=np.int64)) for ids, _ in jobs]
    return [list(result.m_generation_ids[0]) for result in pipeline.generate(prompts, configs)]


generate([(ids[:32], 4) for ids, _ in requests[:4]])
started = time.perf_counter()
outputs = generate(requests)
seconds = time.perf_counter() - started
wrong = sum(len(ids) != length for ids, (_, length) in zip(outputs, requests, strict=True))
print(json.dumps({"seconds": seconds, "wrong_length": wrong}), flush=True)
