"""What the machine did meanwhile: a thread that looks once a second at memory, load, power and temperature.

Every sample is a line of ``telemetry.csv``, written at once, so that a crash leaves what was seen, and the last
line says when the run was last alive. A sampler that cannot go on leaves a note; it never ends a run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from harness.basics.cells import cell_text
from harness.basics.errors import one_line
from harness.basics.files import cannot_write, mend_last_line, numbered_lines, open_append, write_all
from harness.machine.energy import POWERCAP, Gpus, GpuSample, Packages
from harness.machine.memory import available_memory_bytes
from harness.machine.quantities import _Counter, _Values

log = logging.getLogger("harness")
SERIES = "telemetry.csv"
INTERVAL_S = 1.0
STOP_S = 5.0  # for the last sample; a driver that has lost its GPU may never answer
HOST_COLUMNS = (
    "time_s",
    "host_memory_used_bytes",
    "host_memory_available_bytes",
    "ranks_memory_bytes",
    "cpu_utilisation",
    "cpu_energy_j",
)
GPU_COLUMNS = (
    "memory_used_bytes",
    "utilisation",
    "power_w",
    "temperature_c",
    "sm_clock_mhz",
    "throttled",
    "energy_j",
)


class Sampler:
    """Samples this host from :meth:`start` to :meth:`stop`, in a thread of its own.

    Args:
        series: the file that gets a line a sample, appended to if it exists; None for none.
        gpus: PCI bus ids of the GPUs whose state is taken, in the order of ``cuda:N``.
        processes: the run's ranks on this host.
        interval_s: seconds from one sample to the next.
        powercap: where the kernel shows what the processors draw.
    """

    def __init__(
        self,
        series: Path | None = None,
        gpus: Sequence[str] = (),
        processes: Sequence[psutil.Process] = (),
        interval_s: float = INTERVAL_S,
        powercap: Path = POWERCAP,
    ) -> None:
        self.notes: list[str] = []
        self._series = series
        self._file: int | None = None
        self._columns: list[str] = []
        self._buses = list(gpus)
        self._gpus: Gpus | None = None
        self._processes = list(processes)
        self._interval_s = interval_s
        self._packages = Packages(powercap)
        self._clock: Callable[[], float] | None = None
        self._clock_from = 0.0
        self._wake, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self._samples = 0
        self._complete = False  # whether the last sample was taken when it was asked for
        self._times: list[float] = []  # of the first and the last sample within the clock
        self._cpu_at: list[float] = []  # this thread's own CPU time at those
        self._cpu_last: tuple[float, float] | None = None
        self._values = {name: _Values() for name in HOST_COLUMNS[1:5]}
        self._gpu_values: list[dict[str, _Values]] = []
        self._busy, self._total, self._cpu_energy = _Counter(), _Counter(), _Counter()
        self._gpu_energy: list[_Counter] = []
        self._throttled: list[Counter[str]] = []

    def start(self) -> None:
        """Begins; well before the clock, so that opening NVML costs it nothing."""
        self._thread.start()

    def clock_started(self, clock: Callable[[], float]) -> None:
        """Notes that the run's clock has started; returns at once.

        Args:
            clock: seconds since the start of the run, :class:`harness.basics.clock.Clock`.
        """
        self._clock_from = clock()
        self._clock = clock
        self._wake.set()

    def stop(self) -> None:
        """Takes a last sample, at the clock's end, and ends; more than once does nothing."""
        self._over.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(STOP_S)

    def _run(self) -> None:
        try:
            self._open()
            due = time.monotonic()
            while True:
                self._wake.clear()
                last = self._over.is_set()
                self._sample()
                if last:
                    self._complete = True
                    return
                due += self._interval_s
                if due < time.monotonic():  # the machine slept, or the run takes every core
                    due = time.monotonic() + self._interval_s
                # Woken early at the clock's start and at the end.
                self._wake.wait(max(0.0, due - time.monotonic()))
        except Exception as error:  # whatever fails here is not worth the run
            self._note(f"sampling ended early: {type(error).__name__}: {error}")
        finally:
            if self._gpus is not None:
                self._gpus.close()
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _note(self, text: str) -> None:
        self.notes.append(one_line(text, 300))
        log.info("telemetry: %s", self.notes[-1])

    def _open(self) -> None:
        if self._buses:
            try:
                self._gpus = Gpus(self._buses)
            except Exception as error:  # no pynvml, no driver, or a GPU that NVML does not show
                self._note(f"GPUs are not sampled: {type(error).__name__}: {error}")
        count = len(self._gpus.all) if self._gpus is not None else 0
        self._gpu_values = [{name: _Values() for name in GPU_COLUMNS[:5]} for _ in range(count)]
        self._gpu_energy = [_Counter() for _ in range(count)]
        self._throttled = [Counter() for _ in range(count)]
        if self._series is None:
            return
        self._columns = [*HOST_COLUMNS, *(f"gpu{number}_{name}" for number in range(count) for name in GPU_COLUMNS)]
        with self._writing():
            header = _header(self._series)
            self._file = open_append(self._series)
            if header:  # of a run that goes on, maybe on other devices
                self._columns = header
            else:
                write_all(self._file, (",".join(self._columns) + "\n").encode())

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A full disk ends the series, not the sampling."""
        try:
            yield
        except OSError as error:
            assert self._series is not None
            self._note(f"the series ends early: {cannot_write(self._series, error)}")
            if self._file is not None:
                os.close(self._file)
            self._file = None

    def _sample(self) -> None:
        clock = self._clock
        time_s = None if clock is None else clock()
        cpu_joules = self._packages.joules()
        gpus = [gpu.sample() for gpu in self._gpus.all] if self._gpus is not None else []
        busy, total = _cpu_seconds()
        memory = psutil.virtual_memory()
        host: dict[str, float | None] = {
            "host_memory_used_bytes": memory.total - memory.available,
            "host_memory_available_bytes": available_memory_bytes(),
            "ranks_memory_bytes": self._resident(),
            "cpu_utilisation": None,
        }
        if self._cpu_last is not None and total > self._cpu_last[1]:
            share = (busy - self._cpu_last[0]) / (total - self._cpu_last[1])
            host["cpu_utilisation"] = round(min(max(share, 0.0), 1.0), 4)
        self._cpu_last = (busy, total)
        for name, value in host.items():
            self._values[name].add(time_s, value)
        self._busy.add(time_s, busy)
        self._total.add(time_s, total)
        self._cpu_energy.add(time_s, cpu_joules)
        for number, gpu in enumerate(gpus):
            self._take(number, time_s, gpu)
        if time_s is not None:
            self._samples += 1
            cpu_s = time.thread_time()
            # The first sample's own cost is not in the difference; one of many.
            self._times[1:], self._cpu_at[1:] = [time_s], [cpu_s]
        self._write(time_s, host, gpus)

    def _take(self, number: int, time_s: float | None, gpu: GpuSample) -> None:
        for name, values in self._gpu_values[number].items():
            values.add(time_s, getattr(gpu, name))
        self._gpu_energy[number].add(time_s, gpu.joules)
        if time_s is not None:
            self._throttled[number].update(gpu.throttled or ())

    def _resident(self) -> int | None:
        """Returns the resident memory of this host's ranks, in bytes."""
        total = 0
        for process in self._processes:
            with contextlib.suppress(psutil.Error):  # one that has ended
                total += process.memory_info().rss
        return total or None

    def _write(self, time_s: float | None, host: dict[str, float | None], gpus: Sequence[GpuSample]) -> None:
        if self._file is None:
            return
        values: dict[str, Any] = host | {"cpu_energy_j": self._cpu_energy.since}
        for number, gpu in enumerate(gpus):
            for name in GPU_COLUMNS[:5]:
                values[f"gpu{number}_{name}"] = getattr(gpu, name)
            values[f"gpu{number}_throttled"] = "|".join(gpu.throttled or ())
            values[f"gpu{number}_energy_j"] = self._gpu_energy[number].since
        cells = ["" if time_s is None else f"{time_s:.3f}"]
        cells += [cell_text(name, values.get(name)) for name in self._columns[1:]]
        with self._writing():
            write_all(self._file, (",".join(cells) + "\n").encode())

    def summary(self, clock_s: float | None = None) -> dict[str, Any]:
        """Returns what was seen, ready for JSON: peaks over all samples, means and joules over the clock alone.

        Args:
            clock_s: the clock at its end; None if the run did not come to it, and the joules are then unknown.
        """
        if self._thread.is_alive():
            self._note(f"the last sample did not come within {STOP_S:g} s")
        if not self._complete:
            clock_s = None
        sampled_s = self._times[1] - self._times[0] if len(self._times) == 2 else 0.0
        # Samples are taken just after the clock's ends; a run that was resumed began with a later clock.
        scale = (clock_s - self._clock_from) / sampled_s if clock_s is not None and sampled_s > 0 else None
        busy, total = self._busy.since, self._total.since
        host = self._values

        def joules(counter: _Counter) -> float | None:
            return None if scale is None or counter.since is None else counter.since * scale

        return {
            "hostname": socket.gethostname(),
            "interval_s": self._interval_s,
            "samples": self._samples,
            "sampler_cpu_share": (self._cpu_at[1] - self._cpu_at[0]) / sampled_s if sampled_s > 0 else None,
            "host_memory_used_peak_bytes": host["host_memory_used_bytes"].peak,
            "host_memory_available_least_bytes": host["host_memory_available_bytes"].least,
            "ranks_memory_peak_bytes": host["ranks_memory_bytes"].peak,
            "ranks_memory_mean_bytes": host["ranks_memory_bytes"].mean,
            "cpu_utilisation_mean": busy / total if busy is not None and total else None,
            "cpu_utilisation_peak": host["cpu_utilisation"].peak,
            "cpu_packages": len(self._packages),
            "cpu_energy_j": joules(self._cpu_energy),
            "gpus": [
                {
                    "index": number,
                    "memory_used_peak_bytes": values["memory_used_bytes"].peak,
                    "memory_used_mean_bytes": values["memory_used_bytes"].mean,
                    "utilisation_mean": values["utilisation"].mean,
                    "power_mean_w": values["power_w"].mean,
                    "power_peak_w": values["power_w"].peak,
                    "temperature_peak_c": values["temperature_c"].peak,
                    "sm_clock_mean_mhz": values["sm_clock_mhz"].mean,
                    "sm_clock_least_mhz": values["sm_clock_mhz"].least,
                    "throttled_share": {name: seen / self._samples for name, seen in self._throttled[number].items()},
                    "energy_j": joules(self._gpu_energy[number]),
                    "energy_source": self._gpus.all[number].source if self._gpus is not None else None,
                }
                for number, values in enumerate(self._gpu_values)
            ],
            "gpus_expected": len(self._buses),
            "notes": list(self.notes),
        }


