"""What a run's telemetry says, held against real processes, real files, and NVML's own bindings."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from support.runs import RANDOM, ROOT, TINY, Run

from harness.machine import device
from harness.machine.energy import Packages
from harness.machine.meters import HOST_COLUMNS
from harness.machine.telemetry import Sampler, across_hosts
from harness.results.appending import PassesFile
from harness.results.columns import COLUMNS
from harness.results.completions import percentile
from harness.results.passes import pass_figures, pass_rows
from harness.results.summary import summary as show
from harness.running.sampling import ranks_here
from harness.workload.records import PASS_COLUMNS, PassRecord


def table(path: Path) -> list[dict[str, str]]:
    rows = list(csv.reader(path.read_text().splitlines()))
    assert all(len(row) == len(rows[0]) for row in rows)
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def ticking() -> Callable[[], float]:
    """Returns a clock that is one second later each time it is read: first when the run's clock starts."""
    count = itertools.count()
    return lambda: float(next(count))


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def sampled(sampler: Sampler, clock: Callable[[], float], samples: int, series: Path) -> list[dict[str, str]]:
    """Takes some samples before the clock and at least ``samples`` within it; returns the series."""
    sampler.start()
    until(lambda: series.exists() and len(table(series)) >= 2)
    sampler.clock_started(clock)
    until(lambda: len([row for row in table(series) if row["time_s"]]) >= samples)
    sampler.stop()
    return table(series)


# --- one host ---


def test_a_sample_is_what_the_system_says(tmp_path: Path) -> None:
    me = psutil.Process()
    sampler = Sampler(tmp_path / "t.csv", processes=[me, me], interval_s=0.02, powercap=tmp_path)
    rows = sampled(sampler, ticking(), 4, tmp_path / "t.csv")
    assert tuple(rows[0]) == ("time_s", *HOST_COLUMNS)
    assert rows[0]["time_s"] == rows[1]["time_s"] == ""  # before the clock
    within = [row for row in rows if row["time_s"]]
    assert [float(row["time_s"]) for row in within] == list(range(1, len(within) + 1))
    total = psutil.virtual_memory().total
    for row in rows:
        assert 0 < int(row["host_memory_used_bytes"]) < total
        assert 0 < int(row["host_memory_available_bytes"]) < total
        assert row["cpu_energy_j"] == ""
        assert row["cpu_utilisation"] == "" or 0 <= float(row["cpu_utilisation"]) <= 1
    assert int(rows[-1]["ranks_memory_bytes"]) == pytest.approx(2 * me.memory_info().rss, rel=0.2)
    seen = sampler.summary(float(len(within)))
    assert seen["samples"] == len(within)
    assert seen["host_memory_used_peak_bytes"] == max(int(row["host_memory_used_bytes"]) for row in rows)
    assert seen["host_memory_available_least_bytes"] == min(int(row["host_memory_available_bytes"]) for row in rows)
    resident = [int(row["ranks_memory_bytes"]) for row in within]  # a second apart, so the trapezoid rule is this:
    mean = (sum(resident) - (resident[0] + resident[-1]) / 2) / (len(resident) - 1)
    assert seen["ranks_memory_mean_bytes"] == pytest.approx(mean)
    assert seen["cpu_energy_j"] is None and seen["gpus"] == [] and seen["notes"] == []


def test_the_sampler_s_own_cost_is_its_thread_s(tmp_path: Path) -> None:
    sampler = Sampler(interval_s=0.05, powercap=tmp_path)
    sampler.start()
    started = time.perf_counter()
    sampler.clock_started(lambda: time.perf_counter() - started)
    while sampler._samples < 8:  # this thread takes a whole core, which is no cost of the sampler's
        sum(range(1000))
    sampler.stop()
    share = sampler.summary(time.perf_counter() - started)["sampler_cpu_share"]
    assert 0 < share < 0.5


def test_a_crash_leaves_the_series_readable(tmp_path: Path) -> None:
    series = tmp_path / "t.csv"
    script = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from harness.machine.telemetry import Sampler

