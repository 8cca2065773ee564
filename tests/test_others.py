"""CPU time that others took: of the kernel's counts, of real processes beside real work, and what is said of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.runs import RANDOM, TINY, Run

from harness.machine import cgroups, others
from harness.machine.others import TICKS, OthersMeter
from harness.ranks.rank import PARENT_VARIABLE
from harness.results import segments
from harness.results.disturbance import notes
from harness.running.sampling import launchers_here

BUSY = "import os, sys\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(100000))\n"


def shown(directory: Path, cores: dict[int, tuple[float, float]]) -> Path:
    """Writes a ``/proc`` in which each core has worked for so many seconds, and so many more were stolen from it."""
    lines = ["cpu  9 9 9 9 9 9 9 9 9 9"]
    for core, (worked, stolen) in cores.items():
        parts = [int(worked * TICKS / 2), 0, int(worked * TICKS / 2), 10**6, 77, 88, 99, int(stolen * TICKS)]
        lines.append(f"cpu{core} {' '.join(map(str, parts))} 0 0")
    (directory / "stat").write_text("\n".join([*lines, "intr 1 2 3", ""]))
    return directory


class Mine(psutil.Process):
    """This process, with as much CPU time as a test gives it."""

    seconds = 0.0

    def cpu_times(self) -> Any:
        return super().cpu_times()._replace(user=self.seconds, system=0.0, children_user=0.0, children_system=0.0)


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 3})


def measured(
    place: Path, before: dict[int, tuple[float, float]], after: dict[int, tuple[float, float]], own_s: float
) -> dict[str, Any]:
    """Returns what is said of 10 s in which the kernel's counts went from ``before`` to ``after``, ``own_s`` ours."""
    me = Mine()
    me.children = lambda recursive=False: []  # type: ignore[method-assign]
    meter = OthersMeter([me], proc=shown(place, before), mount=place)
    meter.sample(5.0, ends=True)
    shown(place, after)
    me.seconds = own_s
    meter.sample(10.0, ends=False)
    meter.sample(15.0, ends=True)
    return meter.summary()


@pytest.mark.usefixtures("two_cores")
def test_what_the_cores_did_less_what_we_did_is_the_others(tmp_path: Path) -> None:
    before = {0: (0.0, 0.0), 1: (100.0, 2.0), 2: (0.0, 0.0), 3: (50.0, 0.0)}
    after = {0: (9.0, 0.0), 1: (109.0, 2.5), 2: (9.0, 0.0), 3: (56.0, 0.0)}  # of the others' cores nothing counts
    found = measured(tmp_path, before, after, own_s=12.0)
    assert (found["seconds"], found["stolen_s"]) == (10.0, 0.5)
    assert found["others_s"] == pytest.approx(9.5 + 6.0 - 12.0, abs=0.05)
    assert found["share"] == pytest.approx(3.5 / 20, abs=0.003)
    assert [one["core"] for one in found["cores"]] == [1, 3]
    assert [one["busy_share"] for one in found["cores"]] == pytest.approx([0.95, 0.6], abs=0.01)


@pytest.mark.usefixtures("two_cores")
def test_a_quiet_machine_has_no_others_and_never_less(tmp_path: Path) -> None:
    found = measured(tmp_path, {1: (0.0, 0.0), 3: (0.0, 0.0)}, {1: (9.8, 0.0), 3: (9.8, 0.0)}, own_s=20.0)
    assert (found["share"], found["others_s"]) == (0.0, 0.0)  # a core's counts are samples


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("after", [{1: (9.0, 0.0)}, {}, {1: (3.0, 0.0), 3: (3.0, 0.0)}])
def test_counts_that_leave_out_a_core_or_our_own_work_tell_nothing(
    tmp_path: Path, after: dict[int, tuple[float, float]]
) -> None:
    found = measured(tmp_path, {1: (0.0, 0.0), 3: (0.0, 0.0)} if after else {}, after, own_s=15.0)
    assert found["share"] is found["others_s"] is None