def combined(hosts: Sequence[dict[str, Any] | None], accelerator: str) -> dict[str, Any]:
    """Returns the record's section ``telemetry``: the hosts' summaries, and what they say together.

    Args:
        hosts: :meth:`Sampler.summary` of each host; None for one that did not send any.
        accelerator: ``cuda``: the energy is the GPUs'; ``cpu``: the processor packages'.
    """
    energy: float | None = 0.0
    sources = set()
    for host in hosts:
        parts: list[float | None] = [None]
        if host is not None and accelerator == "cuda":
            gpus = host["gpus"]
            parts = [gpu["energy_j"] for gpu in gpus] if gpus and len(gpus) == host["gpus_expected"] else [None]
            sources |= {gpu["energy_source"] for gpu in gpus}
        elif host is not None:
            parts = [host["cpu_energy_j"]]
            sources.add("rapl")
        known = [part for part in parts if part is not None]
        energy = None if energy is None or len(known) < len(parts) else energy + sum(known)
    if not energy:  # a counter that never moved tells nothing
        energy = None
    shares = [host["sampler_cpu_share"] for host in hosts if host is not None]
    return {
        "energy_j": energy,
        "energy_source": ", ".join(sorted(filter(None, sources))) if energy is not None else None,
        "sampler_cpu_share": max((share for share in shares if share is not None), default=None),
        "hosts": [host for host in hosts if host is not None],
    }


def last_sample(series: Path) -> dict[str, str]:
    """Returns the last whole line of a ``telemetry.csv``, by column; empty when there is none.

    Its ``time_s`` is on the clock of ``finished_s`` in ``completions.jsonl`` (empty before the clock's start): when
    a run that died was last alive.
    """
    header: list[str] = []
    cells: list[str] = []
    with contextlib.suppress(OSError):
        for number, line in numbered_lines(series):
            found = line.decode(errors="replace").rstrip("\n").split(",")
            if number == 1:
                header = found
            elif line.endswith(b"\n") and len(found) == len(header):
                cells = found
    return dict(zip(header, cells, strict=True)) if cells else {}


def _header(series: Path) -> list[str]:
    """Returns the columns of a series that is resumed, without a last line that a crash tore; empty without one."""
    mend_last_line(series)
    first = next(numbered_lines(series), (1, b""))[1]
    return first.decode(errors="replace").rstrip("\n").split(",") if first else []


def _cpu_seconds() -> tuple[float, float]:
    """Returns the seconds that this machine's cores have worked, and all that they have had."""
    times = psutil.cpu_times()
    # Linux counts a guest's time as the user's too.
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return total - times.idle - getattr(times, "iowait", 0.0), total
