"""The page of ``compare --html``: one file with its data, its charts (Vega-Lite) and the code that draws them."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas

from harness.basics.errors import UserError
from harness.basics.page import bundle, filled, inert
from harness.compare.charts import BARS, cache_chart, charts, tokens_chart
from harness.compare.comparison import Comparison
from harness.compare.groups import Group
from harness.compare.ratios import interval_text
from harness.compare.reading import ComparedRun, shown
from harness.compare.text import statuses_text, usual_settings
from harness.results.columns import FIGURES, Figure
from harness.results.directory import run_directory

TEMPLATE = Path(__file__).with_name("page.html")
TIMELINES = 200  # runs whose passes are in the page
BINS = 150  # points of a timeline
LABEL_LENGTH = 64
PLAIN_IN_LABELS = ("engine.kernels", "model", "model.dtype", "dataset")  # their values speak for themselves
FIGURE_COLUMNS = {name: figure for name, figure in FIGURES.items() if figure.page is not None}


def html(comparison: Comparison, tables: Sequence[str]) -> str:
    """Returns the page; it opens without a network.

    Args:
        tables: what was compared, as the user named it.

    Raises:
        UserError: the package that brings the charts' code is not installed.
    """
    labels = _labels(comparison)
    groups = [_row(number, one, comparison) | {"label": labels[number]} for number, one in enumerate(comparison.groups)]
    parts = {
        "title": escape(f"{len(groups):,} group{'s' if len(groups) != 1 else ''} of runs compared"),
        "facts": _facts(comparison, tables),
        "warnings": "".join(f"<li>{escape(str(one))}</li>" for one in (*comparison.warnings, *comparison.cautions)),
        "data": inert(
            {
                "groups": groups,
                "keys": comparison.keys,
                "figures": [_heading(name) for name in comparison.figures if name in FIGURE_COLUMNS],
                "charts": charts(comparison, groups),
                "bars": BARS,
                "timelines": _timelines(comparison),
                "timelineCharts": [tokens_chart(), cache_chart()],
            }
        ),
        "bundle": bundle(),
    }
    return filled(TEMPLATE, parts)


def _facts(comparison: Comparison, tables: Sequence[str]) -> str:
    machines = sorted({one.settings["device_name"] for one in comparison.groups if one.settings.get("device_name")})
    runs = sum(len(one.runs) for one in comparison.groups)
    ok = sum(one.ok for one in comparison.groups)
    facts = {
        "Written": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        "Machine": ", ".join(machines) or "unknown",
        "From": ", ".join(tables),
        "Runs": f"{runs:,}, {ok:,} of them ok",
        "Baseline": f"{comparison.baseline.run_id}, {comparison.reason}" if comparison.baseline else "no run is ok",
    }
    return "".join(f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items())


# --- rows ---


def _row(number: int, one: Group, comparison: Comparison) -> dict[str, Any]:
    settings = one.settings
    return {
        "n": number,
        "id": one.run_id,
        "runs": [run.run_id for run in one.runs if run.ok],
        "ok": one.ok,
        "all": len(one.runs),
        "status": statuses_text(one.statuses),
        "error": one.error,
        "engine": shown("engine", settings.get("engine", "unknown")),
        "k": [_typed(key, settings[key]) if key in settings else None for key in comparison.keys],
        "shown": [shown(key, settings[key]) if key in settings else None for key in comparison.keys],
        "tps": one.throughput,
        "low": one.low,
        "high": one.high,
        "spread": one.spread,
        "ratio": one.ratio,
        "interval": interval_text(one),
        "alike": one.interval is not None and not one.interval.clear,
        "simulated": one.simulated,
        "predicted": None if one.predicted is None else one.predicted.throughput,
        "error_of_prediction": one.prediction_error,
        "baseline": one is comparison.baseline,
        "differs": one.differs_in,
        "figures": [
            _scaled(one.figures[name], FIGURE_COLUMNS[name]) for name in comparison.figures if name in FIGURE_COLUMNS
        ],
        "p50": one.figures["latency_p50_s"],
        "p99": one.figures["latency_p99_s"],
    }


def _typed(key: str, value: Any) -> Any:
    """Returns a setting as a number where it is one, to sort and to draw by."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else shown(key, value)


