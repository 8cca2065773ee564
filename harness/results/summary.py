"""What a finished run prints."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.basics.errors import printable


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
    ranks = (row["tp"] or 1) * (row["dp"] or 1)
    lines = [
        (
            "Run",
            f"{row['run_id']}  {row['status']}" + (f": {escape(str(row['error']))}" if row["error"] else ""),
        ),
        (
            "What ran",
            escape(
                f"{row['engine']} ({row['kernels']} kernels), {row['model']} {row['dtype']}"
                f"{' with dummy weights' if row['weights'] == 'dummy' else ''}, {row['dataset']}: "
                f"{_count(row['completed'])} of {_count(row['requests'])} requests"
                + (f", {row['rejected']} rejected" if row["rejected"] else "")
                + f", stop={row['stop']}"
            ),
        ),
        (
            "On",
            escape(
                f"{row['device_name']}, {ranks} rank{'s' if ranks > 1 else ''} (tp={row['tp']}, dp={row['dp']})"
                + _chosen(record.get("split"))
            ),
        ),
    ]
    if row["total_tokens_per_s"]:
        most, least = ("at most ", "at least ") if record.get("elapsed_is_estimated") else ("", "")
        lines += [
            (
                "Throughput",
                f"{most}[bold green]{row['total_tokens_per_s']:,.1f} total tokens/s[/] "
                f"= {row['total_tokens']:,} tokens "
                f"({row['prompt_tokens']:,} prompt + {row['output_tokens']:,} output) "
                f"in {least}{row['elapsed_s']:,.1f} s",
            ),
            (
                "",
                f"{row['output_tokens_per_s']:,.1f} output tokens/s, {row['requests_per_s']:.2f} requests/s; "
                f"first token p50 {_seconds(row['ttft_p50_s'])}, p99 {_seconds(row['ttft_p99_s'])}; "
                f"finished p50 {_seconds(row['latency_p50_s'])}, p99 {_seconds(row['latency_p99_s'])}",
            ),
        ]
        if times := _where_time_went(row, record.get("time", {})):
            lines.append(("Time", times))
        if "segments" not in record and (passes := _passes(row, record.get("engine_statistics", {}))):
            lines.append(("Passes", passes))
        if row["energy_j"]:
            source = record.get("telemetry", {}).get("energy_source")
            lines.append(
                (
                    "Energy",
                    f"{row['energy_j']:,.0f} J, {row['total_tokens'] / row['energy_j']:,.2f} total tokens/J"
                    + (f" ({source})" if source else ""),
                )
            )
    if row["load_s"] is not None:
        memory = f", peak memory {row['peak_memory_bytes'] / 2**30:.2f} GiB" if row["peak_memory_bytes"] else ""
        warm = f", warm-up {row['warmup_s']:.1f} s" if row["warmup_s"] is not None else ""
        proof = record.get("proof") or {}
        proving = f", proof {proof['seconds']:.1f} s" if proof.get("seconds") else ""
        lines.append(("Outside", f"load {row['load_s']:.1f} s{proving}{warm} (not in the clock){memory}"))
        if proof.get("requests"):
            lines.append(("Proof", _proof(proof)))
    if parity := record.get("parity"):
        checked = f"{parity['checked']} of {row['completed']:,} outputs checked against Hugging Face"
        names = {"exact": "exact", "near_tie": "near-ties", "wrong": "wrong"}
        counts = [f"{parity[name]} {word}" for name, word in names.items() if parity[name] or name == "exact"]
        lines.append(("Tokens", f"{checked} {parity['reference']['dtype']}: {', '.join(counts)}"))
    for note in record.get("notes", []):
        lines.append(("Note", escape(note)))
    lines.append(("Files", escape(f"{record['directory']}/, and one row in {record['results_dir']}/runs.csv")))
    return lines


def _chosen(split: dict[str, Any] | None) -> str:
    """Returns why the ranks are split as they are, where that was not given."""
    return f", chosen: {split['why']}" if split and None in split["asked"].values() else ""


def _proof(proof: dict[str, Any]) -> str:
    layers = f"first {proof['layers']} layers" if proof["layers"] else "model"
    return (
        f"{proof['requests']} requests through the engine's own passes agree with Hugging Face's {layers}: logits "
        f"{proof['largest_distance']:.1g} of their spread apart, bound {proof['bound']:.1g}"
        f"{' (from an earlier run)' if proof.get('cached') else ''}"
    )


def _where_time_went(row: dict[str, Any], times: dict[str, float]) -> str:
    elapsed = row["elapsed_s"]
    names = {
        "prefill_s": "prefill",
        "decode_s": "decode",
        "tokenize_s": "tokenize",
        "detokenize_s": "detokenize",
        "host_s": "host",
    }
    return ", ".join(f"{name} {times[key] / elapsed:.1%}" for key, name in names.items() if key in times)


def _passes(row: dict[str, Any], statistics: dict[str, Any]) -> str:
    mean = statistics.get("mean_tokens_per_pass")
    if not row["steps"] or mean is None or row["token_budget"] is None:
        return ""
    text = (
        f"{row['steps']:,} passes of {mean:,.0f} tokens on average, {mean / row['token_budget']:.0%} of the token "
        f"budget {row['token_budget']}; at most {statistics['peak_sequences']} sequences, "
        f"KV cache {row['kv_peak_utilisation']:.1%} full at its peak, {row['preemptions']} preemptions"
    )
    return text


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else "?"


def _seconds(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f} s"
