#!/usr/bin/env python3
"""Starts one run on the hosts of a hostfile, through DeepSpeed's launcher and pdsh.

    python launch/multi_node.py --hostfile FILE [deepspeed's own flags] -- [overrides]

pdsh hands a command to a shell on every host, and DeepSpeed quotes little of it: brackets, stars, dollars and quotes
would not arrive as they were written. Here all overrides travel as one word that no shell touches, and the
variables a run depends on, of which DeepSpeed passes next to none, go along.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from harness.basics.errors import UserError, quoted, report
from harness.ranks.rank import GUIDE, encoded

# Names, or with a trailing _ their beginnings. NCCL_ and PYTHON DeepSpeed passes itself.
VARIABLES = (
    "CUDA_HOME",
    "DS_ACCELERATOR",
    "GLOO_",
    "GOMP_",
    "HARNESS_CACHE",
    "HARNESS_CPU_ISA",
    "HARNESS_NUMA_ROOT",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "HYDRA_FULL_ERROR",
    "KMP_",
    "LD_LIBRARY_PATH",
    "OMP_",
    "TORCH_",
)


def main() -> int:
    """Becomes the launcher; returns an exit status only if it cannot."""
    try:
        arguments = command(sys.argv[1:])
    except UserError as error:
        return report(error)
    os.environ["DS_ENV_FILE"] = environment_file()
    os.execv(arguments[0], arguments)
    return 1


def command(arguments: list[str]) -> list[str]:
    """Returns DeepSpeed's command line for ``[flags] -- [overrides]``.

    Raises:
        UserError: it could not work.
    """
    if "--" not in arguments:
        found = "no -- between DeepSpeed's flags and the overrides"
        raise UserError("command line", found, "write: --hostfile FILE [flags] -- [overrides]")
    split = arguments.index("--")
    flags, overrides = arguments[:split], arguments[split + 1 :]
    hostfile = value_of(flags, "-H", "--hostfile")
    if hostfile is None or not Path(hostfile).is_file():
        found = "not given" if hostfile is None else f"no such file: {quoted(hostfile)}"
        raise UserError("--hostfile", found, "copy launch/hostfile.example and name your hosts")
    launcher = (value_of(flags, "--launcher") or "pdsh").lower()
    if launcher == "pdsh" and shutil.which("pdsh") is None:
        raise UserError("--launcher", "pdsh is not installed on this host", f"install it, or start without; {GUIDE}")
    if not {"-m", "--multirun"}.isdisjoint(overrides):
        raise UserError("--multirun", "a sweep is not run by one launch", "start one launch a job")
    for name, path in (("directory", os.getcwd()), ("interpreter", sys.executable), ("checkout", str(ROOT))):
        if re.fullmatch(r"[\w@%+=:,./-]+", path, re.ASCII) is None:
            raise UserError(name, f"{quoted(path)}: DeepSpeed does not quote it", "use a path of plain characters")
    if value_of(flags, "--master_port") is None:
        flags = [*flags, "--master_port", str(20000 + secrets.randbelow(10000))]  # the default collides between jobs
    script = str(ROOT / "harness" / "main.py")
    return [sys.executable, "-m", "deepspeed.launcher.runner", *flags, script, encoded(overrides)]


def value_of(flags: list[str], *names: str) -> str | None:
    """Returns the value of the last of ``flags`` that has one of ``names``, None without one."""
    found = None
    for number, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        if name in names:
            found = value if equals else "".join(flags[number + 1 : number + 2])
    return found


def environment_file() -> str:
    """Writes what DeepSpeed is to export on every host; returns the file's path, good for as long as this process."""
    lines = []
    for name, value in sorted(os.environ.items()):
        if any(name == known or (known.endswith("_") and name.startswith(known)) for known in VARIABLES):
            # DeepSpeed puts a value with such characters into double quotes, and nothing more; pdsh reads the %.
            lines.append(name + "=" + re.sub(r'(["\\$`])', r"\\\1", value).replace("%", "%%"))
    named = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    for place in (Path.home() / named, Path(named)):
        if place.is_file():  # the user's own, which ours replaces
            lines += [line for line in place.read_text().splitlines() if "=" in line]
    # DeepSpeed reads it in the same process, before it starts anything.
    file = os.memfd_create("deepspeed_env", 0)
    os.write(file, "".join(line + "\n" for line in lines).encode())
    return f"/proc/self/fd/{file}"


if __name__ == "__main__":
    sys.exit(main())
