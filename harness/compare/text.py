"""A comparison as text: a table for the terminal, CSV and JSON for programs."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections import Counter
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.basics.cells import cell_text
from harness.basics.files import plain
from harness.basics.terminal import PLAIN_WIDTH
from harness.compare.comparison import Comparison
from harness.compare.groups import Group
from harness.compare.ratios import LEGEND, interval_text, ratio_text
from harness.compare.ratios import figures as interval_figures
from harness.compare.reading import UNKNOWN, shown
from harness.results.columns import FIGURES

# Figures that follow the throughput if the terminal has room for them, the most telling first.
OPTIONAL = {
    name: figure
    for name, figure in sorted(FIGURES.items(), key=lambda item: item[1].room)
    if figure.terminal is not None
}
PADDING = 2
SETTING_WIDTH = 26
LEAST_SETTINGS_WIDTH = 26
NARROWEST_SETTINGS = 14
OTHER_SETTINGS = "other settings"
Column = tuple[str, list[str], bool]  # heading, cells, right-aligned
ERRORS_SHOWN = 8


def predicted_text(one: Group) -> str:
    """Returns what a simulation of the same settings gave, and by how much that is off; empty without one."""
    if one.predicted is None or one.prediction_error is None:
        return ""
    return f"{one.predicted.throughput:,.1f} {one.prediction_error:+.1%}"


def settings_text(one: Group, keys: list[str]) -> str:
    """Returns those of a group's settings that set it apart, as they would be typed."""
    known = ((key, one.settings.get(key, UNKNOWN)) for key in keys)
    return " ".join(f"{key}={shown(key, value)}" for key, value in known if value is not UNKNOWN)


def statuses_text(counts: Counter[str]) -> str:
    """Returns how runs ended, such as ``failed`` or ``2 oom, 1 timeout``."""
    if sum(counts.values()) == 1:
        return next(iter(counts))
    return ", ".join(f"{count} {status}" for status, count in counts.most_common())


# --- the terminal ---


def print_table(screen: Console, comparison: Comparison) -> None:
    """Prints the table, what it is relative to, why some of it is not comparable, and why runs failed."""
    columns = _columns(comparison, screen.width)
    parts = [[one for one in comparison.groups if bool(one.simulated) is simulated] for simulated in (False, True)]
    for part, heading in zip(parts, ("Measured", "Simulated"), strict=True):
        if part:
            if all(parts) or part is parts[1]:
                screen.print(Text(heading, style="bold"))
            screen.print(_table(comparison, columns, part))
            screen.print()
    if any(heading == OTHER_SETTINGS for heading, _, _ in columns):
        keys = [key for key in comparison.keys if key.replace(".", ".\n") not in (heading for heading, _, _ in columns)]
        usual = usual_settings(comparison)
        screen.print(Text("Others, if not named: " + " ".join(f"{key}={shown(key, usual[key])}" for key in keys)))
    for line in _notes(comparison):
        screen.print(Text(line))
    for line in _errors(comparison, screen.width):
        screen.print(Text(line), soft_wrap=True)


def _table(comparison: Comparison, columns: list[Column], part: list[Group]) -> Table:
    """Returns the lines of some of the groups."""
    table = Table(box=None, padding=(0, PADDING, 0, 0), header_style="bold", expand=False)
    for heading, cells, right in columns:
        # As wide in each part, so that figures stand below each other.
        width = _width((heading, cells, right)) - PADDING
        justify: Any = "right" if right else "left"
        table.add_column(Text(heading), justify=justify, no_wrap=True, overflow="fold", min_width=width)
    for number, one in enumerate(comparison.groups):
        if one in part:
            style = "bold" if one is comparison.baseline else "dim" if one.ok == 0 else ""
            table.add_row(*(Text(cells[number]) for _, cells, _ in columns), style=style)
    return table


