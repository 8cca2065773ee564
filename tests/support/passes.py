"""Passes of known cost, for what fits and explains them."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from harness.config.compose import compose
from harness.config.schema import Accelerator, HardwareConfig
from harness.costs.fitted import SIZES
from harness.costs.fitting import Observed
from harness.costs.pass_time import PassTime
from harness.costs.roofline import CPU, Factors, Host, Roofline, on_other_ranks
from harness.costs.shape import ModelShape
from harness.costs.work import PassWork
from harness.engines import catalogue
from harness.engines.simulate.replay import Finished, Item, Pass, Setup, replay
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


SECTION: dict[str, Any] = {
    "model": "small",
    "dtype": "float32",
    "kernels": "native",
    "host": {"cores": 2, "threads": None},
    "sizes": {name: getattr(SMALL, name) for name in SIZES},
    "range": {
        "token_budget": [128, 512],
        "max_sequences": [64, 64],
        "tokens": [1, 512],
        "sequences": [1, 64],
        "kv_read_tokens": [1, 90000],
        "tp": [1, 1],
    },
    "factors": [{"ranks": 1, **asdict(KNOWN)}],
    "eos_hazard": [[1, 0.1], [2, 0.01]],
}


def fitted(**changes: Any) -> HardwareConfig:
    return replace(MACHINE, fit={**copy.deepcopy(SECTION), **changes})


def recorded(results: Path, name: str, work: PassWork, seed: int, token_budget: int = 256, noise: float = 0.03) -> Path:
    """Writes the files of a run with these passes, as far as a fit reads them; returns its directory."""
    run = observed(KNOWN, work, noise, seed)
    ends = np.concatenate([[0.0], (run.started + run.seconds)])
    after = np.repeat(np.arange(len(run.seconds)), np.asarray(run.finished).astype(int))
    done = [(index, 10, 4, float(ends[place]) + 1e-4) for index, place in enumerate(after)]
    counts = [PassWork(*row) for row in np.asarray(work).astype(int).T.tolist()]
    passes = [*zip(run.started.tolist(), run.seconds.tolist(), counts, strict=True)]
    record = {"prompt_tokens": run.prompt_tokens, "token_budget": token_budget}
    return written(results, name, passes, done, record | {"time": {"tokenize_s": run.tokenize_s}})


def replayed(results: Path, name: str, items: list[Item], setup: Setup, factors: Factors = KNOWN) -> Path:
    """Writes the files of a run as it would have been with these factors; returns its directory."""
    times = PassTime(SMALL, MACHINE, "float32", 1, 1).with_factors(**asdict(factors))
    prompts = {item.uid: item.prompt_tokens for item in items}
    own: list[Any] = []
    done: list[Any] = []
    ended = 0.0
    replicas: list[dict[str, Any]] = [
        {"rank": rank, "elapsed_s": 0.0, "passes": 0, "tokens": 0, "forward_s": 0.0} for rank in range(setup.replicas)
    ]
    for event in replay(items, setup, times):
        if isinstance(event, Pass):
            ended = max(ended, event.started_s + event.seconds)
            for key, value in (("passes", 1), ("tokens", event.work.tokens), ("forward_s", event.seconds)):
                replicas[event.replica][key] += value
            if event.replica == 0:
                own.append((event.started_s, event.seconds, event.work))
        elif isinstance(event, Finished):
            done.append((event.uid, prompts[event.uid], event.output_tokens, event.finished_s))
    prompt_tokens = sum(line[1] for line in done)
    record = {
        **{"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens + sum(line[2] for line in done)},
        **{"dp": setup.replicas, "token_budget": setup.token_budget, "max_sequences": setup.max_sequences},
        **{"elapsed_s": ended, "replicas": replicas, "engine_statistics": {"kv_blocks": setup.blocks * setup.replicas}},
        "time": {"tokenize_s": factors.host_token_s * prompt_tokens / setup.replicas},
    }
    return written(results, name, own, done, record)


def written(results: Path, name: str, passes: list[Any], done: list[Any], record: dict[str, Any]) -> Path:
    """Writes a run: (start, seconds, work) of each pass, (index, prompt, output, end) of each request."""
    directory = results / name
    directory.mkdir(parents=True)
    with open(directory / "completions.jsonl", "w") as file:
        for index, prompt, output, end in done:
            line = {"index": int(index), "prompt_tokens": prompt, "output_tokens": output, "finish_reason": "eos"}
            line |= {"token_ids": [1] * output, "text": "", "first_token_s": end, "finished_s": end}
            file.write(json.dumps(line) + "\n")
    with open(directory / "passes.csv", "w") as file:
        file.write(",".join(PASS_COLUMNS) + "\n")
        for step, (started, seconds, work) in enumerate(passes, start=1):
            cells = [step, f"{started:.9g}", f"{seconds:.6g}", *work[:4], 0.5, 0, *work[4:], 0]
            file.write(",".join(str(cell) for cell in cells) + "\n")
    catalogue.register()
    budget, sequences = record.get("token_budget", 256), record.get("max_sequences", 64)
    overrides = [f"engine.token_budget={budget}", f"engine.max_sequences={sequences}", "model.dtype=float32"]
    overrides += [
        "engine.kv_memory=0.3",
        "parallel.tp=1",
        f"parallel.dp={record.get('dp', 1)}",
        "dataset=asc24",
        "dataset.path=gone.json",
    ]
    config = OmegaConf.to_container(compose(overrides), resolve=True, enum_to_str=True)
    whole = {
        **{"run_id": name, "status": "ok", "engine": "fastgen", "kernels": "native", "model": "small"},
        **{"weights": "pretrained", "dtype": "float32", "quantization": None, "device": "cpu", "device_name": "bench"},
        **{"tp": 1, "dp": 1, "token_budget": budget, "max_sequences": sequences, "config": config},
        **{"environment": {"cpu": {"cores_visible": 2}, "env": {"OMP_NUM_THREADS": "1"}}},
        **{"telemetry": {"hosts": [{}]}, "completed": len(done), "elapsed_s": max(line[3] for line in done)},
    }
    record = whole | record
    record["time"] = {"detokenize_s": 0.0, "host_s": 0.1} | record["time"]
    (directory / "record.json").write_text(json.dumps(record))
    return directory
