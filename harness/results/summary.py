"""What a finished run prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.basics.errors import printable
from harness.results.power_limit import sentence


def summary(screen: Console, row: dict[str, Any], record: dict[str, Any]) -> None:
    """Prints what ran, the headline, where the time went and how full the passes were.

    Args:
        row: the run's row of ``runs.csv``.
        record: its ``record.json``.
    """
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, text in _lines(row, record):
        table.add_row(label, printable(text))
    screen.print()
    screen.print(table)


def _lines(row: dict[str, Any], record: dict[str, Any]) -> list[tuple[str, str]]:
    lines = _what_ran(row, record) + _simulated(row, record.get("simulation") or {})
    if row["total_tokens_per_s"]:
        lines += _throughput(row, record)
        lines += [("Time", text) for text in _where_time_went(row, record)]
        lines += [("Passes", text) for text in _passes(row, record)]
        lines += [("Energy", text) for text in _energy(row, record)]
        lines += [("Cost", text) for text in _cost(row, record)]
    if power := record.get("power"):
        lines.append(("Power", sentence(power)))
    if row["load_s"] is not None:
        lines += _outside(row, record)
    if parity := record.get("parity"):
        checked = f"{parity['checked']} of {row['completed']:,} outputs checked against Hugging Face"
        names = {"exact": "exact", "near_tie": "near-ties", "wrong": "wrong"}
        counts = [f"{parity[name]} {word}" for name, word in names.items() if parity[name] or name == "exact"]
        lines.append(("Tokens", f"{checked} {parity['reference']['dtype']}: {', '.join(counts)}"))
    lines += [("Note", escape(note)) for note in record.get("notes", [])]
    lines.append(("Files", escape(f"{record['directory']}/, and one row in {record['results_dir']}/runs.csv")))
    return lines


def _what_ran(row: dict[str, Any], record: dict[str, Any]) -> list[tuple[str, str]]:
    ranks = (row["tp"] or 1) * (row["dp"] or 1)
    weights = " with dummy weights" if row["weights"] == "dummy" else ""
    rejected = f", {row['rejected']} rejected" if row["rejected"] else ""
    requests = f"{_count(row['completed'])} of {_count(row['requests'])} requests{rejected}, {_stops(row, record)}"
    kernels = "" if row["simulated"] else f" ({row['kernels']} kernels)"
    ran = f"{row['engine']}{kernels}, {row['model']} {row['dtype']}{weights}, {row['dataset']}"
    split = f"{ranks} rank{'s' if ranks > 1 else ''} (tp={row['tp']}, dp={row['dp']})" + _chosen(record.get("split"))
    sizes = record.get("sizes")
    chosen = [("Sizes", escape(_sizes(sizes)))] if sizes and row["device"] != "cpu" else []
    return [
        ("Run", f"{row['run_id']}  {row['status']}" + (f": {escape(str(row['error']))}" if row["error"] else "")),
        ("What ran", escape(f"{ran}: {requests}")),
        ("On", escape(f"{row['device_name']}, {split}")),
        *chosen,
    ]


def _stops(row: dict[str, Any], record: dict[str, Any]) -> str:
    """Returns the stop rule, and how many stop strings and stop ids there are beside it."""
    generation = record.get("config", {}).get("generation", {})
    counts = {"stop string": generation.get("stop_strings"), "stop id": generation.get("stop_token_ids")}
    more = [f"{len(found)} {what}{'s' * (len(found) > 1)}" for what, found in counts.items() if found]
    return ", ".join([f"stop={row['stop']}", *more])


def _simulated(row: dict[str, Any], simulation: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns what a simulated run's times rest on."""
    if not row["simulated"]:
        return []
    name = simulation.get("hardware", "the hardware")
    if row["simulated"] == "fit":
        text = f"no time here was measured: they follow from the fit of real runs in hardware={name}"
    else:
        text = f"no time here was measured: they follow from the figures of hardware={name} and assumed efficiencies"
    outside = [("SIMULATED", f"outside the fit: {why}") for why in simulation.get("outside", [])]
    return [("SIMULATED", text), *((label, escape(text)) for label, text in outside)]


def _throughput(row: dict[str, Any], record: dict[str, Any]) -> list[tuple[str, str]]:
    most, least = ("at most ", "at least ") if record.get("elapsed_is_estimated") else ("", "")
    parts, which = _known(record, "engine_statistics")
    shared = sum(part["engine_statistics"].get("shared_prompt_tokens") or 0 for part in parts)
    found = f"{shared:,} of the prompt tokens were not computed: prompts that begin alike shared KV blocks{which}"
    drafted, accepted = row.get("draft_tokens"), row.get("accepted_draft_tokens")
    drafts = f"{accepted or 0:,} of the output tokens were drafted; {drafted or 0:,} drafts were computed"
    return [
        (
            "Throughput",
            f"{most}[bold green]{row['total_tokens_per_s']:,.1f} total tokens/s[/] = {row['total_tokens']:,} tokens "
            f"({row['prompt_tokens']:,} prompt + {row['output_tokens']:,} output) in {least}{row['elapsed_s']:,.1f} s",
        ),
        (
            "",
            f"{row['output_tokens_per_s']:,.1f} output tokens/s, {row['requests_per_s']:.2f} requests/s; "
            f"first token p50 {_seconds(row['ttft_p50_s'])}, p99 {_seconds(row['ttft_p99_s'])}; "
            f"finished p50 {_seconds(row['latency_p50_s'])}, p99 {_seconds(row['latency_p99_s'])}",
        ),
        *([("", found)] if shared else []),
        *([("", drafts)] if drafted else []),
    ]


