"""openvino-genai's continuous batching: python run_openvino.py MODEL REQUESTS DTYPE CORES

Settings are the fastest found on two cores; the precision of the KV cache is OpenVINO's own choice.
"""

import numpy as np
import openvino as ov
import openvino_genai as genai
from timing import arguments, measure

model, requests, dtype, cores = arguments()
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


measure(generate, requests)
