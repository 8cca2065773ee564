"""Passes of known cost, for what fits and explains them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from harness.config.compose import compose
from harness.config.schema import Accelerator, HardwareConfig
from harness.costs.fitting import Observed
from harness.costs.roofline import CPU, Factors, Host, Roofline, on_other_ranks
from harness.costs.shape import ModelShape
from harness.costs.work import PassWork
from harness.engines import catalogue
from harness.workload.records import PASS_COLUMNS

SMALL = ModelShape(
    layers=30,
    hidden=576,
    heads=9,
    kv_heads=3,
    head_dim=64,
    vocab=49152,
    inner=1536,
    matmul=106_168_320,
    head=28_311_552,
    total=134_515_008,
    element_bytes=4,
    weight_bytes=4,
    kv_element_bytes=4,
)
MACHINE = HardwareConfig(
    name="bench", accelerator=Accelerator.cpu, peak_flops={"float32": 1e11}, memory_bandwidth=2e10, memory_bytes=2**34
)
HOST = Host(2)


def works(count: int, budget: int, seed: int, kinds: str = "pmd") -> PassWork:
    """Returns so many passes of prompts (p), of decodes (d) and of both (m), an array a count."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        decodes = 0 if kind == "p" else int(rng.integers(1, min(64, budget)))
        prompt = 0 if kind == "d" else int(rng.integers(budget // 4, budget + 1)) - (decodes if kind == "m" else 0)
        prompt = max(prompt, 1) if kind != "d" else 0
        context = int(rng.integers(20, 1500))
        chunks = 0 if kind == "d" else int(rng.integers(1, 6))
        keys = decodes * context + prompt + chunks * context
        pairs = decodes * context + prompt * (context + prompt // 2)
        rows.append((decodes + prompt, prompt, decodes, decodes + chunks, decodes + chunks // 2, keys, pairs))
    return PassWork(*np.array(rows, float).T)  # type: ignore[arg-type]


def observed(
    factors: Factors, work: PassWork, noise: float = 0.0, seed: int = 0, ranks: int = 1, name: str = "run"
) -> Observed:
    """Returns passes that took what ``factors`` of one rank on a host say, times a random factor."""
    rng = np.random.default_rng(seed)
    roofline = Roofline.of(SMALL, MACHINE, "float32", 1)
    there = on_other_ranks(factors, 1, ranks, HOST)
    exact: Any = sum(roofline.parts(there, work).values())
    seconds = exact * np.exp(rng.normal(0, noise, len(exact)))
    gaps = there.host_pass_s + there.host_sequence_s * np.asarray(work.sequences)
    finished = (np.arange(len(exact)) % 4 == 3).astype(float)
    gaps = gaps + there.host_finished_s * finished
    prompt_tokens = int(np.asarray(work.prompt_tokens).sum())
    gaps[0] += there.host_token_s * prompt_tokens
    started = np.cumsum(gaps) + np.concatenate([[0.0], np.cumsum(seconds)[:-1]])
    return Observed(
        name=name,
        work=work,
        started=started,
        seconds=seconds,
        finished=finished,
        roofline=roofline,
        ranks=ranks,
        tokenize_s=there.host_token_s * prompt_tokens,
        detokenize_s=0.0,
        prompt_tokens=prompt_tokens,
        completed=int(finished.sum()),
        replicas=1,
    )


KNOWN = Factors(
    **{name: getattr(CPU, name) for name in CPU.__dataclass_fields__}
    | {"matrices": 3.1, "weights": 2.2, "attention": 25.0, "kv": 6.0, "head": 2.0, "launch_s": 300e-6}
    | {"sequence_s": 20e-6, "host_pass_s": 2e-3, "host_sequence_s": 20e-6, "host_finished_s": 5e-3}
)


def recorded(results: Path, name: str, work: PassWork, seed: int, token_budget: int = 256, noise: float = 0.03) -> Path:
    """Writes the files of a run with these passes, as far as a fit reads them; returns its directory."""
    run = observed(KNOWN, work, noise, seed)
    directory = results / name
    directory.mkdir(parents=True)
    ends = np.concatenate([[0.0], (run.started + run.seconds)])
    after = np.repeat(np.arange(len(run.seconds)), np.asarray(run.finished).astype(int))
    lines = [
        json.dumps(
            {
                "index": index,
                "prompt_tokens": 10,
                "output_tokens": 4,
                "finish_reason": "eos",
                "token_ids": [1, 2, 3, 4],
                "text": "",
                "first_token_s": float(ends[place]),
                "finished_s": float(ends[place] + 1e-4),
            }
        )
        for index, place in enumerate(after)
    ]
    (directory / "completions.jsonl").write_text("\n".join(lines) + "\n")
    rows = [",".join(PASS_COLUMNS)]
    for step in range(len(run.seconds)):
        tokens, prompt, decode, sequences, logits, keys, pairs = (int(column[step]) for column in np.asarray(work))
        cells = [step + 1, f"{run.started[step]:.9g}", f"{run.seconds[step]:.6g}", tokens, prompt, decode, sequences]
        rows.append(",".join(str(cell) for cell in [*cells, 0.5, 0, logits, keys, pairs]))
    (directory / "passes.csv").write_text("\n".join(rows) + "\n")
    catalogue.register()
    overrides = [f"engine.token_budget={token_budget}", "model.dtype=float32", "parallel.tp=1", "parallel.dp=1"]
    config = OmegaConf.to_container(compose(overrides), resolve=True, enum_to_str=True)
    record = {
        **{"run_id": name, "status": "ok", "engine": "fastgen", "kernels": "native", "model": "small"},
        **{"weights": "pretrained", "dtype": "float32", "quantization": None, "device": "cpu", "device_name": "bench"},
        **{"tp": 1, "dp": 1, "token_budget": token_budget, "max_sequences": 64, "config": config},
        **{"environment": {"cpu": {"cores_visible": 2}, "env": {}}, "telemetry": {"hosts": [{}]}},
        **{"completed": len(after), "prompt_tokens": run.prompt_tokens, "elapsed_s": float(ends[-1])},
        "time": {"tokenize_s": run.tokenize_s, "detokenize_s": 0.0, "host_s": 0.1},
    }
    (directory / "record.json").write_text(json.dumps(record))
    return directory