def _energy(row: dict[str, Any], record: dict[str, Any]) -> Iterator[str]:
    if row["energy_j"]:
        source = record.get("telemetry", {}).get("energy_source")
        per_joule = f"{row['tokens_per_joule']:,.2f} total tokens/J"
        yield f"{row['energy_j']:,.0f} J, {per_joule}" + (f" ({source})" if source else "")


def _cost(row: dict[str, Any], record: dict[str, Any]) -> Iterator[str]:
    if (per_million := row["cost_per_million_tokens"]) is not None:
        yield f"{per_million:,.4g} for a million total tokens; {record['cost']:,.4g} for the run's clock"


def _outside(row: dict[str, Any], record: dict[str, Any]) -> list[tuple[str, str]]:
    proof, predicted = record.get("proof") or {}, (record.get("prediction") or {}).get("peak_memory_bytes")
    memory = f", peak memory {row['peak_memory_bytes'] / 2**30:.2f} GiB" if row["peak_memory_bytes"] else ""
    memory += f" ({predicted / 2**30:.2f} predicted)" if memory and predicted else ""
    warm = f", warm-up {row['warmup_s']:.1f} s" if row["warmup_s"] is not None else ""
    proving = f", proof {proof['seconds']:.1f} s" if proof.get("seconds") else ""
    lines = [("Outside", f"load {row['load_s']:.1f} s{proving}{warm} (not in the clock){memory}")]
    return [*lines, ("Proof", _proof(proof))] if proof.get("requests") else lines


def _chosen(split: dict[str, Any] | None) -> str:
    """Returns why the ranks are split as they are, where that was not given."""
    return f", chosen: {split['why']}" if split and None in split["asked"].values() else ""


def _sizes(sizes: dict[str, Any]) -> str:
    """Returns the sizes of a pass that were chosen, and why."""
    return f"{sizes['token_budget']} tokens, {sizes['max_sequences']} sequences a pass, chosen: {sizes['why']}"


def _proof(proof: dict[str, Any]) -> str:
    layers = f"first {proof['layers']} layers" if proof["layers"] else "model"
    return (
        f"{proof['requests']} requests through the engine's own passes agree with Hugging Face's {layers}: logits "
        f"{proof['largest_distance']:.1g} of their spread apart, bound {proof['bound']:.1g}"
        f"{' (from an earlier run)' if proof.get('cached') else ''}"
    )


def _where_time_went(row: dict[str, Any], record: dict[str, Any]) -> Iterator[str]:
    """Yields the shares of the clock's time; of a resumed run, over the segments that could write theirs."""
    parts, which = _known(record, "time")
    elapsed = sum(part["elapsed_s"] for part in parts) if "segments" in record else row["elapsed_s"]
    names = {
        "prefill_s": "prefill",
        "decode_s": "decode",
        "tokenize_s": "tokenize",
        "detokenize_s": "detokenize",
        "host_s": "host",
    }
    shares = {
        name: sum(part["time"][key] for part in parts) / elapsed
        for key, name in names.items()
        if parts and elapsed and all(key in part["time"] for part in parts)
    }
    busy = row["device_busy_share"]
    device = "" if busy is None else f"; the GPU had a pass to compute {busy:.1%} of the time"
    if shares:
        yield ", ".join(f"{name} {share:.1%}" for name, share in shares.items()) + which + device


def _passes(row: dict[str, Any], record: dict[str, Any]) -> Iterator[str]:
    """Yields how full the passes were; of a resumed run, over the segments that could write theirs."""
    parts, which = _known(record, "engine_statistics")
    figures = [part["engine_statistics"] for part in parts]
    counted = [one for one in figures if one.get("steps") and one.get("mean_tokens_per_pass") is not None]
    if not counted or len(counted) < len(figures) or row["token_budget"] is None:
        return
    steps = sum(one["steps"] for one in counted)
    mean = sum(one["mean_tokens_per_pass"] * one["steps"] for one in counted) / steps
    budget = f", {mean / row['token_budget']:.0%} of the token budget {row['token_budget']}"
    if any("engine.token_budget" in part.get("changed", {}) for part in parts[1:]):
        budget = ""  # of several
    yield (
        f"{steps:,} passes of {mean:,.0f} tokens on average{budget}; "
        f"at most {max(one['peak_sequences'] for one in counted)} sequences, "
        f"KV cache {max(one['kv_peak_utilisation'] for one in counted):.1%} full at its peak, "
        f"{sum(one['preemptions'] for one in counted)} preemptions{which}"
    )


def _known(record: dict[str, Any], key: str) -> tuple[list[dict[str, Any]], str]:
    """Returns the segments that have ``key``, or the record of a run of one, and which these are if not all."""
    segments = record.get("segments")
    if not segments:
        return ([record] if record.get(key) else []), ""
    known = {number: segment for number, segment in enumerate(segments, start=1) if segment.get(key)}
    if len(known) == len(segments):
        return list(known.values()), ""
    which = f"segment{'s' if len(known) > 1 else ''} {', '.join(map(str, known))} of {len(segments)}"
    others = "the others" if len(segments) - len(known) > 1 else "the other"
    return list(known.values()), f" (of {which} alone: {others} ended before writing this down)"


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else "?"


def _seconds(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f} s"
