"""The page of ``plan --explain --html``: the waterfall of a run, in one file that needs no network."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from harness.basics.page import bundle, filled, inert
from harness.plan.explanation import Explanation, text

TEMPLATE = Path(__file__).with_name("page.html")
GROUPS = {"settings": "settings", "kernels": "kernels", "model": "not explained"}


def page(found: Explanation) -> str:
    """Returns the page; raises UserError where the package that brings the charts' code is not installed."""
    said = text(found)
    parts = {
        "title": escape(f"What kept {found.run.name} from the limit"),
        "text": escape("\n".join(said)),
        "data": inert({"spec": waterfall_chart(), "rows": rows(found)}),
        "bundle": bundle(),
    }
    return filled(TEMPLATE, parts)


def rows(found: Explanation) -> list[dict[str, Any]]:
    """Returns the bars, the limit first: ``low`` and ``high`` in total tokens/s, ``kind``, ``title``, ``label``."""
    tokens, elapsed = found.tokens, found.parts[0].before_s
    limit = tokens / found.parts[-1].after_s
    bars = [{"title": "limit", "kind": "rates", "low": 0.0, "high": limit, "label": f"{limit:,.1f}"}]
    for part in reversed(found.parts):
        before, after = tokens / part.before_s, tokens / part.after_s
        label = f"{before - after:+,.1f}  ({part.seconds / elapsed:.1%} of the time)"
        low, high = sorted((before, after))
        bars.append({"title": part.title, "kind": GROUPS[part.kind], "low": low, "high": high, "label": label})
    rate = tokens / elapsed
    bars.append({"title": "measured", "kind": "rates", "low": 0.0, "high": rate, "label": f"{rate:,.1f}"})
    return [{"n": number, **bar} for number, bar in enumerate(bars)]


def waterfall_chart() -> dict[str, Any]:
    """Returns the chart's Vega-Lite specification, over :func:`rows`."""
    axis = {"title": None, "ticks": False, "domain": False, "labelLimit": 460}
    y = {"field": "title", "type": "nominal", "sort": {"field": "n"}, "axis": axis}
    colours = {"domain": ["rates", *GROUPS.values()], "range": ["#5b6570", "#0072b2", "#e69f00", "#cc79a7"]}
    legend = {"title": "decided by", "orient": "top", "values": list(GROUPS.values())}
    return {
        "data": {"name": "rows"},
        "height": {"step": 30},
        "layer": [
            {
                "mark": {"type": "bar", "height": {"band": 0.7}},
                "encoding": {
                    "y": y,
                    "x": {"field": "low", "type": "quantitative", "title": "total tokens/s"},
                    "x2": {"field": "high"},
                    "color": {"field": "kind", "type": "nominal", "scale": colours, "legend": legend},
                    "tooltip": [{"field": "title", "title": "cause"}, {"field": "label", "title": "tokens/s"}],
                },
            },
            {
                "mark": {"type": "text", "align": "left", "dx": 6},
                "encoding": {"y": y, "x": {"field": "high", "type": "quantitative"}, "text": {"field": "label"}},
            },
        ],
    }