sampler = Sampler(Path({str(series)!r}), interval_s=0.001)
sampler.start()
sampler.clock_started(time.monotonic)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    until(lambda: series.exists() and series.read_bytes().count(b"\n") > 20)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = table(series)
    assert float(rows[-1]["time_s"]) > float(rows[1]["time_s"] or 0)
    # A line that a power cut tore is cut off when the run is resumed.
    with open(series, "a") as file:
        file.write("99999")
    go_on = Sampler(series, interval_s=0.01)
    go_on.start()
    until(lambda: len(table(series)) > len(rows) if b"99999" not in series.read_bytes() else False)
    go_on.stop()
    assert table(series)[: len(rows)] == rows
    assert series.read_text().count("time_s") == 1


def test_a_full_disk_ends_the_series_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "t.csv").symlink_to("/dev/full")
    sampler = Sampler(tmp_path / "t.csv", interval_s=0.01)
    sampler.start()
    sampler.clock_started(ticking())
    until(lambda: sampler._samples >= 3)
    sampler.stop()
    seen = sampler.summary(10.0)
    assert seen["samples"] >= 3
    assert [note.partition(": ")[0] for note in seen["notes"]] == ["the series ends early"]
    assert "No space left on device" in seen["notes"][0]


def test_a_sampler_that_fails_leaves_a_note_and_no_energy(tmp_path: Path) -> None:
    packages(tmp_path, {"intel-rapl:0": ("package-0", 5, 100)})
    sampler = Sampler(interval_s=0.01, powercap=tmp_path)
    sampler.start()
    answers = iter([0.0, 1.0, 2.0])
    sampler.clock_started(lambda: next(answers))  # StopIteration at the third sample
    sampler._thread.join(60)
    sampler.stop()
    sampler.stop()
    seen = sampler.summary(3.0)
    assert seen["notes"][0].startswith("sampling ended early: StopIteration")
    assert seen["cpu_energy_j"] is None


def test_a_sampler_that_never_started_says_nothing(tmp_path: Path) -> None:
    sampler = Sampler(tmp_path / "t.csv", powercap=tmp_path)
    sampler.stop()
    assert sampler.summary(1.0)["samples"] == 0
    assert across_hosts([sampler.summary(1.0)], "cpu")["energy_j"] is None


def test_a_missing_library_is_a_note(tmp_path: Path) -> None:
    sampler = Sampler(tmp_path / "t.csv", gpus=["0000:ff:1f.7"], interval_s=0.01)
    sampler.start()
    until(lambda: (tmp_path / "t.csv").exists() and len(table(tmp_path / "t.csv")) > 1)
    sampler.stop()
    seen = sampler.summary(1.0)
    assert len(seen["notes"]) == 1 and seen["notes"][0].startswith("GPUs are not sampled: ")
    assert across_hosts([seen], "cuda")["energy_j"] is None


def test_this_rank_alone_is_sampled_where_nothing_says_who_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.ranks.rank import Rank

    assert ranks_here(Rank()) == [psutil.Process()]
    monkeypatch.setenv("MASTER_PORT", "1")
    assert ranks_here(Rank(0, 2, 0, 2)) == [psutil.Process()]


# --- processor packages ---


def packages(directory: Path, zones: dict[str, tuple[str, int, int]]) -> None:
    """Writes power zones as the kernel shows them: name, microjoules, and the highest of these."""
    for zone, (name, energy, highest) in zones.items():
        (directory / zone).mkdir(exist_ok=True)
        (directory / zone / "name").write_text(f"{name}\n")
        (directory / zone / "energy_uj").write_text(f"{energy}\n")
        (directory / zone / "max_energy_range_uj").write_text(f"{highest}\n")


