"""What ``compare`` says of runs that were disturbed, and of those that did not keep their power limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.made_runs import comparison
from support.made_runs import run as made

from harness.compare.__main__ import main as compare
from harness.results.power_limit import judged


def limit(watts: float) -> dict[str, Any]:
    return judged(3000, [{"gpus": 8, "cpu_packages": 0, "gaps": 0, "samples": [[1.0, watts]]}], 1.0)


def test_disturbed_runs_are_named_from_five_percent_on(tmp_path: Path) -> None:
    for name, share in (("quiet", 0.049), ("noisy", 0.3), ("worse", 0.5), ("unknown", None)):
        made(tmp_path, name, others_cpu_share=share)
    made(tmp_path, "failed", status="failed", error="x", others_cpu_share=0.9, late=True)
    assert comparison(tmp_path).cautions == [
        "2 of 4 runs were not alone on their machine: other processes took up to 50.0% of the CPU time "
        "of a run's cores (worse)"
    ]


def test_a_broken_limit_is_named_and_a_kept_one_is_not(tmp_path: Path) -> None:
    made(tmp_path, "kept", power=limit(2999.0))
    made(tmp_path, "none", power=None)
    assert comparison(tmp_path).cautions == []
    for number in range(6):
        made(tmp_path, f"broken{number}", power=limit(3001.0 + number))
    found = comparison(tmp_path).cautions
    assert len(found) == 5
    assert found[0].startswith(
        "broken0: the limit of 3,000 W was BROKEN in 1 of 1 samples: 8 GPUs drew at most 3,001 W"
    )
    assert found[-1] == "2 more runs did not keep their power limit, or cannot tell"


def test_they_stand_in_the_text_the_json_and_on_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path, "broken", power=limit(3210.0), others_cpu_share=0.25)
    assert compare([str(tmp_path), "--html", str(tmp_path / "page.html")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "! broken: the limit of 3,000 W was BROKEN" in said
    assert "! 1 of 1 runs were not alone on their machine" in said
    assert "the limit of 3,000 W was BROKEN" in (tmp_path / "page.html").read_text()
    assert compare([str(tmp_path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["cautions"]) == 2
