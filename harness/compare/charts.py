"""The charts of a report as Vega-Lite specifications; which ones there are depends on what the groups differ in.

The page gives each its data under the name ``rows``, ``labels`` as the names of the groups, and its colours.
"""

from __future__ import annotations

import math
from typing import Any

from harness.compare.comparison import Comparison
from harness.compare.varied import varied

BARS = 40
KEY_CHARTS = 12
MOST_CATEGORIES = 20  # a setting with more values than this is no axis
TOTAL = "total tokens/s"
LATENCY = "latency p50: half of the requests are done (s)"
ALIGNED = {"minExtent": 44, "maxExtent": 44, "tickCount": 5}  # axes of charts that stand one above the other


def charts(comparison: Comparison, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the charts that these groups give reason to draw: id, title, what it shows, Vega-Lite spec and data.

    A setting has one where somebody varied it.

    Args:
        rows: a row of the page for each group, in the order of ``comparison.groups``.
    """
    drawn = [row for row in rows if row["tps"] is not None]
    if not drawn:
        return []
    engines = list(dict.fromkeys(row["engine"] for row in drawn))
    measured, simulated = ([row for row in drawn if bool(row["simulated"]) is kind] for kind in (False, True))
    found = [_bar_chart(part, engines) for part in (measured, simulated) if part]
    chosen = varied(comparison.groups, comparison.keys)
    for number, key in enumerate(comparison.keys):
        if key not in chosen:
            continue
        values = {row["k"][number] for row in drawn if row["k"][number] is not None}
        if len(values) < 2 or (len(values) > MOST_CATEGORIES and not _numeric(values)) or len(found) > KEY_CHARTS:
            continue
        series: dict[tuple[Any, ...], int] = {}  # a number for each combination of the other settings
        points = []
        for row in drawn:
            others = (*row["k"][:number], *row["k"][number + 1 :])
            if row["k"][number] is not None:
                points.append(_point(row) | {"x": row["k"][number], "s": series.setdefault(others, len(series))})
        found.append({"id": "key", "title": key, "spec": _key_chart(values, engines), "data": points})
    points = [_point(row) for row in drawn if row["p50"]]
    if points:
        about = "Up is more throughput, left is sooner done: the best runs are at the top left."
        title = "Throughput and latency"
        found.append({"id": "latency", "title": title, "about": about, "spec": _scatter(engines), "data": points})
    return found


def _bar_chart(drawn: list[dict[str, Any]], engines: list[str]) -> dict[str, Any]:
    """Returns the bars of the measured groups, or of the simulated ones."""
    best = f"The best {BARS} of {len(drawn)} groups" if len(drawn) > BARS else "All groups that ran to their end"
    repeated = any(row["spread"] is not None for row in drawn)
    about = f"{best}, best first, named by what sets them apart."
    about += " The black line spans the repeated runs." if repeated else ""
    about += " Pale: not comparable with the baseline." if any(row["differs"] for row in drawn) else ""
    simulated = bool(drawn[0]["simulated"])
    title = "Simulated throughput" if simulated else "Throughput"
    spec = _bars(engines, max(row["high"] for row in drawn), repeated)
    return {"id": "bars", "simulated": simulated, "title": title, "about": about, "spec": spec}


def _point(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("n", "tps", "p50")}


def _numeric(values: set[Any]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _by_engine(engines: list[str], legend: bool = True) -> dict[str, Any]:
    encoding = {"field": "engine", "type": "nominal", "scale": {"domain": engines}, "title": "engine"}
    return encoding if legend and len(engines) > 1 else {**encoding, "legend": None}


def _tooltip() -> list[dict[str, Any]]:
    return [
        {"field": "id", "title": "run"},
        {"field": "label", "title": "what"},
        {"field": "tps", "title": TOTAL, "format": ",.1f"},
        {"field": "ratioText", "title": "to the baseline"},
        {"field": "p50", "title": "latency p50 (s)", "format": ",.2f"},
        {"field": "p99", "title": "latency p99 (s)", "format": ",.2f"},
    ]


def _pale() -> dict[str, Any]:
    return {"condition": {"test": "datum.comparable", "value": 1}, "value": 0.45}


def _bars(engines: list[str], highest: float, repeated: bool) -> dict[str, Any]:
    axis = {"title": None, "labelExpr": "labels[datum.value]", "ticks": False, "domain": False}
    y = {"field": "n", "type": "ordinal", "sort": "ascending", "axis": axis}
    scale: dict[str, Any] = {"domain": [0, 1.1 * highest]}  # room for the figure behind the longest bar
    strong: dict[str, Any] = {"strokeWidth": 1.5, "style": "strong"}
    spans: list[dict[str, Any]] = [
        {
            "transform": [{"filter": "datum.high > datum.low"}],
            "mark": {"type": "rule", **strong},
            "encoding": {"y": y, "x": {"field": "low", "type": "quantitative"}, "x2": {"field": "high"}},
        },
        *(
            {
                "transform": [{"filter": "datum.high > datum.low"}],
                "mark": {"type": "tick", "thickness": 1.5, "size": 8, "style": "strong"},
                "encoding": {"y": y, "x": {"field": end, "type": "quantitative"}},
            }
            for end in ("low", "high")
        ),
    ]
    return {
        "data": {"name": "rows"},
        "layer": [
            {
                "mark": {"type": "bar", "height": {"band": 0.7}, "cursor": "pointer"},
                "encoding": {
                    "y": y,
                    "x": {
                        "field": "tps",
                        "type": "quantitative",
                        "title": TOTAL,
                        "axis": {"tickCount": 8},
                        "scale": scale,
                    },
                    "color": _by_engine(engines),
                    "fillOpacity": _pale(),
                    "tooltip": _tooltip(),
                },
            },
            *(spans if repeated else []),
            {
                "mark": {"type": "text", "align": "left", "dx": 6},
                "encoding": {"y": y, "x": {"field": "high", "type": "quantitative"}, "text": {"field": "tpsText"}},
            },
        ],
    }


def _key_chart(values: set[Any], engines: list[str]) -> dict[str, Any]:
    if _numeric(values):
        powers = all(value > 0 and math.log2(value).is_integer() for value in values)
        axis: dict[str, Any] = {"values": sorted(values), "format": "~r"} if len(values) <= 10 else {"format": "~r"}
        scale: dict[str, Any] = {"type": "log", "base": 2} if powers else {"zero": False}
        x: dict[str, Any] = {"type": "quantitative", "axis": {**axis, "grid": False}, "scale": {**scale, "padding": 16}}
        line: list[dict[str, Any]] = [
            {
                "mark": {"type": "line", "opacity": 0.4, "strokeWidth": 1.5},
                "encoding": {
                    "detail": {"field": "s"},
                    "strokeDash": {"condition": {"test": "datum.simulated", "value": [5, 4]}, "value": [1, 0]},
                },
            }
        ]
    else:
        x = {
            "type": "nominal",
            "axis": {"labelAngle": 0 if len(values) <= 4 else -35, "labelLimit": 130, "grid": False},
        }
        line = []
    color = _by_engine(engines, legend=False)
    return {
        "data": {"name": "rows"},
        "height": 190,
        "encoding": {
            "x": {"field": "x", "title": None, **x},
            "y": {"field": "tps", "type": "quantitative", "title": TOTAL, "scale": {"zero": True}},
            "color": color,
        },
        "layer": [
            *line,
            {
                "mark": {"type": "point", "filled": True, "size": 60, "cursor": "pointer"},
                "encoding": {"shape": color, "opacity": _pale(), "tooltip": _tooltip()},
            },
        ],
    }


def _scatter(engines: list[str]) -> dict[str, Any]:
    color = _by_engine(engines)
    return {
        "data": {"name": "rows"},
        "height": 320,
        "mark": {"type": "point", "filled": True, "size": 80, "cursor": "pointer"},
        "encoding": {
            "x": {"field": "p50", "type": "quantitative", "title": LATENCY, "axis": {"tickCount": 10}},
            "y": {"field": "tps", "type": "quantitative", "title": TOTAL},
            "color": color,
            "shape": color,
            "opacity": _pale(),
            "tooltip": _tooltip(),
        },
    }


# --- the passes of a run ---


def _time_axis() -> dict[str, Any]:
    scale = {"nice": False, "zero": True}
    return {"field": "t", "type": "quantitative", "title": "time (s)", "scale": scale, "axis": {"tickCount": 10}}


def tokens_chart() -> dict[str, Any]:
    """Returns the chart of tokens a pass over time: rows of ``t``, ``kind``, ``order``, ``tokens``."""
    kinds = {"domain": ["decode", "prompt"]}
    return {
        "data": {"name": "rows"},
        "height": 200,
        "mark": {"type": "area", "interpolate": "step-after", "tooltip": True},
        "encoding": {
            "x": _time_axis(),
            "y": {
                "field": "tokens",
                "type": "quantitative",
                "title": "tokens a pass",
                "stack": "zero",
                "axis": ALIGNED,
            },
            "color": {"field": "kind", "type": "ordinal", "scale": kinds, "legend": {"title": None, "orient": "top"}},
            "order": {"field": "order", "type": "quantitative"},
        },
    }


def cache_chart() -> dict[str, Any]:
    """Returns the chart of the KV cache over time: rows of ``t`` and ``kv`` (0..1)."""
    return {
        "data": {"name": "rows"},
        "height": 110,
        "mark": {"type": "area", "interpolate": "step-after", "line": True, "fillOpacity": 0.25},
        "encoding": {
            "x": _time_axis(),
            "y": {
                "field": "kv",
                "type": "quantitative",
                "title": "KV cache in use",
                "axis": {**ALIGNED, "format": "~%"},
            },
        },
    }