def test_one_look_alone_tells_nothing() -> None:
    meter = OthersMeter([psutil.Process()])
    assert meter.summary()["share"] is None
    meter.sample(0.0, ends=True)
    assert meter.summary()["share"] is None
    assert OthersMeter([]).summary()["share"] is None


def test_what_our_own_children_do_is_ours_and_a_stranger_s_work_is_not() -> None:
    """Real processes: one of ours ends meanwhile, one goes on, and one that is busy beside them is somebody else's."""
    script = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {BUSY!r}])\n"
    ours = subprocess.Popen([sys.executable, "-c", script + "sys.stdin.read()"], stdin=subprocess.PIPE)
    stranger = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        while not psutil.Process(ours.pid).children():
            time.sleep(0.01)
        meter, started = OthersMeter([psutil.Process(ours.pid)]), time.perf_counter()
        took_of = [psutil.Process(stranger.pid), *psutil.Process(ours.pid).children()]
        before = [sum(one.cpu_times()[:2]) for one in took_of]
        meter.sample(0.0, ends=True)
        while min(sum(one.cpu_times()[:2]) - was for one, was in zip(took_of, before, strict=True)) < 0.5:
            time.sleep(0.05)
            meter.sample(time.perf_counter() - started, ends=False)
        meter.sample(time.perf_counter() - started, ends=True)
        strange, mine = (sum(one.cpu_times()[:2]) - was for one, was in zip(took_of, before, strict=True))
    finally:
        for process in (ours, stranger):
            process.kill()
            process.communicate()
    found = meter.summary()
    assert found["others_s"] > 0.7 * strange - 0.1
    everything = sum(one["busy_share"] for one in found["cores"]) * found["seconds"]
    assert everything - found["others_s"] == pytest.approx(mine, rel=0.1, abs=0.15)
    assert all(0 <= one["others_share"] <= 1 for one in found["cores"])


def test_a_rank_that_has_ended_before_the_last_look_is_still_ours() -> None:
    """Or all that it ever did, loading included, would be taken for the others' work within the clock."""
    with subprocess.Popen([sys.executable, "-c", BUSY]) as rank:
        try:
            process = psutil.Process(rank.pid)
            while process.cpu_times().user < 2.0:  # before the clock
                time.sleep(0.05)
            meter, started = OthersMeter([process]), time.perf_counter()
            meter.sample(0.0, ends=True)
            while process.cpu_times().user < 3.0:
                time.sleep(0.05)
            meter.sample(time.perf_counter() - started, ends=False)
        finally:
            rank.kill()
    meter.sample(time.perf_counter() - started, ends=True)
    first, last = meter._ends
    assert last.own_s - first.own_s >= 0.9


def test_too_many_threads_are_not_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(others, "MOST_THREADS", 0)
    meter = OthersMeter([psutil.Process()])
    meter.sample(0.0, ends=True)
    time.sleep(0.05)
    meter.sample(0.05, ends=True)
    assert {one["others_share"] for one in meter.summary()["cores"]} == {None}


def test_the_command_that_started_the_ranks_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    above = psutil.Process().parents()
    assert launchers_here() == []
    monkeypatch.setenv(PARENT_VARIABLE, str(above[0].pid))
    assert launchers_here() == above[:1]
    monkeypatch.setenv(PARENT_VARIABLE, "4194305")  # of another host
    assert launchers_here() == []


