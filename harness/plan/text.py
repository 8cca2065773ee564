"""A plan as the terminal shows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from harness.basics.clock import duration


def plan(found: dict[str, Any]) -> str:
    """Returns the text of one setting's plan."""
    lines = [*_heading(found), "", *_memory(found)]
    if "bounds" in found:
        lines += ["", *_passes(found), "", *_bounds(found), "", *_time(found)]
        if found["published"]:
            lines += ["", *_published(found)]
    return "\n".join(lines)


def ranking(found: dict[str, Any]) -> str:
    """Returns the text of all splits."""
    hardware = found["hardware"]
    hosts = f", {hardware['nodes']} hosts" if hardware["nodes"] > 1 else ""
    where = f"{hardware['devices']} x {hardware['name']}{hosts}"
    rows = [
        (
            str(one["tp"]),
            str(one["dp"]),
            one["fits"],
            _gb(one["weights_bytes"]),
            f"{one['largest_kv_cache_tokens']:,}",
            _rate(one.get("bound_total_tokens_per_s")),
            one.get("binds", ""),
            _rate(one["expected_total_tokens_per_s"]),
            "" if one.get("expected_s") is None else _duration(one["expected_s"]),
        )
        for one in found["splits"]
    ]
    heads = (
        "tp",
        "dp",
        "fits",
        "weights GB",
        "KV tokens",
        "bound tok/s",
        "which binds",
        "expected tok/s",
        "dataset in",
    )
    lines = [f"{_model(found['model'])} on {where}", _dataset(found["dataset"]), ""]
    lines += _table(heads, rows) if rows else ["No split is possible."]
    lines += ["", *_wrapped_refusals(found["refused"])] if found["refused"] else []
    return "\n".join([*lines, "", "Weights are a device's, KV tokens a replica's at most, tok/s those of all devices."])


def _wrapped_refusals(refused: list[dict[str, Any]]) -> Iterator[str]:
    """Yields each reason once, with the splits that it speaks against."""
    for why in dict.fromkeys(one["why"] for one in refused):
        yield f"not tp={', '.join(str(one['tp']) for one in refused if one['why'] == why)}: {why}"


def _heading(found: dict[str, Any]) -> list[str]:
    parallel, hardware = found["parallel"], found["hardware"]
    split = f"tp={parallel['tp']}, dp={parallel['dp']} ({parallel['why']})"
    return [
        f"{_model(found['model'])} on {parallel['devices']} x {hardware['name']}, {split}",
        _dataset(found["dataset"]),
    ]


def _model(model: dict[str, Any]) -> str:
    bits = f"weights of {model['weight_bits']:g} bits, KV cache of {model['kv_bits']:g}"
    return f"{model['name']} {model['dtype']} ({model['parameters']:,} parameters; {bits})"


def _dataset(dataset: dict[str, Any]) -> str:
    rejected = f", {dataset['rejected']:,} more are longer than the context" if dataset["rejected"] else ""
    return (
        f"{dataset['name']}: {dataset['requests']:,} requests{rejected}, {dataset['prompt_tokens']:,} prompt and "
        f"{dataset['output_tokens']:,} output tokens ({dataset['lengths']})"
    )


def _memory(found: dict[str, Any]) -> list[str]:
    memory, sequences, dataset = found["memory"], found["sequences"], found["dataset"]
    cache = f"{memory['kv_cache_tokens']:,} tokens, as the engine is set"
    most = f"{memory['largest_kv_cache_tokens']:,} tokens would have room"
    rows = [
        ("weights", _gb(memory["weights_bytes"]), ""),
        ("KV cache", _gb(memory["kv_cache_bytes"]), f"{cache}; {most}"),
        ("activations", _gb(memory["activations_bytes"]), "of the largest pass, an estimate"),
        ("the process", _gb(memory["own_bytes"]), "context, libraries, buffers"),
        ("left", _gb(memory["left_bytes"]), f"of {_gb(memory['size_bytes'])}"),
    ]
    lines = _table(("Memory of a device", "GB", ""), rows)
    lines += ["", f"It fits: {found['fits']}."]
    if found["fits"] == "no":
        lines[-1] = f"It does not fit: no room for {found['lacks']}."
    elif found["fits"] != "yes":
        each = f"{sequences['length_for_engine']:,} tokens each"
        lines.append(f"The {sequences['engine']} sequences that run at once have room for {each}.")
    lines += [f"  would fit, {one['fits']}: {one['setting']}" for one in found["remedies"]]
    if found["fits"] != "no":
        lines.append(
            f"Sequences at once: {sequences['of_mean_length']:,} of the mean length ({dataset['mean_length']:,.0f} "
            f"tokens), {sequences['of_p99_length']:,} of the 99th percentile ({dataset['p99_length']:,}); in the "
            f"largest KV cache {sequences['of_mean_length_in_largest']:,} and "
            f"{sequences['of_p99_length_in_largest']:,}; the engine runs at most {sequences['engine']:,}."
        )
    return lines + _sizes(found["sizes"])


