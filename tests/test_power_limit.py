"""``power_limit_w``: what is added up, the verdict over hosts and segments, where it is refused, and a whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.in_process import answered
from support.runs import RANDOM, ROOT, TINY, assert_refused, python

from harness.config.identity import config_hash
from harness.machine.energy import Packages
from harness.machine.power import PowerSeries, unmeasured
from harness.results import segments
from harness.results.power_limit import BROKEN, KEPT, MOMENTS, UNKNOWN, judged, of_segments, sentence


def host(*samples: tuple[float, float], gaps: int = 0, gpus: int = 2, packages: int = 0) -> dict[str, Any]:
    return {"gpus": gpus, "cpu_packages": packages, "gaps": gaps, "samples": [list(sample) for sample in samples]}


# --- one host ---


def test_gpus_and_packages_add_up() -> None:
    series = PowerSeries(1)
    series.add(0.0, [300.0, 310.0], 0.0)  # of the packages nothing is known before a second reading
    series.add(1.0, [400.0, 410.0], 150.0)
    series.add(1.01, [420.0, 410.0], 150.1)  # too soon after it for a difference
    series.add(2.0, [100.0, 100.0], 250.0)
    found = series.summary()
    assert found["samples"] == [[0.0, 610.0], [1.0, 960.0], [1.01, 980.0], [2.0, 300.0]]
    assert (found["gpus"], found["cpu_packages"], found["gaps"]) == (2, 1, 0)


def test_packages_alone_are_power_too() -> None:
    series = PowerSeries(2)
    for time_s, joules in ((0.0, 0.0), (1.0, 80.0), (2.0, 200.0)):
        series.add(time_s, [], joules)
    assert series.summary()["samples"] == [[1.0, 80.0], [2.0, 120.0]]


def test_what_is_not_shown_is_left_out_and_a_silent_gpu_counted() -> None:
    series = PowerSeries(1)
    series.add(0.0, [300.0, None], None)
    series.add(1.0, [300.0, 200.0], None)
    found = series.summary()
    assert (found["samples"], found["cpu_packages"], found["gaps"]) == ([[0.0, 300.0], [1.0, 500.0]], 0, 1)


# --- the verdict ---


def test_the_limit_itself_is_kept_and_a_watt_more_is_not() -> None:
    kept = judged(3000, [host((0.0, 2900.0), (1.0, 3000.0))], 1.0)
    assert (kept["verdict"], kept["peak_w"], kept["peak_at_s"], kept["above"]) == (KEPT, 3000.0, 1.0, 0)
    assert sentence(kept) == "the limit of 3,000 W was kept: 2 GPUs drew at most 3,000 W, 1.0 s into the clock"
    broken = judged(3000, [host((0.0, 2900.0), (1.0, 3001.0), (2.0, 3050.0), packages=1)], 1.0)
    assert (broken["verdict"], broken["above"], broken["moments"]) == (BROKEN, 2, [[1.0, 3001.0], [2.0, 3050.0]])
    assert sentence(broken) == (
        "the limit of 3,000 W was BROKEN in 2 of 3 samples: 2 GPUs and 1 processor package drew at most 3,050 W, "
        "2.0 s into the clock"
    )


def test_hosts_count_together_at_each_moment() -> None:
    # Each is below the limit, and so is each one's peak at another time than the other's.
    found = judged(1000, [host((0.0, 400.0), (1.0, 700.0), (2.0, 400.0)), host((0.1, 500.0), (1.6, 400.0))], 1.0)
    assert (found["peak_w"], found["peak_at_s"], found["verdict"]) == (1200.0, 1.0, BROKEN)
    apart = judged(1000, [host((0.0, 600.0), (1.0, 300.0)), host((0.0, 300.0), (1.1, 600.0))], 1.0)
    assert (apart["peak_w"], apart["verdict"], apart["gpus"]) == (900.0, KEPT, 4)


def test_what_nobody_measured_is_not_kept() -> None:
    for hosts in ([None], [], [host()], [host((0.0, 10.0)), None], [host((0.0, 10.0), gaps=1)]):
        found = judged(1000, hosts, 1.0)
        assert found["verdict"] == UNKNOWN and found["why"]
        assert sentence(found).startswith("whether the limit of 1,000 W was kept is unknown: ")
    assert judged(1000, [host((0.0, 1100.0)), None], 1.0)["verdict"] == BROKEN  # the others cannot have drawn less


def test_of_many_moments_the_first_are_written_down() -> None:
    found = judged(10, [host(*((float(second), 11.0) for second in range(500)))], 1.0)
    assert (found["above"], len(found["moments"])) == (500, MOMENTS)


def test_a_resumed_run_is_judged_whole() -> None:
    low, high = ({"power": judged(1000, [host((0.0, watts), (1.0, 500.0))], 1.0)} for watts in (600.0, 900.0))
    whole = of_segments([low, high], 1000)
    assert whole is not None
    assert (whole["verdict"], whole["peak_w"], whole["samples"]) == (KEPT, 900.0, 4)
    assert of_segments([low, high], None) is None
    stricter = of_segments([high, low], 700)  # the last limit counts
    assert stricter is not None and (stricter["verdict"], stricter["limit_w"]) == (BROKEN, 700)
    killed = of_segments([low, {}, high], 1000)
    assert killed is not None and killed["verdict"] == UNKNOWN and "not all of the run's segments" in sentence(killed)
    nothing = of_segments([{}, {}], 1000)
    assert nothing is not None and nothing["verdict"] == UNKNOWN
    parts = [part | {"elapsed_s": 1.0} for part in (low, high)]
    parts.append({"elapsed_s": 0.0})  # it ended before its clock
    assert segments.whole_run({"segments": parts, "config": {"power_limit_w": 1000}})["power"] == whole


# --- where there is none ---


@pytest.mark.skipif(Packages().joules() is not None, reason="this machine shows what it draws")
def test_a_limit_that_nothing_could_judge_is_refused(tmp_path: Path) -> None:
    assert unmeasured("cpu", 1) is not None
    assert str(unmeasured("cuda", 1)).startswith(("NVML cannot be asked: ", "GPU 0 does not say"))
    done = answered("power_limit_w=3000", "dataset.num_samples=1", f"results_dir={tmp_path}")
    assert_refused(done, "error: power_limit_w: 3000: nothing here measures power: the kernel shows no energy")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["power_limit_w=0"], "error: power_limit_w: 0.0; give watts, such as 3000, or null"),
        (["power_limit_w=nan"], "error: power_limit_w: nan; give watts"),
        (
            ["power_limit_w=10", "engine=simulate", "hardware=h100_80g"],
            "error: power_limit_w: 10: a simulation draws no",
        ),
    ],
)
def test_what_is_no_limit_is_refused(words: list[str], line: str, tmp_path: Path) -> None:
    assert_refused(answered(*words, "dataset.num_samples=1", f"results_dir={tmp_path}"), line)


def test_a_limit_makes_no_other_job() -> None:
    assert config_hash({"power_limit_w": 3000, "model": {}}) == config_hash({"power_limit_w": None, "model": {}})


# --- a whole run ---

WITH_PACKAGES = """
import sys, threading, time
sys.path.insert(0, {root!r})
from pathlib import Path
from harness.machine import energy, telemetry