def _columns(comparison: Comparison, width: int) -> list[Column]:
    """Returns the columns that fit in ``width`` characters, none of them cut."""
    groups = comparison.groups
    spread = ["" if one.spread is None else f"{one.spread:.1%}" for one in groups]
    runs: Column = ("run", [one.run_id for one in groups], False)
    figures: list[Column] = [
        ("runs", [f"{one.ok}/{len(one.runs)}" for one in groups], True),
        ("total\ntok/s", [_throughput(one) for one in groups], True),
        *([("spread", spread, True)] if any(spread) else []),
        ("ratio", [ratio_text(one) for one in groups], True),
        *([("interval", [interval_text(one) for one in groups], True)] if any(o.interval for o in groups) else []),
        *(
            [("pre-\ndicted", [predicted_text(one) for one in groups], True)]
            if any(o.predicted for o in groups)
            else []
        ),
    ]
    left = width - sum(_width(column) for column in (runs, *figures))
    settings = _settings(comparison, left)
    left -= sum(_width(column) for column in settings)
    for name, figure in OPTIONAL.items():
        if name in comparison.figures:
            values = (one.figures[name] for one in groups)
            cells = ["" if value is None else format(value * figure.scale, figure.form) for value in values]
            column = (str(figure.terminal), cells, True)
            if _width(column) <= left:
                figures.append(column)
                left -= _width(column)
    return [runs, *settings, *figures]


def _settings(comparison: Comparison, width: int) -> list[Column]:
    """Returns a column for each setting; if they are too many, the most varied ones and one column for all others.

    The column for others names only what is not as :func:`usual_settings` says.
    """
    columns: dict[str, Column] = {
        key: (
            key.replace(".", ".\n"),
            [_short(shown(key, one.settings[key])) if key in one.settings else "" for one in comparison.groups],
            False,
        )
        for key in comparison.keys
    }
    if sum(_width(column) for column in columns.values()) <= width:
        return list(columns.values())
    usual = usual_settings(comparison)
    varied = sorted(
        comparison.keys,
        key=lambda key: (
            key == "engine",
            sum(one.settings.get(key, usual[key]) != usual[key] for one in comparison.groups),
        ),
    )
    own: list[str] = []
    for key in reversed(varied):
        if sum(_width(columns[name]) for name in (*own, key)) + LEAST_SETTINGS_WIDTH > width:
            break
        own.append(key)
    others = [key for key in comparison.keys if key not in own]
    left = width - sum(_width(columns[name]) for name in own)
    cells = [
        settings_text(one, [key for key in others if one.settings.get(key, usual[key]) != usual[key]])
        for one in comparison.groups
    ]
    room = max(left, NARROWEST_SETTINGS) - PADDING
    folded: Column = (OTHER_SETTINGS, ["\n".join(_folded(cell, room)) for cell in cells], False)
    return [*(columns[key] for key in comparison.keys if key in own), folded]


def usual_settings(comparison: Comparison) -> dict[str, Any]:
    """Returns the commonest value of each setting that differs."""
    return {
        key: Counter(one.settings[key] for one in comparison.groups if key in one.settings).most_common(1)[0][0]
        for key in comparison.keys
    }


def _throughput(one: Group) -> str:
    if one.ok == 0:
        return statuses_text(one.statuses)
    return "?" if one.throughput is None else f"{one.throughput:,.1f}"


def _width(column: Column) -> int:
    heading, cells, _ = column
    return PADDING + max(cell_len(line) for text in (heading, *cells) for line in text.split("\n"))


def _short(text: str) -> str:
    """Returns a long path or name by its end, which tells it from its neighbours."""
    return text if len(text) <= SETTING_WIDTH else ".." + text[2 - SETTING_WIDTH :]


