"""comparison/page.py: the page of ``compare --html`` as a file, and as a browser shows it."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from harness.compare import __main__ as compare
from harness.compare.page import BINS, passes_of
from harness.compare.reading import ComparedRun
from harness.results.recorder import RunRecorder
from harness.workload.records import Completion, PassRecord

HOSTILE = "</script><img src=x onerror=alert(1)><script>alert(2)</script> {{bundle}} {{nothing}} <!-- \u2028"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def run(results: Path, name: str, rate: float = 100.0, passes: int = 3, asked: str = "", **facts: Any) -> None:
    """Makes a run with ``passes`` forward passes of 0.5 s, each of 8 prompt and 2 decode tokens.

    Args:
        asked: the overrides that its command line had.
    """
    facts = {"token_budget": 512} | facts
    config = {
        "engine": {"name": facts.pop("engine", "fastgen"), "token_budget": facts["token_budget"]},
        "model": {"name": facts.pop("model", "small"), "weights": "pretrained"},
    }
    status = facts.pop("status", "ok")
    error = facts.pop("error", None)
    recorder = RunRecorder.create(results, name, config, ["harness/main.py", *asked.split()])
    for number in range(passes):
        recorder.add_pass(PassRecord(number + 1, number * 0.5, 0.5, 10, 8, 2, 2, number / passes, 0))
    if status == "ok":
        recorder.add(Completion(0, 60, 40, "length", [1], "x", 0.5, 1.5))
        facts |= {"elapsed_s": 100 / rate}
    recorder.finish(status, error, device_name="A CPU", **facts)


def page(results: Path, *arguments: str) -> str:
    assert compare.main([str(results), "--html", str(results / "page.html"), *arguments]) == 0
    return (results / "page.html").read_text(encoding="utf-8")


class _Elements(html.parser.HTMLParser):
    """Collects the elements of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attributes


def data_of(text: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert match is not None
    return json.loads(match[1])


def test_the_page_holds_what_was_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "a", 100.0)
    run(tmp_path, "a2", 120.0)
    run(tmp_path, "b", 330.0, asked="engine.token_budget=64", token_budget=64)
    run(tmp_path, "c", status="oom", error="no memory", token_budget=4096)
    text = page(tmp_path)
    data = data_of(text)
    assert [(row["id"], row["tps"], row["ratio"]) for row in data["groups"]] == [
        ("b", 330.0, 3.0),
        ("a", 110.0, 1.0),
        ("c", None, None),
    ]
    assert (data["groups"][1]["low"], data["groups"][1]["high"], data["groups"][1]["baseline"]) == (100, 120, True)
    assert data["keys"] == ["engine.token_budget"] and [row["k"] for row in data["groups"]] == [[64], [512], [4096]]
    assert data["groups"][2]["error"] == "no memory"
    assert [chart["id"] for chart in data["charts"]] == ["bars", "key", "latency"]
    (points,) = (chart["data"] for chart in data["charts"] if chart["id"] == "key")
    assert [(point["x"], point["tps"]) for point in points] == [(64, 330.0), (512, 110.0)]
    (spec,) = (chart["spec"] for chart in data["charts"] if chart["id"] == "key")
    assert spec["encoding"]["x"]["scale"]["type"] == "log"  # powers of two
    assert set(data["timelines"]) == {"a", "a2", "b"}
    assert "A CPU" in text and "4, 3 of them ok" in text and "a, the oldest" in text
    assert f"wrote {tmp_path / 'page.html'}" in capsys.readouterr().err


def test_settings_that_nobody_varied_have_no_chart(tmp_path: Path) -> None:
    found_out = {"kernels": "torch", "git_commit": "c0ffee" * 6}
    run(tmp_path, "a", 100.0, **found_out)
    run(tmp_path, "b", 330.0, token_budget=64, kernels="native", git_commit="beef" * 10)
    run(tmp_path, "c", 200.0, asked="-m model=large", token_budget=64, model="large", **found_out)
    data = data_of(page(tmp_path))
    assert set(data["keys"]) == {"model", "engine.token_budget", "engine.kernels", "git_commit"}
    assert [chart["title"] for chart in data["charts"] if chart["id"] == "key"] == ["model"]
    record = json.loads((tmp_path / "b" / "record.json").read_text())
    record["round"] = {"series": "s", "number": 1, "varied": ["engine.token_budget=64"]}  # a search's choice
    (tmp_path / "b" / "record.json").write_text(json.dumps(record))
    titles = [chart["title"] for chart in data_of(page(tmp_path))["charts"] if chart["id"] == "key"]
    assert titles == ["model", "engine.token_budget"]
    shutil.rmtree(tmp_path / "b")  # now nobody knows
    assert len([chart for chart in data_of(page(tmp_path))["charts"] if chart["id"] == "key"]) == 4


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    run(tmp_path, "a")
    text = page(tmp_path)
    elements = _Elements(text)
    assert not [name for name, _ in elements.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert not {"link", "img", "iframe", "object", "base"} & set(elements.names)
    assert "default-src 'none'" in text and "@import" not in text and "url(" not in text.split("</style>")[0]
    assert "window.vegaEmbed=" in text


def test_text_of_a_run_is_inert(tmp_path: Path) -> None:
    run(tmp_path, "a", model=HOSTILE)
    run(tmp_path, "b", model="small", engine=HOSTILE)
    run(tmp_path, "c", status="failed", error=HOSTILE, model="large")
    text = page(tmp_path)
    elements = _Elements(text)
    assert elements.names.count("script") == 3 and "img" not in elements.names
    assert text.count("onerror=alert(1)") == text.count("img src=x onerror=alert(1)")
    data = data_of(text)
    shown = HOSTILE.replace("\u2028", "").strip()
    assert {row["engine"] for row in data["groups"]} == {shown, "fastgen"}
    assert data["groups"][-1]["error"] == shown
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;" in text  # in the warning that another model ran


def test_a_page_is_replaced_whole(tmp_path: Path) -> None:
    run(tmp_path, "a")
    (tmp_path / "page.html").write_text("something else")
    assert page(tmp_path).startswith("<!doctype html>")
    assert not list(tmp_path.glob(".page*"))


def test_csv_and_a_page_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "a")
    page(tmp_path, "--csv")
    assert capsys.readouterr().out.splitlines()[0].startswith("run_id,")


