"""Hugging Face's own answers to the shipped sample in float32, computed or read from the file of them.

``PYTHONPATH=.:tests python tests/support/answers.py`` computes all of them and writes the file.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from support.runs import ROOT, SAMPLE, variables

KEPT = ROOT / "tests" / "data" / "sample_float32_ids.json"
EVERY = 72
ANSWER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

directory, sample, count, part, parts = sys.argv[1:]
torch.set_num_threads(max(1, torch.get_num_threads() // int(parts)))
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
answers = {}
for index, line in enumerate(open(sample, encoding="utf-8").readlines()[: int(count)]):
    if index % int(parts) == int(part):
        entry = json.loads(line)
        inputs = tokenizer(entry["prompt"], return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=entry["output_len"])
        answers[index] = output[0, inputs.input_ids.shape[1] :].tolist()
print(json.dumps(answers))
"""


def computed(model: Path, count: int) -> dict[int, list[int]]:
    """Returns the ids of the first ``count`` prompts, by index.

    Two processes share them: with one thread each they are faster than one with two.
    """
    arguments = [sys.executable, "-c", ANSWER, str(model), str(SAMPLE), str(count)]
    helpers = [
        subprocess.Popen([*arguments, str(part), "2"], stdout=-1, env=variables(), text=True, cwd=ROOT)
        for part in range(2)
    ]
    outputs = [helper.communicate(timeout=1200)[0] for helper in helpers]
    assert [helper.returncode for helper in helpers] == [0, 0]
    return {int(index): ids for output in outputs for index, ids in json.loads(output).items()}


def followed(model: Path, known: dict[int, list[int]]) -> dict[int, list[int]]:
    """Returns, by index, the ids that greedy decoding takes, each after the prompt and the known ids before it.

    They equal ``known`` where, and only where, ``generate`` gives ``known``: one pass over all positions tells. Ids end
    with the sequence or at the prompt's output_len, as there, or what is returned is empty.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    stop = network.generation_config.eos_token_id
    stops = set(stop if isinstance(stop, list) else [stop])
    entries = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    found = {}
    for index, ids in known.items():
        prompt = tokenizer(entries[index]["prompt"]).input_ids
        ended = len(ids) == entries[index]["output_len"] or (len(ids) > 0 and ids[-1] in stops)
        if not ended or len(ids) > entries[index]["output_len"] or stops & set(ids[:-1]):
            found[index] = []
            continue
        with torch.inference_mode():
            logits = network(torch.tensor([prompt + ids[:-1]]), logits_to_keep=len(ids)).logits[0]
        found[index] = logits.argmax(-1).tolist()
    return found


def kept(model: Path) -> dict[int, list[int]] | None:
    """Returns the ids in the file, or None where they are of another model or sample."""
    found = json.loads(KEPT.read_text())
    if found["of"] != digests(model):
        return None
    return {int(index): ids for index, ids in found["ids"].items()}


def digests(model: Path) -> dict[str, str]:
    """Returns what the ids depend on: the SHA-256 of the model's and the sample's files."""
    paths = {"sample": SAMPLE} | {name: model / name for name in ("model.safetensors", "tokenizer.json")}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}


def main() -> None:
    """Computes all ids and writes the file."""
    from harness.models import demo

    model = demo.ensure()
    ids = {str(index): ids for index, ids in sorted(computed(model, EVERY).items())}
    lines = ",\n".join(f"{json.dumps(index)}: {json.dumps(row)}" for index, row in ids.items())
    KEPT.write_text(f'{{"of": {json.dumps(digests(model))},\n"ids": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    main()