def test_packages_add_up_and_their_counters_start_again(tmp_path: Path) -> None:
    others = {
        "intel-rapl:0:0": ("core", 1, 10**9),  # within package 0
        "intel-rapl:2": ("psys", 1, 10**9),  # around them all
        "intel-rapl-mmio:0": ("package-0", 1, 10**9),  # package 0 once more
    }
    packages(
        tmp_path,
        others | {"intel-rapl:0": ("package-0", 5_000_000, 10**9), "intel-rapl:1": ("package-1", 999_000_000, 10**9)},
    )
    (tmp_path / "intel-rapl").mkdir()  # the control type itself
    counted = Packages(tmp_path)
    assert len(counted) == 2
    assert counted.joules() == 0
    packages(
        tmp_path,
        {zone: (name, 500_000_000, highest) for zone, (name, _, highest) in others.items()}
        | {"intel-rapl:0": ("package-0", 7_000_000, 10**9), "intel-rapl:1": ("package-1", 499_999, 10**9)},
    )
    assert counted.joules() == pytest.approx(2 + 1.5)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()  # as unreadable as to anyone but root
    assert counted.joules() is None
    packages(tmp_path, {"intel-rapl:1": ("package-1", 1_000_000, 10**9)})
    assert counted.joules() is None  # what went by meanwhile is not known
    assert Packages(tmp_path / "nowhere").joules() is None


def test_energy_is_of_the_clock_alone(tmp_path: Path) -> None:
    packages(tmp_path, {"intel-rapl:0": ("package-0", 1_000_000, 10**9)})
    series = tmp_path / "t.csv"
    sampler = Sampler(series, interval_s=0.02, powercap=tmp_path)
    sampler.start()
    until(lambda: series.exists() and len(table(series)) >= 2)
    packages(tmp_path, {"intel-rapl:0": ("package-0", 50_000_000, 10**9)})  # while loading
    count = len(table(series))
    until(lambda: len(table(series)) > count + 1)
    sampler.clock_started(ticking())
    until(lambda: table(series)[-1]["time_s"])
    packages(tmp_path, {"intel-rapl:0": ("package-0", 62_000_000, 10**9)})
    count = len(table(series))
    until(lambda: len(table(series)) > count + 1)
    sampler.stop()
    rows = table(series)
    assert {row["cpu_energy_j"] for row in rows if not row["time_s"]} == {""}
    assert float(rows[-1]["cpu_energy_j"]) == 12
    # The clock was read once at its start (0) and once a sample: 12 J from the first sample to the last one.
    last = float(rows[-1]["time_s"])
    whole = across_hosts([sampler.summary(last + 1)], "cpu")
    assert whole["energy_j"] == pytest.approx(12 * (last + 1) / (last - 1))
    assert whole["energy_source"] == "rapl"
    assert across_hosts([sampler.summary()], "cpu")["energy_j"] is None  # a run that did not come to its end
    assert across_hosts([sampler.summary(last)], "cuda")["energy_j"] is None  # not the GPUs'


# --- GPUs, through NVIDIA's bindings and a driver of our own making ---