def test_all_groups_are_in_the_page_and_few_in_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(5):
        run(tmp_path, f"run-{number}", 100.0 + number, token_budget=64 + number)
    assert len(data_of(page(tmp_path, "--limit", "2"))["groups"]) == 5
    assert "2 more not shown" in capsys.readouterr().out


@pytest.mark.slow
def test_two_hundred_runs_with_passes_stay_small(tmp_path: Path) -> None:
    for number in range(200):
        run(tmp_path, f"run-{number:03d}", 100.0 + number, passes=400 if number == 0 else 1, token_budget=64 + number)
    long = (tmp_path / "run-000" / "passes.csv").read_bytes()
    for number in range(1, 200):
        (tmp_path / f"run-{number:03d}" / "passes.csv").write_bytes(long)
    text = page(tmp_path)
    data = data_of(text)
    assert len(data["groups"]) == len(data["timelines"]) == 200
    assert len(text.encode()) < 5_000_000


# --- the passes of a run ---


def passes(results: Path, name: str) -> dict[str, list[float]] | None:
    return passes_of(ComparedRun({"run_id": name, "status": "ok"}, {}, results))


def test_few_passes_are_shown_as_they_are(tmp_path: Path) -> None:
    run(tmp_path, "a", passes=2)
    assert passes(tmp_path, "a") == {
        "t": [0.0, 0.5, 1.0],
        "prompt": [8.0, 8.0],
        "decode": [2.0, 2.0],
        "kv": [0.0, 0.5],
        "passes": [2],
    }


def test_many_passes_are_averaged(tmp_path: Path) -> None:
    run(tmp_path, "a", passes=0)
    lines = ["step,started_s,seconds,tokens,prompt_tokens,decode_tokens,sequences,kv_utilisation,waiting"]
    lines += [f"{n},{n},1,{n},{n},0,1,0.5,0" for n in range(10 * BINS)]
    (tmp_path / "a" / "passes.csv").write_text("\n".join(lines))
    found = passes(tmp_path, "a")
    assert found is not None
    assert len(found["prompt"]) == len(found["decode"]) == len(found["kv"]) == BINS and len(found["t"]) == BINS + 1
    assert found["prompt"][:2] == [4.5, 14.5] and found["t"][:2] == [0, 10] and found["t"][-1] == 10 * BINS


@pytest.mark.parametrize("content", [None, "", "step,started_s\n1,2\n", "\x00\x01", "step\n"])
def test_a_run_without_passes_has_no_timeline(tmp_path: Path, content: str | None) -> None:
    run(tmp_path, "a", passes=0)
    if content is not None:
        (tmp_path / "a" / "passes.csv").write_text(content)
    assert passes(tmp_path, "a") is None
    assert data_of(page(tmp_path))["timelines"] == {}


def test_a_torn_last_pass_is_left_out(tmp_path: Path) -> None:
    run(tmp_path, "a", passes=3)
    with open(tmp_path / "a" / "passes.csv", "a") as file:
        file.write("4,1.5,0.")
    found = passes(tmp_path, "a")
    assert found is not None and found["passes"] == [3]


def test_an_engine_without_a_paged_cache_has_no_curve_of_it(tmp_path: Path) -> None:
    run(tmp_path, "a", passes=0)
    recorder_table = "step,started_s,seconds,tokens,prompt_tokens,decode_tokens,sequences,kv_utilisation,waiting\n"
    (tmp_path / "a" / "passes.csv").write_text(recorder_table + "1,0,1,10,8,2,1,,\n")
    found = passes(tmp_path, "a")
    assert found is not None and found["kv"] == [] and found["decode"] == [2.0]


# --- in a browser ---


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_draws_it_without_complaint(tmp_path: Path) -> None:
    run(tmp_path, "a", 100.0, model=HOSTILE)
    run(tmp_path, "a2", 120.0, model=HOSTILE)
    run(tmp_path, "b", 330.0, token_budget=64)
    run(tmp_path, "c", status="failed", error=HOSTILE, token_budget=128)
    text = page(tmp_path)
    # Sorts by run id, then chooses the second run, as a reader would.
    clicks = "document.querySelectorAll('th button')[0].click(); document.querySelectorAll('td button')[1].click();"
    (tmp_path / "clicked.html").write_text(f"<script>{clicks}</script></body>".join(text.rsplit("</body>", 1)))
    assert CHROMIUM is not None
    line = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
        *("--virtual-time-budget=8000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"),
        (tmp_path / "clicked.html").as_uri(),
    ]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    table = done.stdout.split("<tbody>")[1].split("</tbody>")[0]
    assert re.findall(r"<tr class=\"([^\"]*)\"", table) == ["baseline ", "chosen", "failed"]
    assert re.findall(r"<button type=\"button\">(\w+)</button>", table) == ["a", "b"]
    assert 'aria-sort="ascending"' in done.stdout
    assert _Elements(done.stdout).names.count("svg") == 6  # bars, model, token_budget, latency, tokens a pass, KV cache
    assert "img" not in _Elements(done.stdout).names
