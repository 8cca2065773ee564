"""``python -m harness.plan --fit RUN [RUN ...]``: the factors of the pass times from real runs, with their errors."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from omegaconf import DictConfig

from harness.basics.clock import utc_now
from harness.basics.errors import UserError, quoted
from harness.basics.files import replace as replace_file
from harness.config.compose import compose, to_config
from harness.config.own import own_option
from harness.config.schema import Accelerator, HardwareConfig, Stop
from harness.costs import fitting
from harness.costs.fitted import RANGES, SIZES
from harness.costs.hazard import eos_hazard
from harness.costs.roofline import defaults
from harness.plan.measured import Measured

LOCAL = "local"
ALIKE = ("model", "weights", "dtype", "quantization", "kernels", "device", "device_name")  # that runs share
FIGURES = (
    *("memory_bytes", "memory_bandwidth", "interconnect_bandwidth", "devices_per_node", "node_bandwidth"),
    "price_per_hour",
)
REACHED = "the best that the runs' passes reached: a lower bound, no data sheet's figure"


def run(options: argparse.Namespace, composed: DictConfig) -> int:
    """Fits, prints the errors and writes the option ``NAME`` of ``hardware``; returns the exit status.

    Raises:
        UserError: a run is none, they do not go together, or there is too little to learn from.
    """
    path = _path(options.name)
    runs = [Measured.of("--fit", name, options.results_dir) for name in dict.fromkeys(options.fit)]
    check(runs)
    hardware, reached = figures(runs, to_config(composed).hardware)
    assumed = defaults(hardware.accelerator)
    seen = [one.observed(hardware) for one in runs]
    if len(kinds := fitting.kinds_seen(seen)) < 2:
        lack = f"has passes of one kind only: {kinds[0] if kinds else 'too few of any'}"
        remedy = "give a run with prompts and outputs of several lengths, at least three passes of a kind"
        raise UserError("--fit", f"{' and '.join(one.name for one in runs)} {lack}", remedy)
    found = fitting.fit(seen, assumed, runs[0].host)
    errors = {
        "passes": fitting.held_out(seen, assumed, runs[0].host),
        "runs": fitting.totals(seen, found.factors),
        "left_out": fitting.left_out(seen, assumed, runs[0].host),
    }
    content = file_content(options.name or LOCAL, hardware, runs, seen, found, errors)
    head = f"# Written by harness.plan --fit; {REACHED if reached else 'figures are those of the runs'}.\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (head + yaml.safe_dump(content, sort_keys=False, width=120)).encode())
    for line in report(runs, seen, found, errors):
        print(line)
    print(f"Wrote {path}: use it as hardware={path.stem}")
    return 0


def check(runs: Sequence[Measured]) -> None:
    """Raises UserError for runs that are not of one model, type, device and kernels."""
    for key in ALIKE:
        values = dict.fromkeys(str(one.record.get(key)) for one in runs)
        if len(values) > 1:
            raise UserError("--fit", f"the runs differ in {key}: {' and '.join(map(quoted, values))}", "fit them apart")
    if len({one.host for one in runs}) > 1:
        raise UserError("--fit", "the runs differ in the cores or threads that a host has", "fit them apart")


def _path(name: str | None) -> Path:
    if name is None or name == LOCAL:
        return own_option("hardware", LOCAL)
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_]{0,60}", name) is None:
        raise UserError("--name", f"{quoted(name)} is no name of an option", "use letters, digits and _")
    path = own_option("hardware", name)
    if path.exists():
        raise UserError("--name", f"{path} is there already", "give another name, or delete it first")
    return path


def figures(runs: Sequence[Measured], given: HardwareConfig) -> tuple[HardwareConfig, bool]:
    """Returns the figures that the factors are relative to, and whether they are only what the passes reached.

    Those of ``hardware=`` on the command line, else the runs' own: what was given or measured or known of the device
    then; where none of them has any, the best rates of the runs' passes.
    """
    dtype, device = str(runs[0].record["dtype"]), str(runs[0].record["device"])
    alone = min(runs, key=lambda one: one.host_ranks)
    candidates = [replace(given, fit={}), replace(alone.config.hardware, fit={})]
    if isinstance(found := alone.record.get("hardware_measured"), dict) and found.get("dtype") == dtype:
        known = candidates[-1]
        bandwidth = known.memory_bandwidth or found.get("memory_bandwidth")
        peaks = {**known.peak_flops, dtype: known.peak_flops.get(dtype) or found.get("peak_flops")}
        candidates.append(replace(known, peak_flops=peaks, memory_bandwidth=bandwidth))
    if isinstance(name := alone.record.get("hardware_known"), str):
        candidates.append(to_config(compose([f"hardware={name}"])).hardware)
    for hardware in candidates:
        if hardware.accelerator.value == device and hardware.peak_flops.get(dtype) and hardware.memory_bandwidth:
            return hardware, False
    return _reached(runs, candidates[1], dtype, Accelerator(device)), True


def _reached(runs: Sequence[Measured], own: HardwareConfig, dtype: str, accelerator: Accelerator) -> HardwareConfig:
    """Returns ``own`` with the best rates of the runs' passes for what it lacks."""
    flops = moved = 0.0
    for one in runs:
        _, seconds, work = one.table
        shape = one.shape
        done = 2 * shape.matmul * np.asarray(work.tokens) + 2 * shape.head * np.asarray(work.logit_rows)
        flops = max(flops, float(np.max(done / seconds)) / one.tp)
        moved = max(moved, float(np.max((shape.matrix_bytes + shape.head * shape.element_bytes) / seconds)) / one.tp)
    known = own if own.accelerator is accelerator else HardwareConfig(name=LOCAL, accelerator=accelerator)
    peaks = {**known.peak_flops, dtype: known.peak_flops.get(dtype) or _rounded(flops)}
    return replace(known, peak_flops=peaks, memory_bandwidth=known.memory_bandwidth or _rounded(moved))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def file_content(
    name: str,
    hardware: HardwareConfig,
    runs: Sequence[Measured],
    seen: Sequence[fitting.Observed],
    found: fitting.Found,
    errors: dict[str, Any],
) -> dict[str, Any]:
    """Returns what is written, as plain data."""
    record = runs[0].record
    factors = [
        {"ranks": ranks, **{key: _rounded(value) for key, value in asdict(one).items()}, "assumed": found.untold[ranks]}
        for ranks, one in found.factors.items()
    ]
    outputs = [
        (line["output_tokens"], line["finish_reason"] == "eos")
        for one in runs
        if one.config.generation.stop is Stop.eos
        for line in one.completions
    ]
    hazard = eos_hazard(outputs)
    tokens = sum(count for count, _ in outputs)
    ends = sum(ended for _, ended in outputs)
    plain = asdict(hardware)
    return {
        "name": name,
        "accelerator": hardware.accelerator.value,
        "peak_flops": {key: value for key, value in hardware.peak_flops.items() if value},
        **{key: plain[key] for key in FIGURES},
        "fit": {
            "model": record["model"],
            "dtype": record["dtype"],
            "kernels": record["kernels"],
            "device_name": record.get("device_name"),
            "runs": [one.name for one in runs],
            "created": utc_now(),
            "host": None if runs[0].host is None else asdict(runs[0].host),
            "sizes": {key: getattr(runs[0].shape, key) for key in SIZES},
            "range": {key: _range(key, runs, seen) for key in RANGES},
            "factors": factors,
            "eos_rate": _rounded(ends / tokens) if ends else None,
            "eos_hazard": [[first, _rounded(chance)] for first, chance in hazard] if ends else [],
            "errors": {
                "passes": {kind: _plain(one) for kind, one in errors["passes"].items()},
                "runs": {key: _rounded(value) for key, value in errors["runs"].items()},
                "left_out": {key: _rounded(value) for key, value in errors["left_out"].items()},
            },
        },
    }