def _sizes(chosen: dict[str, Any] | None) -> list[str]:
    """Returns the engine's sizes where the config leaves them open."""
    if chosen is None:
        return []
    return [
        f"Chosen: engine.token_budget={chosen['token_budget']}, engine.max_sequences={chosen['max_sequences']} "
        f"({chosen['why']})."
    ]


def _passes(found: dict[str, Any]) -> list[str]:
    rows = [
        (
            f"{one['token_budget']:,}",
            f"{one['tokens']:,}",
            f"{one['flops'] / 1e12:,.2f}",
            f"{one['bytes'] / 1e9:,.2f}",
            f"{one['seconds'] * 1e3:,.1f}",
            one["binds"],
            f"{one['expected_s'] * 1e3:,.1f}",
        )
        for one in found["passes"]
    ]
    heads = ("Token budget", "tokens", "TFLOP", "GB moved", "ms at least", "which binds", "ms expected")
    note = "A pass of a device, its prompt and decode tokens as the dataset has them, the KV cache full."
    return [*_table(heads, rows), note]


def _bounds(found: dict[str, Any]) -> list[str]:
    rows = [
        (
            name,
            _rate(one["total_tokens_per_s_per_device"]),
            _rate(one["output_tokens_per_s_per_device"]),
            _rate(one["total_tokens_per_s"]),
            _rate(one["output_tokens_per_s"]),
            one["binds"],
            _rate(one["sheet_total_tokens_per_s"]),
        )
        for name, one in found["bounds"].items()
    ]
    heads = ("Bound, tok/s", "a device", "output", "in all", "output", "which binds", "at the sheet's")
    shares = found["shares"]
    note = "Every resource busy all the time"
    if shares["matrix"] < 1:
        note += (
            f", at the {shares['matrix']:.0%} of the data sheet's FLOP/s and the {shares['memory']:.0%} of its memory "
        )
        note += "bandwidth that large products and copies reach; at the sheet's, in all"
    return [*_table(heads, rows), f"{note}."]


def _time(found: dict[str, Any]) -> list[str]:
    time = found["dataset_time"]
    by = "by a fit to real runs, of no known error"
    if time["fit_error"] is not None:
        by = f"by a fit that was at most {time['fit_error']:.1%} off the time of a real run"
    if not time["fitted"]:
        by = "by assumed efficiencies, not fitted to any run, so that its error is not known"
    expected = f"{_duration(time['expected_s'])} are expected with the engine as it is set"
    rate = f"{time['expected_pass_tokens']:,} tokens a pass, {_rate(time['expected_total_tokens_per_s'])} total tok/s"
    lines = [f"The dataset takes at least {_duration(time['bound_s'])}; {expected} ({rate}; {by})."]
    if (cost := time["expected_cost_per_million_tokens"]) is not None:
        lines.append(f"A million total tokens cost {cost:,.4g}, by hardware.price_per_hour.")
    return lines + [f"Outside of the fit: {one}." for one in time["outside_the_fit"]]


def _published(found: dict[str, Any]) -> list[str]:
    rows = [
        (
            one["system"],
            f"{one['devices']}, {one['bits']} bits, {one['workload']}",
            f"{one['per_device']:,.0f} {'total' if one['total'] else 'output'}",
            "" if one["share"] is None else f"{one['share']:.0%} of {one['bound']:,.0f}",
            one["source"],
        )
        for one in found["published"]
    ]
    return _table(("Published", "devices, as run", "tok/s a device", "of its bound", "source"), rows)


def _duration(seconds: float) -> str:
    return duration(seconds) if seconds >= 10 else f"{seconds:.2g} s"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}"


def _rate(rate: float | None) -> str:
    return "" if rate is None else f"{rate:,.0f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns aligned lines: what is a number right, the rest left."""
    columns = list(zip(heads, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(cell[:1].isdigit() or cell[:1] in ("", "-") for cell in column[1:]) for column in columns]
    return [
        "  ".join(
            cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in (heads, *rows)
    ]
