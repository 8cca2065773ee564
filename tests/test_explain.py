"""``harness.plan --explain``: which cause costs a run the most, and parts that add up."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.passes import KNOWN, recorded, replayed, works

from harness.engines.simulate.replay import Item, Setup
from harness.plan import __main__ as plan

MACHINE = ["hardware.peak_flops.float32=1e11", "hardware.memory_bandwidth=2e10"]
PLAIN = Setup(token_budget=512, max_sequences=32, block_size=64, blocks=1000)
TWO = replace(PLAIN, replicas=2, lookahead=4)


def items(count: int) -> list[Item]:
    """Returns requests as ``engine.order=longest_first`` has them."""
    rng = random.Random(1)
    drawn = [Item(uid, rng.randint(20, 400), 0, rng.randint(10, 200)) for uid in range(count)]
    return sorted((item._replace(max_new_tokens=item.output_tokens) for item in drawn), key=lambda i: -i.output_tokens)


def explained(tmp_path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert plan.main(["--explain", "run", "--results-dir", str(tmp_path), "--json", *MACHINE, *words]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("setup", "cause", "least"),
    [
        (replace(PLAIN, blocks=20), "kv_cache", 0.1),
        (replace(TWO, slow=(1.0, 2.0)), "imbalance", 0.2),
        (replace(TWO, slow=(2.0, 1.0)), "imbalance", 0.2),
        (replace(PLAIN, token_budget=64), "token_budget", 0.0),
    ],
)
def test_the_one_cause_of_a_run_is_named_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setup: Setup, cause: str, least: float
) -> None:
    # A pass costs by itself what it does on a CPU with these kernels, so that small passes are worth avoiding.
    factors = replace(KNOWN, launch_s=1e-3)
    replayed(tmp_path, "run", items(64), setup, factors)
    found = explained(tmp_path, capsys)
    assert found["first"] == cause
    parts = {part["key"]: part for part in found["parts"]}
    assert parts[cause]["before_s"] - parts[cause]["after_s"] > least * found["parts"][0]["before_s"]
    # The passes are those of the model, so that nothing is left to explain, and the parts add up to the whole gap.
    assert abs(parts["rest"]["before_s"] - parts["rest"]["after_s"]) < 0.03 * parts["rest"]["before_s"]
    gap = found["limit_tokens_per_s"] - found["measured_tokens_per_s"]
    assert sum(part["tokens_per_s"] for part in found["parts"]) == pytest.approx(gap, rel=1e-6)
    if cause == "kv_cache":
        assert found["changes"][0]["setting"].startswith("engine.kv_memory")
        assert found["changes"][0]["gain"] > 0.05


def test_without_that_cause_it_is_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replayed(tmp_path, "run", items(64), TWO, replace(KNOWN, launch_s=1e-3))
    found = explained(tmp_path, capsys)
    assert found["first"] in ("tail", "unfilled")
    parts = {part["key"]: part["before_s"] - part["after_s"] for part in found["parts"]}
    assert parts["kv_cache"] == 0
    assert parts["imbalance"] < 0.05 * found["parts"][0]["before_s"]
    # The limit is the arithmetic of the requests at the peak of both ranks, told by the run's own passes.
    work = sum((item.prompt_tokens + item.output_tokens - 1) * 2 * 106_168_320 for item in items(64))
    limit_s = found["total_tokens"] / found["limit_tokens_per_s"]
    assert work / 2e11 < limit_s < 1.4 * work / 2e11


def test_the_page_has_the_bars_and_nothing_to_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replayed(tmp_path, "run", items(40), PLAIN)
    page = tmp_path / "page.html"
    assert plan.main(["--explain", str(tmp_path / "run"), "--html", str(page), *MACHINE]) == 0
    said = capsys.readouterr().out
    assert "Costs most of what settings decide" in said and "measured" in said and "% of the limit" in said
    written = page.read_text()
    data = json.loads(written.split('id="data">')[1].split("</script>")[0])
    bars = data["rows"]
    assert [bars[0]["title"], bars[-1]["title"]] == ["limit", "measured"]
    for above, below in pairwise(bars):  # each begins where the one before ends
        assert {above["low"], above["high"]} & {below["low"], below["high"]}
    assert "http://" not in written.split("<script>")[0] and "src=" not in written.split("<script>")[0]


@pytest.mark.parametrize(
    ("kinds", "words", "message"),
    [
        ("d", ["--explain", "run"], "run has passes of one kind only"),
        ("pmd", ["--explain", "none"], "'none' is no run of"),
        ("pmd", ["--explain", "run"], "run does not say how many blocks"),
    ],
)
def test_runs_that_say_too_little_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kinds: str, words: list[str], message: str
) -> None:
    recorded(tmp_path, "run", works(30, 256, 1, kinds), seed=1)
    assert plan.main([*words, "--results-dir", str(tmp_path), *MACHINE]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --explain: {message}") and error.count("\n") == 1


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_simulated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(["--explain", "no-run", "--html", str(tmp_path / "none" / "page.html")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --html: ") and "cannot be written" in error and error.count("\n") == 1