def _plain(errors: fitting.Errors) -> dict[str, Any]:
    return {key: value if isinstance(value, int) else _rounded(value) for key, value in errors._asdict().items()}


def _range(key: str, runs: Sequence[Measured], seen: Sequence[fitting.Observed]) -> list[int]:
    """Returns the least and the most of what the runs had."""
    if key in ("token_budget", "max_sequences", "tp"):
        values = [int(one.record[key]) for one in runs]
    else:
        values = [int(extreme(getattr(one.work, key))) for one in seen for extreme in (np.min, np.max)]
    return [min(values), max(values)]


def report(
    runs: Sequence[Measured], seen: Sequence[fitting.Observed], found: fitting.Found, errors: dict[str, Any]
) -> list[str]:
    """Returns what was found, line by line."""
    record = runs[0].record
    passes = sum(len(one.seconds) for one in seen)
    what = (
        f"{record['model']}, {record['dtype']}, {record['kernels']} kernels, {record.get('device_name') or 'a device'}"
    )
    many = f"{len(runs)} run{'s' * (len(runs) > 1)}"
    lines = [f"Fitted {what}: {passes} passes of {many}, {found.dropped} left out as outliers", ""]
    lines.append("passes predicted by a fit of the others   count   share of time   median error   90% within    sum")
    for kind, one in errors["passes"].items():
        figures = f"{one.passes:>5}   {one.share:>13.1%}   {one.median:>12.1%}   {one.p90:>10.1%}   {one.bias:>+6.1%}"
        lines.append(f"{kind:<40}  {figures}" if one.passes else f"{kind:<40}      0")
    lines += ["", "time of a run, predicted from its passes   by a fit of all   by a fit of the other runs"]
    for name, error in errors["runs"].items():
        other = f"{errors['left_out'][name]:+.1%}" if name in errors["left_out"] else "-"
        lines.append(f"{name:<40}   {error:>+15.1%}   {other:>26}")
    lines.append("")
    for ranks, names in found.untold.items():
        if names:
            host = f"{ranks} rank{'s' * (ranks > 1)} on a host"
            lines.append(f"With {host} the passes do not tell, so as assumed: {', '.join(names)}")
    return lines
