"""The JSON Schemas of a run, made of the table of columns and of what stands here; run as a program, it writes them.

PYTHONPATH=.:tests python tests/support/schemas.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.basics.outcome import RUNNING, STATUSES
from harness.results.columns import TABLE

ROOT = Path(__file__).resolve().parents[2]
DIRECTORY = ROOT / "harness" / "results"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]
KINDS = {int: "integer", float: "number", str: "string"}


def a(kind: str, description: str, **more: Any) -> Schema:
    """Returns the schema of one value; ``kind`` is JSON's name of a type, with ``?`` behind it if it may be null."""
    name = kind.removesuffix("?")
    return {"type": [name, "null"] if kind != name else name, "description": description, **more}


def texts(description: str) -> Schema:
    """Returns the schema of a list of texts."""
    return a("array", description, items={"type": "string"})


def an_object(description: str, nullable: bool = False, **members: Schema) -> Schema:
    """Returns the schema of an object, which may have further members."""
    return a("object?" if nullable else "object", description, properties=members)


SECONDS, COUNT = {"type": ["number", "null"], "minimum": 0}, {"type": ["integer", "null"], "minimum": 0}
DIGEST = "^[0-9a-f]{12}$"
CONFIG = a("object", "the config, resolved: a member for each group, and the keys of the top level")
ENVIRONMENT = an_object(
    "what the run ran on: host, versions, git, CPU, GPUs, variables",
    hostname={"type": "string"},
    packages={"type": "object", "additionalProperties": {"type": "string"}},
    git={"type": ["object", "null"], "properties": {"commit": {"type": "string"}, "dirty": {"type": "boolean"}}},
    gpus={"type": "array"},
)
SEGMENT = an_object(
    "from one start of the run to its end",
    started_at={"type": "string"},
    command_line={"type": "array"},
    clock_from_s=SECONDS,
    clock_to_s=SECONDS,
    elapsed_s=SECONDS,
    elapsed_is_estimated={"type": "boolean"},
    elapsed_at_most_s=SECONDS,
    completed=COUNT,
    changed={"type": "object"},
    config={"type": "object"},
)
# What a record has beside the columns.
BESIDE: dict[str, Schema] = {
    "finished_at": a("string", "when the record was closed, UTC"),
    "command_line": texts("what was typed, of the first segment"),
    "config": CONFIG,
    "environment": ENVIRONMENT,
    "pid": a("integer", "the process that wrote the record last"),
    "hostname": a("string", "of the host of rank 0"),
    "launcher": a("array?", "host and process that started the ranks"),
    "clock_boot": a("string?", "equal for all processes whose clocks agree: a boot of the host"),
    "clock_s": a("number?", "where the clock was when the run ended early, seconds"),
    "phase": a("string", "how far it got: `load`, `run`, or an engine's own", minLength=1),
    "job_hash": a("string", "config, dataset, kind of device and code: equal for runs of one job", pattern=DIGEST),
    "work": a("object", "what whoever resumes the run must have in common with it"),
    "loaded": a("object", "what was found when the model was loaded: fingerprint, device, kernels"),
    "instruction_set": a("string", "the processor's, with which native kernels computed"),
    "prediction": an_object("beforehand", peak_memory_bytes=COUNT, elapsed_s=SECONDS),
    "proof": an_object("how the engine's passes were compared with Hugging Face's model", nullable=True),
    "split": an_object("what the ranks were asked to be, and why they are what they are", tp=COUNT, dp=COUNT),
    "sizes": a("object", "how large passes are and why, where the config left it open"),
    "left_out": a("array?", "records of the dataset that were passed over, and why"),
    "time": a("object", "where the clock went, seconds", additionalProperties={"type": "number"}),
    "engine_statistics": a("object", "how full the passes were"),
    "passes": an_object("forward passes of rank 0", nullable=True, count=COUNT, tokens_p50=SECONDS),
    "passes_error": a("string", "why passes.csv is not whole"),
    "replicas": a("array", "what each replica did", items={"type": "object"}),
    "prompt_len_check": a("object?", "how the file's prompt lengths differ from what was fed"),
    "model_flops": a("number?", "operations that the completed requests need"),
    "telemetry": an_object("peaks of the run, means and joules of the clock, by host", energy_j=SECONDS),
    "hardware_measured": a("object", "rates that one rank's cores were measured to have"),
    "hardware_known": a("string", "the option of `hardware` whose figures were taken"),
    "simulation": a("object", "of a simulated run: what its times were computed from"),
    "parity": a("object", "with `verify=N`: each checked request and its verdict"),
    "segments": a("array", "of a resumed run: its segments", items=SEGMENT),
    "segment": a("object", "of a resumed run that is still open: the current segment"),
    "elapsed_is_estimated": a("boolean", "whether nobody saw the end of one of the segments"),
    "round": an_object(
        "which round of a sweep or a repetition it belongs to",
        series={"type": "string"},
        number=COUNT,
        varied=texts("the overrides that tell its job from the others"),
    ),
    "cost": a("number?", "of the devices and hosts over the clock, in the currency of `hardware.price_per_hour`"),
    "devices": a("integer?", "that `hardware.price_per_hour` is counted for"),
    "chat_template": an_object("the model's template: whether prompts went through it, whether there is one"),
    "tracking": an_object("where MLflow has the run", uri={"type": "string"}, run_id={"type": "string"}),
    "power": an_object("with `power_limit_w`: whether the run kept it", nullable=True, peak_w=SECONDS, samples=COUNT),
    "notes": texts("choices that were made for the user, and why"),
}
COMPLETION: dict[str, Schema] = {
    "index": a("integer", "position among the requests, from 0", minimum=0),
    "prompt_tokens": a("integer", "ids of the prompt, BOS included, padding never; 0 if rejected", minimum=0),
    "output_tokens": a("integer", "ids generated, the last one's included", minimum=0),
    "finish_reason": a("string", "why it ended", enum=["eos", "length", "stop", "rejected"]),
    "token_ids": a("array", "the ids generated", items={"type": "integer", "minimum": 0}),
    "text": a("string", "what they say"),
    "first_token_s": a("number?", "of the clock, seconds", minimum=0),
    "finished_s": a("number?", "of the clock, seconds", minimum=0),
    "error": a("string", "why it was rejected"),
    "id": a("string", "what the dataset calls the request"),
    "shared_tokens": a("integer", "of the prompt, not computed, since another begins alike", minimum=0),
}
EVALUATION: dict[str, Schema] = {
    "run_id": a("string", "the evaluation's directory"),
    "started_at": a("string", "UTC"),
    "finished_at": a("string", "UTC"),
    "perplexity": a("object?", "of all tokens together, and how the prompts' own spread; null with `--tasks`"),
    "tasks": a("object?", "by task its scores; null without `--tasks`"),
    "prefill": a("boolean", "whether targets were scored in prompt passes"),
    "seconds": a("number", "that scoring took", minimum=0),
    "lm_eval": a("string?", "version of lm-evaluation-harness"),
    "notes": BESIDE["notes"],
    "command_line": BESIDE["command_line"],
    "config": CONFIG,
    "environment": ENVIRONMENT,
}
FROM_COLUMNS = (  # that an evaluation has too
    *("engine", "kernels", "model", "weights", "dtype", "quantization", "tp", "dp", "device", "device_name"),
    *("config_hash", "git_commit"),
)


