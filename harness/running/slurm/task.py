"""What a Slurm job of a sweep does, once on each of its nodes: the run, as a user would start it there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from harness.machine.slurm import scontrol
from harness.ranks import signals
from harness.running.watch import MAIN

PORTS = (20_000, 10_000)  # of the ranks' meeting: the first, and how many jobs share none


def run(words: list[str], slots: int | None) -> None:
    """Runs ``harness/main.py``, and ends this process with its exit status.

    Args:
        words: its overrides.
        slots: ranks on each node, for DeepSpeed's launcher; None where the run starts its own, on one node.
    """
    # Slurm signals all processes of a job: the ranks heed it, and whatever has started them waits for them.
    for number in (signals.PAUSE, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if slots is None:
        status = subprocess.run([sys.executable, "-u", str(MAIN), *words], check=False).returncode
    else:
        status = _as_one_of_several(words, slots)
    sys.exit(status if status >= 0 else 128 - status)


def _as_one_of_several(words: list[str], slots: int) -> int:
    """Starts this node's ranks of a launch, as ``launch/slurm.sbatch`` does; returns the exit status."""
    hosts = scontrol("show", "hostnames", os.environ["SLURM_JOB_NODELIST"])[1].split()
    port = os.environ.get("PORT") or str(PORTS[0] + int(os.environ["SLURM_JOB_ID"]) % PORTS[1])
    with tempfile.TemporaryDirectory() as place:
        hostfile = Path(place) / "hosts"
        hostfile.write_text("".join(f"{host} slots={slots}\n" for host in hosts))
        line = [
            *(sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--no_ssh"),
            *("--node_rank", os.environ["SLURM_NODEID"]),
            *("--master_addr", os.environ.get("ADDRESS") or hosts[0], "--master_port", port),
            *(str(MAIN), *words),
        ]
        return subprocess.run(line, check=False).returncode