@pytest.mark.parametrize(
    ("membership", "files", "seconds"),
    [
        ("0::/a/b", {"a/cpu.stat": "nr_periods 9\nthrottled_usec 2500000\n"}, 2.5),
        ("0::/", {"cpu.stat": "usage_usec 5\n"}, None),
        ("4:cpu,cpuacct:/x", {"cpu,cpuacct/x/cpu.stat": "nr_throttled 3\nthrottled_time 1500000000\n"}, 1.5),
        ("4:cpu:/x\n0::/", {"cpu/cpu.stat": "throttled_time 0\n"}, 0.0),
        ("", {}, None),
    ],
)
def test_a_container_s_limit_is_read(
    tmp_path: Path, membership: str, files: dict[str, str], seconds: float | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cgroups.throttled_s(membership, tmp_path) == seconds


# --- what is said of it ---


def host(share: float, cores: list[float | None], name: str = "here", **more: Any) -> dict[str, Any]:
    found = {"share": share, "others_s": 8.0, "stolen_s": 0.0, "throttled_s": None, "seconds": 10.0}
    by_core = [{"core": number, "busy_share": 1.0, "others_share": one} for number, one in enumerate(cores)]
    return {"hostname": name, "others_cpu": found | {"cores": by_core} | more}


def record(share: float | None, *hosts: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"others_cpu_share": share, "telemetry": {"hosts": list(hosts)}, **more}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (record(None), None),
        (record(0.0499, host(0.0499, [0.1, 0.0])), None),
        (
            record(0.4, host(0.4, [0.01, 0.79])),
            "took 40.0% of the CPU time of this run's cores during the clock (core 1",
        ),
        (
            record(0.5, host(0.5, [0.5, 0.9, 0.4, 0.3, 0.2, 0.1])),
            "(core 1 90%, core 0 50%, core 2 40%, core 3 30%, 2 m",
        ),
        (record(0.5, host(0.5, [None, None])), "during the clock: its"),
        (record(0.5), "during the clock: its"),
        (record(0.5, host(0.1, [0.1]), host(0.5, [0.5], "there")), "(on there, core 0 50%)"),
        (record(0.5, host(0.5, [0.5], stolen_s=7.0)), "(core 0 50%, most of it stolen by other virtual machines)"),
        (record(0.5, host(0.0, [0.0]), segments=[{}]), "during the clock: its"),  # of all segments, not of the last
    ],
)
def test_from_five_percent_on_a_note_says_so(found: dict[str, Any], said: str | None) -> None:
    texts = list(notes(found))
    assert texts == [] if said is None else (len(texts) == 1 and said in texts[0])


def test_a_limit_of_the_container_is_named() -> None:
    (text,) = notes(record(0.0, host(0.0, [0.0, 0.0], throttled_s=3.0)))
    assert text == "a limit on the CPU time of this container held the run back on here for 3.0 s of a core"
    assert list(notes(record(0.0, host(0.0, [0.0, 0.0], throttled_s=0.5)))) == []


@pytest.mark.parametrize(
    ("parts", "share"),
    [
        ([(10.0, 0.1), (30.0, 0.3)], 0.25),
        ([(10.0, 0.1), (0.0, None)], 0.1),  # it ended before its clock
        ([(10.0, 0.1), (5.0, None)], None),  # killed: nobody has said what others took
        ([(0.0, None)], None),
    ],
)
def test_segments_count_by_their_time(parts: list[tuple[float, float | None]], share: float | None) -> None:
    found = [{"elapsed_s": seconds, "others_cpu_share": part} for seconds, part in parts]
    assert segments.whole_run({"segments": found})["others_cpu_share"] == (
        None if share is None else pytest.approx(share)
    )


@pytest.mark.slow
def test_a_run_beside_a_busy_process_says_so(harness: Callable[..., Run]) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        job = ["dataset.num_samples=300", "dataset.input_len=30", "dataset.output_len=30"]
        run = harness(*TINY, *RANDOM, *job)
    finally:
        stranger.kill()
        stranger.wait()
    assert run.status == 0, run.stderr
    share = float(run.row["others_cpu_share"])
    (seen,) = run.record["telemetry"]["hosts"]
    assert share == seen["others_cpu"]["share"] == run.record["telemetry"]["others_cpu_share"]
    assert 0.05 < share < 1 and len(seen["others_cpu"]["cores"]) == len(os.sched_getaffinity(0))
    assert any("other processes took" in note for note in run.record["notes"])
    assert "other processes took" in run.stdout
