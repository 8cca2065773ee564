"""What Hugging Face's own ``generate`` answers to the shipped sample, on the device that the engines run on.

``python -m acceptance.answers MODEL COUNT MOST DEVICE`` prints the ids as JSON, by index.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from harness.workload.formats.sample import SAMPLE_PATH


def generated(model: Path, count: int, most: int, device: str) -> dict[int, list[int]]:
    """Returns the ids, ``most`` at most, that follow each of the first ``count`` prompts greedily in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device).eval()
    found = {}
    for index, line in enumerate(SAMPLE_PATH.read_text(encoding="utf-8").splitlines()[:count]):
        entry = json.loads(line)
        inputs = tokenizer(entry["prompt"], return_tensors="pt").to(device)
        with torch.inference_mode():
            output = network.generate(**inputs, do_sample=False, max_new_tokens=min(entry["output_len"], most))
        found[index] = output[0, inputs.input_ids.shape[1] :].tolist()
    return found


if __name__ == "__main__":
    print(json.dumps(generated(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
