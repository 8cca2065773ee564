"""What the machine did meanwhile: a thread that looks once a second at memory, load, power and temperature.

Every sample is a line of ``telemetry.csv``, whose last line says when the run was last alive. A sampler that fails
leaves a note; it never ends a run.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from harness.basics.errors import one_line
from harness.basics.files import cannot_write
from harness.machine.energy import POWERCAP, Gpus, Packages
from harness.machine.meters import GPU_COLUMNS, HOST_COLUMNS, GpuMeter, HostMeter
from harness.machine.others import OthersMeter
from harness.machine.power import PowerSeries
from harness.machine.series import Series

log = logging.getLogger("harness")
SERIES = "telemetry.csv"
INTERVAL_S = 1.0
STOP_S = 5.0  # for the last sample; a driver that has lost its GPU may never answer


class Sampler:
    """Samples this host from :meth:`start` to :meth:`stop`, in a thread of its own.

    Args:
        series: the file that gets a line a sample, appended to if it exists; None for none.
        gpus: PCI bus ids of the GPUs whose state is taken, in the order of ``cuda:N``.
        processes: the run's ranks on this host.
        launchers: what has started them, as far as it is the run's.
        interval_s: seconds from one sample to the next.
        powercap: where the kernel shows what the processors draw.
    """

    def __init__(
        self,
        series: Path | None = None,
        gpus: Sequence[str] = (),
        processes: Sequence[psutil.Process] = (),
        launchers: Sequence[psutil.Process] = (),
        interval_s: float = INTERVAL_S,
        powercap: Path = POWERCAP,
    ) -> None:
        self.notes: list[str] = []
        self._path = series
        self._series: Series | None = None
        self._buses = list(gpus)
        self._nvml: Gpus | None = None
        packages = Packages(powercap)
        self._host = HostMeter(processes, packages)
        self._power = PowerSeries(len(packages))
        self._others = OthersMeter(processes, launchers)
        self._gpus: list[GpuMeter] = []
        self._interval_s = interval_s
        self._clock: Callable[[], float] | None = None
        self._clock_from = 0.0
        self._wake, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self._samples = 0
        self._complete = False  # whether the last sample was taken when it was asked for
        self._times: list[float] = []  # of the first and the last sample within the clock
        self._cpu_at: list[float] = []  # this thread's own CPU time at those

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
                self._sample(last)
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
            if self._nvml is not None:
                self._nvml.close()
            self._close_series()

    def _note(self, text: str) -> None:
        self.notes.append(one_line(text, 300))
        log.info("telemetry: %s", self.notes[-1])

    def _open(self) -> None:
        if self._buses:
            try:
                self._nvml = Gpus(self._buses)
                self._gpus = [GpuMeter(gpu) for gpu in self._nvml.all]
            except Exception as error:  # no pynvml, no driver, or a GPU that NVML does not show
                self._note(f"GPUs are not sampled: {type(error).__name__}: {error}")
        if self._path is not None:
            of_gpus = [_gpu_column(number, name) for number in range(len(self._gpus)) for name in GPU_COLUMNS]
            with self._writing():
                self._series = Series(self._path, ["time_s", *HOST_COLUMNS, *of_gpus])

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A full disk ends the series, not the sampling."""
        try:
            yield
        except OSError as error:
            assert self._path is not None
            self._note(f"the series ends early: {cannot_write(self._path, error)}")
            self._close_series()

    def _close_series(self) -> None:
        if self._series is not None:
            self._series.close()
        self._series = None

    def _sample(self, last: bool) -> None:
        clock = self._clock
        time_s = None if clock is None else clock()
        values: dict[str, Any] = dict(self._host.sample(time_s))
        for number, gpu in enumerate(self._gpus):
            values |= {_gpu_column(number, name): value for name, value in gpu.sample(time_s).items()}
        if time_s is not None:
            self._others.sample(time_s, ends=last or not self._samples)
            powers = [values[_gpu_column(number, "power_w")] for number in range(len(self._gpus))]
            self._power.add(time_s, powers, values["cpu_energy_j"])
            self._samples += 1
            # The first sample's own cost is not in the difference; one of many.
            self._times[1:], self._cpu_at[1:] = [time_s], [time.thread_time()]
        if self._series is not None:
            with self._writing():
                self._series.write(time_s, values)

    def power(self) -> dict[str, Any] | None:
        """Returns :meth:`PowerSeries.summary`; None where the samples are not whole."""
        return self._power.summary() if self._complete and len(self._gpus) == len(self._buses) else None

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
        return {
            "hostname": socket.gethostname(),
            "interval_s": self._interval_s,
            "samples": self._samples,
            "sampler_cpu_share": (self._cpu_at[1] - self._cpu_at[0]) / sampled_s if sampled_s > 0 else None,
            **self._host.summary(scale),
            "others_cpu": self._others.summary(),
            "gpus": [gpu.summary(self._samples, scale) for gpu in self._gpus],
            "gpus_expected": len(self._buses),
            "notes": list(self.notes),
        }


def _gpu_column(number: int, name: str) -> str:
    return f"gpu{number}_{name}"


def across_hosts(hosts: Sequence[dict[str, Any] | None], accelerator: str) -> dict[str, Any]:
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
    others = [None if host is None else host["others_cpu"]["share"] for host in hosts]
    return {
        "energy_j": energy,
        "energy_source": ", ".join(sorted(filter(None, sources))) if energy is not None else None,
        "sampler_cpu_share": max((share for share in shares if share is not None), default=None),
        # The slowest host sets the pace of all, so that a mean would hide what happened.
        "others_cpu_share": None if None in others else max((one for one in others if one is not None), default=None),
        "hosts": [host for host in hosts if host is not None],
    }
