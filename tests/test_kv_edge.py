"""A KV cache just large enough for the longest request, and one block less, on real runs of a small model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.models import save_small_demo
from support.runs import SAMPLE, Run

from harness.config.schema import ModelConfig

BLOCK = 16  # tokens, the smallest that all kernels take
LONGEST = (70, 11)  # about how many words its prompt has, and its output's tokens
PLACE = 17  # of the longest request in the file: neither first nor last


def block_bytes(model: Path) -> int:
    """Returns the bytes of one block of float32 keys and values, from the model's own sizes."""
    config = json.loads((model / "config.json").read_text())
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * 4 * BLOCK


def dataset(file: Path, count: int) -> list[list[object]]:
    """Writes ``count`` requests of a few tokens, one of them long, cut out of the shipped sample."""
    words = " ".join(json.loads(line)["prompt"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()).split()
    words = [word for word in words if word.isascii() and word.isalpha()]  # a text without spaces is no short word
    triples: list[list[object]] = []
    for index in range(count):
        start, length = 37 * index % (len(words) - 100), 2 + index % 9
        triples.append([" ".join(words[start : start + length]), 1, 30 if index % 9 < 2 else 3 + index % 6])
    triples[PLACE] = [" ".join(words[: LONGEST[0]]), 1, LONGEST[1]]
    file.write_text(json.dumps(triples))
    return triples


@pytest.mark.slow
@pytest.mark.endurance
def test_a_cache_of_exactly_the_longest_request(
    harness: Callable[..., Run],
    tmp_path: Path,
    demo_model: Path,
    scale: Callable[[int, int], int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    from harness.models.locate import locate
    from harness.models.tokenizer import load_tokenizer

    model = save_small_demo(tmp_path / "model", demo_model)
    triples = dataset(tmp_path / "data.json", scale(40, 500))
    tokenizer = load_tokenizer(locate(ModelConfig(name="small", path=str(model))))
    prompts = tokenizer([str(prompt) for prompt, _, _ in triples]).input_ids
    # The last token of an output is never fed back, so its keys and values are never stored.
    needed = [
        -(-(len(ids) + int(str(output)) - 1) // BLOCK) for ids, (_, _, output) in zip(prompts, triples, strict=True)
    ]
    longest = needed[PLACE]
    assert longest > 5 and max(needed[:PLACE] + needed[PLACE + 1 :]) < longest

    def run(name: str, memory: int) -> Run:
        return harness(
            *(
                f"model.path={model}",
                "dataset=asc24",
                f"dataset.path={tmp_path / 'data.json'}",
                "model.dtype=float32",
                "generation.stop=length",
            ),
            *(f"engine.kv_block_size={BLOCK}", f"engine.kv_memory={memory}"),
            results=tmp_path / name,
        )

    started = time.perf_counter()
    ample = run("ample", 2**30)
    assert ample.status == 0, ample.stderr
    exact = run("exact", longest * block_bytes(model))
    assert exact.status == 0, exact.stderr
    assert (exact.row["status"], exact.row["completed"], exact.row["rejected"]) == ("ok", str(len(triples)), "0")
    assert exact.record["engine_statistics"]["kv_blocks"] == longest
    assert exact.record["engine_statistics"]["kv_peak_utilisation"] == 1.0
    assert int(exact.row["preemptions"]) > 0  # the cache was so full that sequences had to give way
    assert exact.token_ids == ample.token_ids
    counts = {
        index: (len(ids), output) for index, (ids, (_, _, output)) in enumerate(zip(prompts, triples, strict=True))
    }
    assert {i: (line["prompt_tokens"], line["output_tokens"]) for i, line in exact.completions.items()} == counts

    less = run("less", longest * block_bytes(model) - 1)
    assert less.status == 0, less.stderr
    assert less.record["engine_statistics"]["kv_blocks"] == longest - 1
    assert (less.row["completed"], less.row["rejected"]) == (str(len(triples) - 1), "1")
    refused = less.completions[PLACE]
    assert (refused["finish_reason"], refused["token_ids"]) == ("rejected", [])
    assert refused["error"] == (
        f"prompt of {len(prompts[PLACE])} tokens + output_len {LONGEST[1]} needs {longest} KV blocks of {BLOCK} "
        f"tokens, the cache has {longest - 1} (engine.kv_memory)"
    )
    assert {**less.token_ids, PLACE: ample.token_ids[PLACE]} == ample.token_ids
    with capsys.disabled():
        print(
            f"\n{len(triples)} requests, three runs in {time.perf_counter() - started:.0f} s: {longest} blocks of "
            f"{BLOCK} tokens, {exact.row['preemptions']} preemptions; with {longest - 1} {less.row['preemptions']}; "
            f"ample {ample.row['preemptions']}"
        )