def _scaled(value: float | None, figure: Figure) -> float | None:
    scale = figure.scale if figure.page_scale is None else figure.page_scale
    return None if value is None else float(f"{value * scale:.6g}")


def _heading(name: str) -> dict[str, Any]:
    figure = FIGURE_COLUMNS[name]
    return {"title": figure.page, "digits": figure.digits}


def _labels(comparison: Comparison) -> list[str]:
    """Returns a name of each group for charts: its engine and what differs, or what is unusual if that is too much."""
    usual = usual_settings(comparison)

    def label(one: Group, only_unusual: bool) -> str:
        words = [shown("engine", one.settings.get("engine", "unknown"))]
        for key in comparison.keys:
            if key == "engine" or key not in one.settings or (only_unusual and one.settings[key] == usual[key]):
                continue
            name = "" if key in PLAIN_IN_LABELS else f"{key.rpartition('.')[2]}="
            word = name + shown(key, one.settings[key])
            if word not in words:  # "mii mii": an engine and its kernels
                words.append(word)
        return " ".join(words)

    full = [label(one, only_unusual=False) for one in comparison.groups]
    if max(map(len, full)) > LABEL_LENGTH:
        full = [label(one, only_unusual=True) for one in comparison.groups]
    count = Counter(full)
    return [
        text if count[text] == 1 else f"{text} ({one.run_id[-4:]})"
        for text, one in zip(full, comparison.groups, strict=True)
    ]


# --- the passes of a run ---


def _timelines(comparison: Comparison) -> dict[str, dict[str, list[float]]]:
    """Returns the passes of each ok run by its id, of the best groups first, :data:`TIMELINES` runs at most."""
    first = [one.shown for one in comparison.groups if one.ok]
    rest = [run for one in comparison.groups for run in one.runs if run.ok and run is not one.shown]
    found: dict[str, dict[str, list[float]]] = {}
    for run in [*first, *rest]:
        if len(found) == TIMELINES:
            break
        if timeline := passes_of(run):
            found[run.run_id] = timeline
    return found


def passes_of(run: ComparedRun) -> dict[str, list[float]] | None:
    """Returns a run's forward passes as at most :data:`BINS` points of about as many passes each; None without any.

    ``t`` is the start of a point's first pass (s), ``prompt`` and ``decode`` are mean tokens a pass, ``kv`` is the
    highest share of the KV cache in use, empty where there is no paged cache. The last point is the end.
    """
    try:
        path = run_directory(run.results_dir, run.run_id) / "passes.csv"
        table = pandas.read_csv(path, on_bad_lines="skip", encoding_errors="replace")
        table = table[["started_s", "seconds", "prompt_tokens", "decode_tokens", "kv_utilisation"]]
    except (OSError, ValueError, KeyError, UserError):  # ValueError: pandas' own errors among them
        return None
    table = table.apply(pandas.to_numeric, errors="coerce").dropna(subset=["started_s", "seconds", "decode_tokens"])
    if table.empty:
        return None
    table = table.reset_index(drop=True)
    bins = table.groupby(table.index * min(BINS, len(table)) // len(table))
    end = float((table["started_s"] + table["seconds"]).iloc[-1])
    kv = bins["kv_utilisation"].max()
    return {
        "t": [*_rounded(bins["started_s"].min(), 3), round(end, 3)],
        "prompt": _rounded(bins["prompt_tokens"].mean(), 1),
        "decode": _rounded(bins["decode_tokens"].mean(), 1),
        "kv": [] if kv.isna().any() else _rounded(kv, 4),
        "passes": [len(table)],
    }


def _rounded(values: pandas.Series, digits: int) -> list[float]:
    return [round(float(value), digits) for value in values]
