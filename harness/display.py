"""What a person sees: progress while the run goes on, and the summary at its end."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from harness.engines.base import Progress as EngineProgress
from harness.errors import printable
from harness.workload import Completion

REFRESH_S = 0.5
PLAIN_S = 5.0
PACE_S = 20.0  # how far back the pace is taken from


class _Console(Console):
    """A console whose reader may leave, as ``head`` does: what is measured goes on, unseen."""

    def on_broken_pipe(self) -> None:
        """Called by rich, which would end the program."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def console() -> Console:
    """Returns the terminal; a log file gets plain lines of a width that holds the summary."""
    return _Console(file=sys.stdout, highlight=False, emoji=False, width=None if sys.stdout.isatty() else 110)


class Display:
    """Live progress: a bar on a terminal, a plain line every few seconds elsewhere.

    Drawn from the engine's own thread between two passes, so that no second thread disturbs the measurement.

    Args:
        estimates: for each request, by index, about how many prompt and output tokens it has; for the time left.
        before: further requests, which are done already.
    """

    def __init__(self, screen: Console, estimates: dict[int, int], before: int = 0) -> None:
        self.screen = screen
        self.estimates = estimates
        self.requests = len(estimates) + before
        self.expected_tokens = sum(estimates.values())
        self.finished = before
        self.elsewhere_tokens = 0  # finished on other ranks
        self.recent: deque[tuple[float, int]] = deque()
        self.started = self.drawn = time.perf_counter()
        self.bar: Progress | None = None

    def __enter__(self) -> Display:
        self.started = self.drawn = time.perf_counter()
        if self.screen.is_terminal:
            self.bar = Progress(
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}"),
                TimeElapsedColumn(),
                console=self.screen,
                auto_refresh=False,
                transient=True,
            )
            self.task = self.bar.add_task("run", total=self.requests, state="")
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def request_done(self, completion: Completion, elsewhere: bool) -> None:
        """Counts one finished or rejected request, of this rank or from ``elsewhere``."""
        tokens = completion.prompt_tokens + completion.output_tokens
        self.finished += 1
        self.expected_tokens += tokens - self.estimates[completion.index]
        if elsewhere:
            self.elsewhere_tokens += tokens

    def update(self, progress: EngineProgress) -> None:
        """Draws the state, if the last drawing is long enough ago."""
        now = time.perf_counter()
        if now - self.drawn < (REFRESH_S if self.bar is not None else PLAIN_S):
            return
        self.drawn = now
        state = self._state(progress, now - self.started)
        if self.bar is not None:
            self.bar.update(self.task, completed=self.finished, state=state)
            self.bar.refresh()
        else:
            self.screen.print(f"{now - self.started:7.1f} s  {self.finished}/{self.requests} requests  {state}")

    def _state(self, progress: EngineProgress, elapsed: float) -> str:
        tokens = progress.prompt_tokens + progress.output_tokens + self.elsewhere_tokens
        parts = [f"{tokens:,} tokens", f"{tokens / elapsed:,.0f} tok/s"]
        queued = max(self.requests - self.finished - progress.running, 0)  # other ranks' running ones among them
        parts.append(f"{progress.running} running, {queued} queued")
        if progress.kv_utilisation is not None:
            parts.append(f"KV {progress.kv_utilisation:.0%}")
        while len(self.recent) > 1 and elapsed - self.recent[0][0] > PACE_S:
            self.recent.popleft()
        since, before = self.recent[0] if self.recent else (0.0, 0)
        self.recent.append((elapsed, tokens))
        # At the recent pace: prompts go by much faster than the outputs at the end.
        if tokens > before:
            left = max(self.expected_tokens - tokens, 0) * (elapsed - since) / (tokens - before)
            parts.append(f"about {duration(left)} left")
        return "  ".join(parts)


class Steps:
    """Progress of something counted, outside the clock: a bar on a terminal, a plain line every few seconds elsewhere.

    Args:
        what: is counted, such as ``requests judged``.
        stream: where it is shown.
    """

    def __init__(self, what: str, stream: TextIO) -> None:
        self.what = what
        self.screen = _Console(file=stream, highlight=False)
        self.drawn = time.perf_counter()
        self.bar: Progress | None = None

    def __enter__(self) -> Steps:
        self.drawn = time.perf_counter()
        if self.screen.is_terminal:
            columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn(self.what), TimeElapsedColumn())
            self.bar = Progress(*columns, console=self.screen, transient=True)
            self.task = self.bar.add_task(self.what, total=None)
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, done: int, of: int) -> None:
        """Shows that ``done`` of ``of`` are done, if the last line is long enough ago."""
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=of)
        elif time.perf_counter() - self.drawn >= PLAIN_S:
            self.drawn = time.perf_counter()
            self.screen.print(f"{done}/{of} {self.what}")


def duration(seconds: float) -> str:
    """Returns seconds as ``42 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


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
