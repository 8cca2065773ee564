"""Recounts a run from its token ids and its dataset, sharing no code with the harness: json, csv and ``tokenizers``.

Every request must be there once; prompts are tokenized anew; the sums and rates must be those of record.json and of the
row in runs.csv.

    python launch/recount.py RUN_DIRECTORY DATASET TOKENIZER_JSON

DATASET: a JSON list of [prompt, prompt_len, output_len], plain or .gz, or lines of {"prompt": ..., "output_len": ...},
fed as it is, in its order.
Exit status 0: all equal; 1: something differs; 2: a file cannot be read.
"""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer


def requests_of(path: Path) -> list[tuple[str, int]]:
    """Returns (prompt, output_len) of every request."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    if text.lstrip().startswith("["):
        return [(prompt, output_len) for prompt, _, output_len in json.loads(text)]
    lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    return [(line["prompt"], line["output_len"]) for line in lines]


def asked(config: dict[str, Any], dataset: Path) -> list[tuple[str, int]]:
    """Returns the requests that a run of this config took of the file; raises ValueError where it changed them."""
    for key in ("chat_template", "shuffle"):
        if config["dataset"].get(key):
            raise ValueError(f"its prompts are not those of the file as they stand there: dataset.{key}=true")
    requests, first = requests_of(dataset), config["dataset"]["num_samples"]
    return requests if first is None else requests[:first]


def recount(directory: Path, dataset: Path, tokenizer: Path) -> list[str]:
    """Prints what was counted and returns what differs."""
    record: dict[str, Any] = json.loads((directory / "record.json").read_text())
    lines = [json.loads(line) for line in (directory / "completions.jsonl").read_text().splitlines()]
    requests, cap = asked(record["config"], dataset), record["config"]["generation"]["max_output_len"]
    wrong = []

    times = Counter(line["index"] for line in lines)
    missing = [index for index in range(len(requests)) if index not in times]
    twice = [index for index, count in times.items() if count > 1]
    foreign = [index for index in times if not 0 <= index < len(requests)]
    for name, indices in (("missing", missing), ("twice", twice), ("not in the dataset", foreign)):
        if indices:
            wrong.append(f"{len(indices)} requests are {name}, {indices[0]} among them")

    encoder = Tokenizer.from_file(str(tokenizer))
    encoder.no_truncation()
    encoder.no_padding()
    done = [line for line in lines if line["finish_reason"] != "rejected" and line["index"] not in foreign]
    encoded = encoder.encode_batch([requests[line["index"]][0] for line in done])
    prompt_tokens = output_tokens = 0
    for line, encoding in zip(done, encoded, strict=True):
        index, ids, claimed = line["index"], len(line["token_ids"]), (line["prompt_tokens"], line["output_tokens"])
        if claimed != (len(encoding.ids), ids):
            wrong.append(f"request {index} says {claimed} prompt and output tokens, counted {(len(encoding.ids), ids)}")
        limit = requests[index][1] if cap is None else min(cap, requests[index][1])
        if not 1 <= ids <= limit or (line["finish_reason"] == "length" and ids != limit):
            wrong.append(f"request {index} ended by {line['finish_reason']} after {ids} tokens, output_len {limit}")
        prompt_tokens += len(encoding.ids)
        output_tokens += ids

    counts = {
        "completed": len(done),
        "rejected": len(lines) - len(done) - len(foreign),
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
    }
    with open(directory.resolve().parent / "runs.csv", newline="") as table:
        rows = [row for row in csv.DictReader(table) if row["run_id"] == record["run_id"]]
    if len(rows) != 1:
        wrong.append(f"{len(rows)} rows of {record['run_id']} in runs.csv")
    sources: list[tuple[str, dict[str, Any]]] = [("record.json", record), *(("runs.csv", row) for row in rows)]
    for where, said in sources:
        wrong += [
            f"{where} says {name} {said[name]}, counted {count}"
            for name, count in counts.items()
            if str(said[name]) != str(count)
        ]
        if said["elapsed_s"]:
            elapsed_s, rate = float(said["elapsed_s"]), float(said["total_tokens_per_s"] or "nan")
            if not abs(rate * elapsed_s - counts["total_tokens"]) <= 1e-5 * max(counts["total_tokens"], 1):
                wrong.append(f"{where} says {rate} total tokens/s, which is not {counts['total_tokens']} / {elapsed_s}")
    once = "each index once" if not (missing or twice or foreign) else "not each index once"
    print(f"{record['run_id']!a}: {len(lines):,} lines for {len(requests):,} requests, {once}")
    print(", ".join(f"{name} {count:,}" for name, count in counts.items()))
    return wrong


def main() -> int:
    """Runs the command; returns the exit status."""
    if len(sys.argv) != 4:
        print("usage: python launch/recount.py RUN_DIRECTORY DATASET TOKENIZER_JSON", file=sys.stderr)
        return 2
    try:
        wrong = recount(*map(Path, sys.argv[1:]))
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except (ValueError, KeyError, TypeError) as error:
        print(f"error: not the files of a run: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    for text in wrong[:20]:
        print(f"differs: {ascii(text)[1:-1]}")
    print("the recount differs from the run" if wrong else "the recount and the run agree")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