def columns() -> dict[str, Schema]:
    """Returns the schemas of the columns, as a record has them."""
    found = {}
    for column in TABLE:
        unit = f" ({column.unit})" if column.unit else ""
        least = {"minimum": 0} if column.kind in (int, float) else {}
        found[column.name] = a(f"{KINDS[column.kind]}?", column.meaning + unit, **least)
    found["run_id"] |= {"type": "string", "minLength": 1}
    found["started_at"] |= {"type": "string", "pattern": "^[0-9-]{10}T[0-9:]{8}Z$"}
    found["status"] |= {"type": "string", "enum": [*STATUSES, RUNNING]}
    found["config_hash"] |= {"type": "string", "pattern": DIGEST}
    return found


def schemas() -> dict[str, Schema]:
    """Returns the schemas by the names of their files."""
    closed = ["finished_at", "error", "requests", "completed", "rejected", "total_tokens", "elapsed_s"]
    ran = {"if": {"properties": {"status": {"const": RUNNING}}}, "else": {"required": closed}}
    rejected = {"properties": {"finish_reason": {"const": "rejected"}}}
    counted = {"required": ["error"], "properties": {"output_tokens": {"const": 0}, "token_ids": {"maxItems": 0}}}
    whole = ("run_id", "started_at", "status", "command_line", "config", "config_hash", "hostname", "pid")
    return {
        "record.schema.json": _of("record.json of a run", columns() | BESIDE, whole, **ran),
        "completion.schema.json": _of(
            "a line of completions.jsonl", COMPLETION, tuple(COMPLETION)[:8], **{"if": rejected, "then": counted}
        ),
        "accuracy.schema.json": _of(
            "accuracy.json of an evaluation",
            EVALUATION | {name: columns()[name] for name in FROM_COLUMNS},
            (*EVALUATION, *FROM_COLUMNS),
        ),
    }


def _of(title: str, properties: dict[str, Schema], required: tuple[str, ...], **more: Any) -> Schema:
    head = {"$schema": DIALECT, "title": title, "type": "object"}
    return head | {"properties": properties, "required": list(required)} | more


def written(schema: Schema) -> str:
    """Returns a schema as its file has it."""
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name, schema in schemas().items():
        (DIRECTORY / name).write_text(written(schema))
