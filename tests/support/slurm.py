"""A real Slurm of one node, of ordinary processes in a directory of its own: Debian's slurm-wlm and munge."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil

from harness.ranks.rank import free_port
from support.runs import variables

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
START_S = 30.0
# Credentials of five seconds, the least: Slurm holds a job that was queued again back until its old ones are void.
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.sock,cred_expire=5
CredType=cred/munge
SlurmctldPort={controller}
SlurmdPort={daemon}
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
KillWait=20
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=1000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Returns why no Slurm can be started here; None where it can."""
    missing = [name for name in PROGRAMS if _found(name) is None]
    if missing:
        return f"{missing[0]} is not installed (Debian: slurm-wlm and munge)"
    return None if os.geteuid() == 0 else "slurmd has to be started by root"


def _found(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Slurm:
    """The cluster; :meth:`end` ends its three daemons, and all of its jobs.

    Args:
        directory: empty, and with no directory above that is its owner's alone.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {"SLURM_CONF": str(directory / "slurm.conf")}
        host = socket.gethostname().partition(".")[0]
        for name in ("state", "spool"):
            (directory / name).mkdir()
        directory.chmod(0o755)  # munge wants its socket to be within everybody's reach
        (directory / "munge.key").write_bytes(os.urandom(1024))
        (directory / "munge.key").chmod(0o400)
        names = {"host": host, "directory": directory, "controller": free_port(), "daemon": free_port()}
        (directory / "slurm.conf").write_text(CONFIG.format(**names))
        # Any two character devices will do for GPUs that no job touches.
        (directory / "gres.conf").write_text(f"NodeName={host} Name=gpu File=/dev/tty[0-1]\n")
        munge = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        flags = [f"--{flag}={directory}/munge.{suffix}" for flag, suffix in munge.items()]
        try:
            self.run(str(_found("munged")), *flags, "--num-threads=10")
            self.run(str(_found("slurmctld")))
            self.run(str(_found("slurmd")), "-N", host)
            self.wait("sinfo", "--noheader", "--format=%T", until="idle")
        except BaseException:
            self.end()
            raise

    def run(self, *words: str, **more: str) -> str:
        """Runs a command of Slurm's; returns what it prints."""
        environment = variables(**self.environment, **more)
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout.strip()

    def wait(self, *words: str, until: str, within_s: float = START_S) -> None:
        """Waits until a command prints just that."""
        deadline = time.monotonic() + within_s
        while (said := self.run(*words)) != until:
            assert time.monotonic() < deadline, (words, said, self.log())
            time.sleep(0.2)

    def wait_for_the_end(self, job: str, within_s: float = 300.0) -> None:
        """Waits until a job has ended."""
        deadline = time.monotonic() + within_s
        while self.run("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T") not in ENDED:
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.3)

    def log(self) -> str:
        """Returns the end of what the daemons have logged."""
        texts = [path.read_text(errors="replace")[-3000:] for path in sorted(self.directory.glob("*.log"))]
        return "\n".join(texts)

    def end(self) -> None:
        """Ends jobs and daemons."""
        subprocess.run(["scancel", "--user=root"], env=variables(**self.environment), timeout=60, check=False)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self._steps():
            time.sleep(0.2)
        daemons = []
        for name in ("slurmctld", "slurmd", "munge"):
            try:
                daemons.append(psutil.Process(int((self.directory / f"{name}.pid").read_text())))
            except (OSError, ValueError, psutil.NoSuchProcess):
                continue
        for daemon in daemons:
            daemon.send_signal(signal.SIGTERM)
        for daemon in psutil.wait_procs(daemons, timeout=20)[1]:
            daemon.kill()

    def _steps(self) -> list[psutil.Process]:
        """Returns Slurm's own processes of jobs that are still there."""
        mark = str(self.directory)
        found = []
        for process in psutil.process_iter(["name"]):
            try:
                if process.info["name"] == "slurmstepd" and process.environ().get("SLURM_CONF", "").startswith(mark):
                    found.append(process)
            except psutil.Error:
                continue
        return found


ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL")