DRIVER = r"""
#include <cstdlib>
#include <cstring>
#include <cstdio>
// Two GPUs, which NVML finds by their buses; CUDA numbers them the other way round.
static const char* buses[] = {"0000:01:00.0", "0000:81:00.0"};
static unsigned long long energy[2] = {5000000, 9000000};
struct Memory { unsigned long long total, free, used; };
struct Utilization { unsigned gpu, memory; };
extern "C" {
int cuInit(unsigned) { return 0; }
int cuDeviceGetCount(int* count) { *count = 2; return 0; }
int cuDeviceGet(int* device, int number) { *device = number; return 0; }
int cuDeviceGetPCIBusId(char* name, int size, int device) { snprintf(name, size, "%s", buses[1 - device]); return 0; }
int nvmlInitWithFlags(unsigned) { return 0; }
int nvmlShutdown() { return 0; }
const char* nvmlErrorString(int) { return "Not Supported"; }
int nvmlDeviceGetHandleByPciBusId_v2(const char* bus, long* handle) {
  for (long n = 0; n < 2; n++) if (!strcmp(bus, buses[n])) { *handle = n + 1; return 0; }
  return 6;
}
int nvmlDeviceGetMemoryInfo(long gpu, Memory* m) { *m = {80ull << 30, 0, gpu << 30}; return 0; }
int nvmlDeviceGetUtilizationRates(long gpu, Utilization* u) { *u = {(unsigned)gpu * 40, 1}; return 0; }
int nvmlDeviceGetPowerUsage(long gpu, unsigned* milliwatts) { *milliwatts = 100000 * gpu; return 0; }
int nvmlDeviceGetClockInfo(long gpu, int kind, unsigned* mhz) { *mhz = kind == 1 ? 1500 + gpu : 0; return 0; }
int nvmlDeviceGetCurrentClocksThrottleReasons(long gpu, unsigned long long* reasons) {
  *reasons = gpu == 2 ? 0x4 | 0x40 | 0x1 : 0x1; return 0;
}
// Every reading is a joule later; the temperature is not to be had at all.
int nvmlDeviceGetTotalEnergyConsumption(long gpu, unsigned long long* millijoules) {
  if (getenv("NO_COUNTER") && (gpu == 1 || !strcmp(getenv("NO_COUNTER"), "both"))) return 3;
  *millijoules = energy[gpu - 1] += 1000 * gpu; return 0;
}
}
"""
ON_GPUS = """
import itertools, json, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from harness.machine.energy import bus_ids
from harness.machine.telemetry import Sampler, across_hosts

series = Path({series!r})
sampler = Sampler(series, bus_ids({count}), interval_s=0.01, powercap=series.parent)
sampler.start()
count = itertools.count()
started = time.perf_counter()
clock = (lambda: float(next(count))) if {ticking} else (lambda: time.perf_counter() - started)
sampler.clock_started(clock)
while sampler._samples < 40:
    time.sleep(0.01)
sampler.stop()
clock_s = sampler._samples if {ticking} else clock()
print(json.dumps([bus_ids(None), clock_s, across_hosts([sampler.summary(clock_s)], "cuda")]))
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a driver library that answers for two GPUs."""
    pytest.importorskip("pynvml")
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    place = tmp_path_factory.mktemp("driver")
    (place / "driver.cpp").write_text(DRIVER)
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        subprocess.run(["g++", "-shared", "-fPIC", "-o", place / name, place / "driver.cpp"], check=True)
    return place