def _folded(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        while len(word) > width:  # broken after its key if that helps
            end = word.find("=") + 1 if 0 < word.find("=") < width else width
            lines += [word[:end], ""]
            word = word[end:]
        if lines[-1] and cell_len(lines[-1]) + 1 + cell_len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return [line for line in lines if line]


def caption(comparison: Comparison) -> str:
    """Returns the line that says what the ratios are to."""
    if comparison.baseline is None:
        return "No run is ok: there is nothing to compare with."
    return f"Baseline: {comparison.baseline.run_id}, {comparison.reason}; another one: --baseline RUN_ID."


def _notes(comparison: Comparison) -> list[str]:
    notes = [caption(comparison)]
    if any(one.spread is not None for one in comparison.groups):
        notes.append("Repeated runs are one line: medians; spread is (highest - lowest) / median of total tok/s.")
    intervals = [one.interval for one in comparison.groups if one.interval is not None]
    if intervals:
        notes += LEGEND[: 1 if all(one.paired for one in intervals) else 2]
    if any(one.predicted is not None for one in comparison.groups):
        notes.append("predicted: total tok/s of the simulated run of the same settings, and its error.")
    if comparison.hidden:
        notes.append(f"{comparison.hidden:,} more not shown: --limit N, --where KEY=VALUE, --csv.")
    return notes + [f"! {warning}" for warning in (*comparison.warnings, *comparison.cautions)]


def _errors(comparison: Comparison, width: int) -> list[str]:
    """Returns why groups failed, one line for each reason."""
    owners: dict[str, list[Group]] = {}
    for one in comparison.groups:
        if one.ok < len(one.runs):
            owners.setdefault(one.error or "no reason recorded", []).append(one)
    lines = []
    for error, groups in owners.items():
        many = f" and {len(groups) - 1} more" if len(groups) > 1 else ""
        status = next(run.cells.get("status", "") for run in reversed(groups[0].runs) if not run.ok)
        failed = next(run.run_id for run in reversed(groups[0].runs) if not run.ok)
        line = f"{failed}{many} {status}: {error}"
        lines.append(line if cell_len(line) <= width else line[: width - 2] + "..")
    if len(lines) > ERRORS_SHOWN:
        lines[ERRORS_SHOWN:] = [f"{len(lines) - ERRORS_SHOWN} more reasons: --csv or --json has them."]
    return lines


def terminal(is_terminal: bool) -> Console:
    """Returns a console that draws into memory, so that a pipe closed early is met in one place only."""
    width = shutil.get_terminal_size().columns if is_terminal else PLAIN_WIDTH
    return Console(file=io.StringIO(), highlight=False, width=width, force_terminal=is_terminal)


# --- for programs ---


def as_csv(comparison: Comparison) -> str:
    """Returns one line a group: run id, counts, settings that differ, figures; unknown is empty."""
    head = ["run_id", "runs", "ok", "statuses", *comparison.keys, *comparison.figures]
    tail = ["total_tokens_per_s_min", "total_tokens_per_s_max", "spread", "ratio", "differs_in", "run_ids", "error"]
    tail += ["predicted_total_tokens_per_s", "prediction_error", "predicted_by", *interval_figures(None)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(cell_text(name, name) for name in (*head, *tail))
    for one in comparison.groups:
        settings = [
            cell_text(key, shown("", one.settings[key])) if key in one.settings else "" for key in comparison.keys
        ]
        figures = [cell_text(name, one.figures[name]) for name in comparison.figures]
        rest = (one.low, one.high, one.spread, one.ratio)
        writer.writerow(
            [cell_text("run_id", one.run_id), len(one.runs), one.ok, cell_text("statuses", statuses_text(one.statuses))]
            + [*settings, *figures]
            + [cell_text("ratio", value) for value in rest]
            + [" ".join(name.replace(" ", "_") for name in one.differs_in)]
            + [cell_text("run_ids", " ".join(run.run_id for run in one.runs)), cell_text("error", one.error)]
            + [cell_text(name, value) for name, value in {**prediction(one), **interval_figures(one.interval)}.items()]
        )
    return text.getvalue()


def prediction(one: Group) -> dict[str, Any]:
    """Returns what a simulation of a group's settings gave; None where there is none."""
    predicted = one.predicted
    return {
        "predicted_total_tokens_per_s": None if predicted is None else predicted.throughput,
        "prediction_error": one.prediction_error,
        "predicted_by": None if predicted is None else predicted.run_id,
    }


def as_data(comparison: Comparison) -> dict[str, Any]:
    """Returns the comparison as plain data, for JSON; unknown is None."""
    baseline = comparison.baseline
    return {
        "baseline": None if baseline is None else {"run_id": baseline.run_id, "reason": comparison.reason},
        "keys": comparison.keys,
        "groups": [
            {
                "run_id": one.run_id,
                "run_ids": [run.run_id for run in one.runs],
                "runs": len(one.runs),
                "ok": one.ok,
                "statuses": dict(one.statuses),
                "error": one.error or None,
                "config": one.settings,
                "figures": {name: one.figures[name] for name in comparison.figures},
                "total_tokens_per_s_min": one.low,
                "total_tokens_per_s_max": one.high,
                "spread": one.spread,
                "ratio": one.ratio,
                **interval_figures(one.interval),
                "differs_in": one.differs_in,
                "simulated": one.simulated or None,
                **prediction(one),
            }
            for one in comparison.groups
        ],
        "warnings": [
            {
                "differs_in": warning.differs_in,
                "baseline": warning.baseline,
                "values": warning.values,
                "run_ids": warning.run_ids,
                "text": str(warning),
            }
            for warning in comparison.warnings
        ],
        "cautions": comparison.cautions,
    }


def as_json(comparison: Comparison) -> str:
    """Returns :func:`as_data` as text."""
    return json.dumps(plain(as_data(comparison))) + "\n"