zones = Path(sys.argv.pop(1))
energy.Packages.__init__.__defaults__ = (zones,)
telemetry.Sampler.__init__.__defaults__ = (*telemetry.Sampler.__init__.__defaults__[:-1], zones)

def draw():  # 120 W
    while True:
        (zones / "intel-rapl:0" / "new").write_text(str(int(time.monotonic() * 120e6)))
        (zones / "intel-rapl:0" / "new").rename(zones / "intel-rapl:0" / "energy_uj")
        time.sleep(0.02)

threading.Thread(target=draw, daemon=True).start()
sys.argv[0] = {root!r} + "/harness/main.py"
exec(compile(Path(sys.argv[0]).read_text(), sys.argv[0], "exec"), {{"__name__": "__main__", "__file__": sys.argv[0]}})
"""


@pytest.mark.slow
@pytest.mark.parametrize(("limit_w", "verdict"), [(5000, "kept"), (10, "broken")])
def test_a_run_has_its_verdict(tmp_path: Path, limit_w: int, verdict: str) -> None:
    zone = tmp_path / "zones" / "intel-rapl:0"
    zone.mkdir(parents=True)
    for name, text in {"name": "package-0", "energy_uj": "0", "max_energy_range_uj": str(2**62)}.items():
        (zone / name).write_text(text)
    (tmp_path / "main.py").write_text(WITH_PACKAGES.format(root=str(ROOT)))
    job = [*TINY, *RANDOM, "dataset.num_samples=400", "dataset.input_len=16", "dataset.output_len=30"]
    results = tmp_path / "results"
    words = [str(tmp_path / "main.py"), str(tmp_path / "zones"), *job, f"power_limit_w={limit_w}"]
    done = python(*words, f"results_dir={results}")
    assert done.returncode == 0, done.stderr  # a run that broke its limit is a run
    (place,) = results.glob("*/record.json")
    record = json.loads(place.read_text())
    power = record["power"]
    assert (record["status"], power["verdict"], power["limit_w"]) == ("ok", verdict, limit_w)
    assert power["cpu_packages"] == 1 and power["samples"] >= 1 and 60 < power["peak_w"] < 5000
    assert (power["above"] > 0) == (verdict == "broken")
    shown = " ".join(done.stdout.split())
    assert f"the limit of {limit_w:,} W was {'kept' if verdict == 'kept' else 'BROKEN'}" in shown
