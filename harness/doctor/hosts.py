"""The hosts of a hostfile: reachable without a password, with the same versions under the same path."""

from __future__ import annotations

import ipaddress
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness.basics.errors import UserError, one_line, quoted
from harness.basics.places import CHECKOUT, ROOT
from harness.doctor import facts, requirements
from harness.doctor.findings import Findings

AREA = "hosts"
CONNECT_S, LIMIT_S = 5, 30.0  # for the connection, and for all of a host
NO_CHECKOUT, NO_PYTHON = 91, 92  # exit statuses of the command on the host
OPTIONS = ("-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}")
GUIDE = "see launch/NODES.md"
PLACED = "the checkout" if CHECKOUT else "the environment"


def read(path: str) -> dict[str, int]:
    """Returns the ranks of each host, in their order, as DeepSpeed's launcher reads the file.

    Raises:
        UserError: there is no such file, or a line is none of ``NAME slots=RANKS``.
    """
    remedy = "see launch/hostfile.example"
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        found = f"{quoted(path, 200)}: {getattr(error, 'strerror', None) or error}"
        raise UserError("--hostfile", found, remedy) from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        match = re.match(r"(\S+)\s+slots=(\d+)", line)
        if match is None or match[1] in hosts or match[1].startswith("-"):
            found = f"line {number}, {quoted(line)}" + (" names a host again" if match and match[1] in hosts else "")
            raise UserError("--hostfile", found, f"write NAME slots=RANKS once a host; {remedy}")
        hosts[match[1]] = int(match[2])
    if not sum(hosts.values()):
        raise UserError("--hostfile", f"{quoted(path, 200)} names no host with a slot", remedy)
    return hosts


def check(found: Findings, hosts: Mapping[str, int], accelerator: str) -> list[str]:
    """Says of each host whether a rank could be started on it as here; returns those that are not ready.

    Args:
        accelerator: what the ranks would run on; on ``cuda`` a slot is a GPU.
    """
    first = next(iter(hosts))
    if shutil.which("ssh") is None:
        found.no(AREA, "there is no ssh on this host", f"install it, or start each launcher by hand; {GUIDE}")
        return list(hosts)
    mine = facts.facts(first)
    with ThreadPoolExecutor(min(len(hosts), 32)) as pool:
        answers = dict(zip(hosts, pool.map(lambda host: _ask(host, first), hosts), strict=True))
    leader = answers[first]
    leads = None if isinstance(leader, UserError) else str(leader["hostname"])
    unready = []
    for host, answer in answers.items():
        if isinstance(answer, UserError):
            found.refused(AREA, answer)
            unready.append(host)
            continue
        wrong = [*_differences(answer, mine)]
        if accelerator == "cuda" and answer.get("devices", 0) < hosts[host]:
            wrong.append(f"{hosts[host]} slots and {answer.get('devices', 0)} GPUs")
        if leads not in (None, answer["hostname"]) and (trouble := _address(answer["addresses"])):
            wrong.append(trouble)
        if wrong:
            found.no(AREA, f"{host}: {'; '.join(wrong)}", f"make it as this host is; {GUIDE}")
            unready.append(host)
            continue
        versions = f"Python {answer['python']}, torch {answer['packages'].get('torch')}"
        slots = f"{hosts[host]} slot{'s' * (hosts[host] != 1)}"
        found.ok(AREA, f"{host} ({slots}): reachable, the same source and packages as here ({versions})")
    return unready


def _ask(host: str, first: str) -> dict[str, Any] | UserError:
    """Returns the host's facts, or why there are none."""
    inner = f"cd {shlex.quote(str(ROOT))} || exit {NO_CHECKOUT}; test -x {shlex.quote(sys.executable)} || exit "
    inner += f"{NO_PYTHON}; exec {shlex.quote(sys.executable)} - {shlex.quote(first)}"
    try:
        done = subprocess.run(
            ["ssh", *OPTIONS, host, f"exec sh -c {shlex.quote(inner)}"],
            input=Path(facts.__file__).read_bytes(),
            capture_output=True,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return UserError(host, f"no answer within {LIMIT_S:.0f} s", f"try ssh {host} true")
    except OSError as error:
        return UserError(host, f"ssh cannot be started: {error.strerror}", "")
    said = [line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
    if done.returncode == NO_CHECKOUT:
        return UserError(host, f"it has no directory {ROOT}", f"put {PLACED} at the same path; {GUIDE}")
    if done.returncode == NO_PYTHON:
        return UserError(host, f"it has no {sys.executable}", f"{requirements.INSTALL} there; {GUIDE}")
    if done.returncode == 255:  # ssh's own
        why = one_line(said[-1], 200) if said else "ssh does not say why"
        return UserError(host, f"not reachable without a password: {why}", f"make ssh {host} true work by itself")
    for line in done.stdout.decode(errors="replace").splitlines():
        if line.startswith(facts.MARK):
            found = json.loads(line.removeprefix(facts.MARK))
            assert isinstance(found, dict)
            return found
    why = one_line(said[-1], 200) if said else f"status {done.returncode}"
    return UserError(host, f"its Python does not answer: {why}", f"try it there; {GUIDE}")


def _differences(theirs: dict[str, Any], mine: dict[str, Any]) -> list[str]:
    if "error" in theirs:
        return [f"the harness cannot be imported there: {theirs['error']}"]
    found = []
    if theirs["python"] != mine["python"]:
        found.append(f"Python {theirs['python']}, here {mine['python']}")
    packages: tuple[dict[str, str], dict[str, str]] = (theirs["packages"], mine["packages"])
    for name in sorted(packages[0].keys() | packages[1].keys()):
        there, here = (one.get(name, "not installed") for one in packages)
        if there != here:
            found.append(f"{name} {there}, here {here}")
    commits = [(one.get("git") or {}).get("commit", "unknown")[:12] for one in (theirs, mine)]
    if commits[0] != commits[1]:
        found.append(f"commit {commits[0]}, here {commits[1]}")
    elif theirs["code"] != mine["code"]:
        found.append("the same commit, but other source: changes that are not committed")
    return found


def _address(addresses: list[str]) -> str | None:
    """Returns what is wrong with the addresses that a host takes the first one for, from where ranks must reach it."""
    if not addresses:
        return "it knows no address of the first host"
    loopback = [one for one in addresses if ipaddress.ip_address(one.partition("%")[0]).is_loopback]
    return f"it takes the first host for itself ({loopback[0]})" if len(loopback) == len(addresses) else None
