"""What a person sees of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.accuracy.record import ComparedFigure
from harness.basics.errors import printable


def summary(screen: Console, made: dict[str, Any], directory: Path) -> None:
    """Prints what was evaluated and what was found; ``made`` is the record."""
    quantization = f", {made['quantization']}" if made["quantization"] else ""
    of = (
        f"{made['engine']} ({made['kernels']} kernels), {made['model']} {made['dtype']}{quantization}, "
        f"tp={made['tp']}, dp={made['dp']}, on {made['device_name']}; {made['seconds']:.1f} s"
    )
    rows = [("Evaluation", made["run_id"]), ("Of", escape(of))]
    rows += [*_perplexity(made["perplexity"]), *_tasks(made["tasks"])]
    rows += [("Note", escape(note)) for note in made["notes"]]
    _print(screen, [*rows, ("Files", escape(f"{directory}/"))])


def comparison(screen: Console, run_id: str, differences: list[ComparedFigure], settings: list[str]) -> None:
    """Prints how the figures compare with those of the evaluation ``run_id``, and the ``settings`` that differ."""
    rows = [("Against", escape(run_id))]
    for difference in differences:
        verdict = "[bold red]worse than allowed[/]" if difference.worse else "[green]within what is allowed[/]"
        rows.append((escape(difference.name), f"{escape(difference.text)}: {verdict}"))
    rows += [("Settings" if number == 0 else "", escape(setting)) for number, setting in enumerate(settings)]
    _print(screen, rows)


def _print(screen: Console, rows: list[tuple[str, str]]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    screen.print()
    screen.print(table)


def _perplexity(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    if found is None:
        return []
    after = "BOS" if found["conditioned_on"] == "bos" else "their first one"
    lines = [
        (
            "Perplexity",
            f"[bold green]{found['perplexity']:.4f}[/] over {found['tokens']:,} tokens of {found['scored']:,} of "
            f"{found['requests']:,} prompts of {escape(found['dataset'])}, those after {after}",
        ),
        ("", f"by prompt: p50 {found['request_perplexity_p50']:.2f}, highest {found['request_perplexity_max']:.2f}"),
    ]
    return lines


def _tasks(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    lines = []
    for name, task in (found or {}).items():
        if task["subtask"]:
            continue
        for metric, value in task["metrics"].items():
            error = task["stderr"].get(metric)
            spread = f" +- {error:.4f}" if error is not None else ""
            samples = f", {task['samples']:,} questions" if task["samples"] is not None else ""
            shots = f", {task['n_shot']}-shot" if task["n_shot"] is not None else ""
            lines.append((escape(name), f"{escape(metric)} [bold green]{value:.4f}[/]{spread}{samples}{shots}"))
    return lines
