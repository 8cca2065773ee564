"""What a person sees of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.evaluation.record import Difference


def summary(
    screen: Console,
    made: dict[str, Any],
    directory: Path,
    within: float,
    differences: list[Difference] | None,
    settings: list[str],
    against: str | None,
) -> None:
    """Prints what was evaluated, its figures, and how they compare.

    Args:
        made: the record.
        within: percent, or percentage points, that figures may be worse.
        differences: to the evaluation ``against``; None where there is none.
        settings: in which the two differ.
    """
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    quantization = f", {made['quantization']}" if made["quantization"] else ""
    table.add_row("Evaluation", made["run_id"])
    table.add_row(
        "Of",
        escape(
            f"{made['engine']} ({made['kernels']} kernels), {made['model']} {made['dtype']}{quantization}, "
            f"tp={made['tp']}, dp={made['dp']}, on {made['device_name']}; {made['seconds']:.1f} s"
        ),
    )
    for label, text in [*_perplexity(made["perplexity"]), *_tasks(made["tasks"])]:
        table.add_row(label, text)
    if differences is not None:
        for number, difference in enumerate(differences):
            verdict = f"[bold red]worse than {within:g} allows[/]" if difference.worse else "[green]within[/]"
            name = "" if difference.name == "perplexity" else f"{difference.name}: "
            table.add_row(f"Against {against}" if number == 0 else "", f"{escape(name + difference.text)}: {verdict}")
        for number, setting in enumerate(settings):
            table.add_row("Settings" if number == 0 else "", escape(setting))
    for note in made["notes"]:
        table.add_row("Note", escape(note))
    table.add_row("Files", escape(f"{directory}/"))
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