def on_gpus(driver: Path, series: Path, count: int | None = None, ticking: bool = True, **variables: str) -> Any:
    script = ON_GPUS.format(root=str(ROOT), series=str(series), count=count, ticking=ticking)
    place = os.pathsep.join([str(driver), os.environ.get("LD_LIBRARY_PATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"LD_LIBRARY_PATH": place} | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_gpus_are_sampled_as_cuda_numbers_them(driver: Path, tmp_path: Path) -> None:
    buses, clock_s, whole = on_gpus(driver, tmp_path / "t.csv")
    assert buses == ["0000:81:00.0", "0000:01:00.0"]
    (host,) = whole["hosts"]
    assert host["notes"] == []
    first, second = host["gpus"]
    # A joule a reading of NVML's first GPU, two of its second, which is CUDA's first.
    assert (first["energy_j"], second["energy_j"]) == pytest.approx((2 * clock_s, clock_s))
    assert whole["energy_j"] == pytest.approx(3 * clock_s)
    assert whole["energy_source"] == first["energy_source"] == "nvml counter"
    assert (first["memory_used_peak_bytes"], second["memory_used_mean_bytes"]) == (2 * 2**30, 2**30)
    assert (first["utilisation_mean"], second["utilisation_mean"]) == pytest.approx((0.8, 0.4))
    assert (first["power_mean_w"], first["power_peak_w"], second["power_peak_w"]) == pytest.approx((200, 200, 100))
    assert (first["sm_clock_least_mhz"], first["temperature_peak_c"]) == (1502, None)
    assert (first["throttled_share"], second["throttled_share"]) == (
        {"sw_power_cap": 1.0, "hw_thermal_slowdown": 1.0},
        {},
    )
    last = table(tmp_path / "t.csv")[-1]
    assert last["gpu0_throttled"] == "sw_power_cap|hw_thermal_slowdown"
    assert (last["gpu1_memory_used_bytes"], last["gpu1_temperature_c"]) == (str(2**30), "")
    assert float(last["gpu1_energy_j"]) == host["samples"] - 1


def test_only_the_gpus_of_this_host_s_ranks_are_sampled(driver: Path, tmp_path: Path) -> None:
    _, clock_s, whole = on_gpus(driver, tmp_path / "t.csv", count=1)
    assert len(whole["hosts"][0]["gpus"]) == 1
    assert whole["energy_j"] == pytest.approx(2 * clock_s)


def test_without_a_counter_power_is_added_up(driver: Path, tmp_path: Path) -> None:
    _, clock_s, whole = on_gpus(driver, tmp_path / "t.csv", ticking=False, NO_COUNTER="both")
    assert whole["energy_source"] == "nvml power, integrated"
    assert whole["energy_j"] == pytest.approx(300 * clock_s, rel=0.25)  # 100 W and 200 W


# --- several hosts ---


def host(energy: float | None, gpus: int = 0) -> dict[str, Any]:
    return {
        "cpu_energy_j": energy,
        "gpus": [{"energy_j": energy, "energy_source": "nvml counter"}] * gpus,
        "gpus_expected": gpus,
        "sampler_cpu_share": 0.001 * (gpus + 1),
        "others_cpu": {"share": 0.01 * gpus},
    }


def test_hosts_add_up_and_one_unknown_makes_the_whole_unknown() -> None:
    assert across_hosts([host(5.0), host(7.5)], "cpu")["energy_j"] == 12.5
    assert across_hosts([host(5.0, 4), host(7.5, 2)], "cuda")["energy_j"] == 35.0
    assert across_hosts([host(5.0, 4), host(7.5, 2)], "cuda")["sampler_cpu_share"] == 0.005
    assert across_hosts([host(5.0, 4), host(7.5, 2)], "cuda")["others_cpu_share"] == 0.04
    assert across_hosts([host(5.0, 4), None], "cuda")["others_cpu_share"] is None
    for hosts in ([host(5.0), host(None)], [host(5.0), None], [], [host(0.0)]):
        assert across_hosts(hosts, "cpu")["energy_j"] is across_hosts(hosts, "cpu")["energy_source"] is None
    missing = host(5.0, 2) | {"gpus_expected": 3}
    assert across_hosts([missing], "cuda")["energy_j"] is None
    assert across_hosts([host(5.0)], "cuda")["energy_j"] is None  # no GPU at all


# --- whole runs ---


@pytest.mark.slow
def test_a_run_records_what_the_machine_did(harness: Callable[..., Run]) -> None:
    job = ["dataset.num_samples=200", "dataset.input_len=30", "dataset.output_len=20", "parallel.dp=2"]
    run = harness(*TINY, *RANDOM, *job, cold=True)  # forks would have memory in common
    assert run.status == 0, run.stderr
    record, rows = run.record, table(run.directory / "telemetry.csv")
    measured = record["telemetry"]
    (seen,) = measured["hosts"]
    assert 0 < measured["sampler_cpu_share"] == seen["sampler_cpu_share"] < 1
    assert seen["samples"] == len([row for row in rows if row["time_s"]]) >= 2  # at the clock's start and its end
    assert rows[0]["time_s"] == "" and rows[0]["ranks_memory_bytes"]  # from before the model was loaded
    assert float(rows[-1]["time_s"]) >= max(line["finished_s"] for line in run.completions.values())
    assert seen["ranks_memory_peak_bytes"] > record["peak_memory_bytes"]  # of both ranks, the other is of one
    assert run.row["energy_j"] == ("" if measured["energy_j"] is None else format(measured["energy_j"], ".6g"))
    passes = table(run.directory / "passes.csv")
    took = [float(row["seconds"]) for row in passes]
    assert record["passes"] == {
        "count": len(passes),
        "seconds_p50": percentile(took, 50),
        "seconds_p99": percentile(took, 99),
        "seconds_max": max(took),
        "tokens_p50": percentile([float(row["tokens"]) for row in passes], 50),
    }


def test_passes_of_a_torn_table_are_those_that_are_whole(tmp_path: Path) -> None:
    header = ",".join(PASS_COLUMNS)
    (tmp_path / "p.csv").write_text(f"{header}\n1,0,0.5,10,8,2,1,,,,,,\n2,0,1.5,30,8,2,1,,,,,,\n3,0,9.0,3")
    assert pass_figures(tmp_path / "p.csv") == {
        "count": 2,
        "seconds_p50": 1.0,
        "seconds_p99": 1.49,
        "seconds_max": 1.5,
        "tokens_p50": 20.0,
    }
    (tmp_path / "p.csv").write_text(f"{header}\n")
    assert pass_figures(tmp_path / "p.csv") is None
    assert pass_figures(tmp_path / "nothing.csv") is None


def test_passes_of_an_older_version_are_read_and_keep_their_columns(tmp_path: Path) -> None:
    path = tmp_path / "passes.csv"
    path.write_text("step,started_s,seconds,tokens\n1,0,0.5,10\n2,1,1.5,30\n")
    file = PassesFile(tmp_path)
    file.add(PassRecord(1, 3.0, 2.5, 50, 50, 0, 1, 0.5, 0, 1, 50, 1275))
    file.close()
    assert path.read_text().splitlines()[-1] == "3,3,2.5,50"
    assert list(pass_rows(path, "tokens", "seconds")) == [(10, 0.5), (30, 1.5), (50, 2.5)]
    assert list(pass_rows(path, "tokens", "logit_rows")) == []
    figures = pass_figures(path)
    assert figures is not None and (figures["count"], figures["tokens_p50"]) == (3, 30)


@pytest.mark.parametrize(("energy", "line"), [(2000.0, "2,000 J, 2.50 total tokens/J (rapl)"), (None, "")])
def test_the_summary_shows_energy_where_it_is_known(energy: float | None, line: str) -> None:
    row = dict.fromkeys(COLUMNS) | {"total_tokens": 5000, "prompt_tokens": 1, "output_tokens": 1, "elapsed_s": 1.0}
    row |= {"total_tokens_per_s": 5000.0, "output_tokens_per_s": 1.0, "requests_per_s": 1.0, "energy_j": energy}
    row |= {"tokens_per_joule": energy and 5000 / energy}
    screen = Console(file=io.StringIO(), width=200)
    show(screen, row, {"telemetry": {"energy_source": "rapl"}, "directory": "d", "results_dir": "r"})
    said = screen.file.getvalue()  # type: ignore[attr-defined]
    assert ("Energy" in said) == bool(line)
    assert line in said


@pytest.mark.gpu
@pytest.mark.skipif(device.accelerator() != "cuda", reason="needs a GPU")
def test_a_gpu_run_has_its_gpu_in_it(harness: Callable[..., Run]) -> None:
    job = ["dataset.num_samples=64", "dataset.input_len=30", "dataset.output_len=200", "engine.kernels=torch"]
    run = harness(*TINY, *RANDOM, *job, DS_ACCELERATOR="cuda")
    assert run.status == 0, run.stderr
    measured = run.record["telemetry"]
    (gpu,) = measured["hosts"][0]["gpus"]
    assert measured["hosts"][0]["notes"] == []
    assert gpu["memory_used_peak_bytes"] > 2**20
    assert 0 < gpu["power_mean_w"] <= gpu["power_peak_w"]
    assert measured["energy_j"] == pytest.approx(gpu["power_mean_w"] * float(run.row["elapsed_s"]), rel=0.5)
    assert float(run.row["energy_j"]) == pytest.approx(measured["energy_j"], rel=1e-5)
