"""What the heavy packages say when they are imported, in a process of its own (:mod:`harness.doctor.probe`)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.doctor.background import Background
from harness.doctor.findings import Findings, Outcome
from harness.engines import catalogue
from harness.engines.shared import deepspeed_ops, ragged_kernels
from harness.machine import build_locks, device

PACKAGES = ("torch", "triton", "transformers", "deepspeed")
LIMIT_S = 120.0  # for all of it: a file system over a network may take a minute
ADVICE = {"triton": "pip install triton, or do without: engine.kernels=auto passes it over"}
REINSTALL = "install it anew: bash launch/setup.sh"


def wanted() -> list[str]:
    """Returns the packages that are imported: those of all engines, in an order in which none waits for a later one."""
    others = [name for engine in catalogue.names() for name in catalogue.find(engine).packages]
    return list(dict.fromkeys([*PACKAGES, *others]))


class Heavy:
    """The process, and what it has said so far. It begins at once.

    Args:
        packages: what it imports.
    """

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = list(packages)
        self._process = Background("harness.doctor.probe", self.packages)
        self._until = time.monotonic() + LIMIT_S
        self._seen: list[dict[str, Any]] = []
        self._over = False

    def close(self) -> None:
        """Ends the process."""
        self._process.close()

    def package(self, name: str) -> dict[str, Any]:
        """Returns a package's ``version``, and ``error``: why it cannot be imported, None where it can."""
        while not self._over and not any(entry.get("package") == name for entry in self._seen):
            self._hear()
        for entry in self._seen:
            if entry.get("package") == name:
                return entry
        begun = any(entry.get("import") == name for entry in self._seen)
        why = self._end if begun else f"not tried, since {self._end}"
        return {"package": name, "error": why, "version": ""}

    def rest(self, key: str) -> list[dict[str, Any]]:
        """Returns what it has said under ``key``, once it has ended."""
        while not self._over:
            self._hear()
        return [entry for entry in self._seen if key in entry]

    def devices(self) -> list[dict[str, Any]]:
        """Returns, by GPU, whether torch computes on it; one without a number where torch sees none."""
        return self.rest("device")

    def _hear(self) -> None:
        entry = self._process.answer(self._until)
        if entry is not None:
            self._seen.append(entry)
            return
        self._over = True
        late = self._process.running and time.monotonic() >= self._until
        self._end = f"it took longer than {LIMIT_S:.0f} s" if late else self._process.ended()
        self._process.close()


def packages(found: Findings, heavy: Heavy) -> None:
    """Says of each package whether it can be imported."""
    for name in heavy.packages:
        remedy = ADVICE.get(name) or _installed_by_itself(name) or REINSTALL
        if importlib.util.find_spec(name) is None:
            found.no("packages", f"{name} is not installed", remedy)
            continue
        answer = heavy.package(name)
        if answer["error"] is not None:
            found.no("packages", f"{name} cannot be imported: {answer['error']}", remedy)
            continue
        kind = "" if name != "torch" else f", built for CUDA {built}" if (built := device.torch_cuda_version()) else ""
        kind = ", a build for CPUs alone" if name == "torch" and not kind else kind
        found.ok("packages", f"{name} {answer['version']} imports{kind}")


def _installed_by_itself(package: str) -> str | None:
    """Returns how to come by a package that the set-up does not install, and one engine alone needs."""
    rooms = [room for room in map(catalogue.find, catalogue.names()) if package in room.packages]
    alone = rooms[0] if len(rooms) == 1 and rooms[0].install else None
    return f"{alone.install}, or do without engine={alone.name}" if alone else None


def extensions(found: Findings, heavy: Heavy) -> None:
    """Says which of DeepSpeed's extensions are built or can be, and where; and which locks stand in the way."""
    places = [entry["extensions"] for entry in heavy.rest("extensions")]
    where = places[0] if places else "a folder that torch does not tell"
    if device.accelerator() != "cuda":
        lack = ragged_kernels.not_installed()
        able = f"this machine could not compile them for one: {lack}" if lack else f"for a GPU they would go to {where}"
        found.note("extensions", f"DeepSpeed's ragged and injected kernels do not exist for a CPU; {able}")
    states: dict[tuple[Outcome, str, str], list[str]] = {}
    for entry in heavy.rest("extension"):
        states.setdefault(_state(entry), []).append(entry["extension"])
    for (outcome, text, remedy), names in states.items():
        found.add("extensions", outcome, f"{', '.join(names)}: {text}", remedy)
    for place in places:
        for lock in sorted(Path(place).glob("**/lock")):
            if build_locks.stale(lock.parent):
                ours = lock.parent.name in deepspeed_ops.BUILDERS
                remedy = "the next build takes it away" if ours else f"rm {lock}, or the next build waits for ever"
                found.note("extensions", f"{lock} was left behind by a build that was killed", remedy)


def _state(entry: dict[str, Any]) -> tuple[Outcome, str, str]:
    """Returns what there is to say of an extension, and what to do."""
    name = entry["extension"]
    if entry.get("error"):
        return Outcome.no, entry["error"], "see packages"
    place = str(Path(entry["folder"]).parent)
    if entry["built"]:
        return Outcome.ok, f"built, in {place}", ""
    lack = ragged_kernels.not_installed() if name in deepspeed_ops.RAGGED else ragged_kernels.no_compiler()
    if lack is not None:
        return Outcome.no, f"not built: {lack}", "install it, or do without: engine.kernels=auto"
    if entry.get("compatible") is False:
        why = entry.get("complaint") or "DeepSpeed does not say why"
        return Outcome.no, f"cannot be built: {why}", "do without: engine.kernels=auto"
    ahead = f"{deepspeed_ops.AHEAD}{' --injected' if name in deepspeed_ops.INJECTED else ''}"
    return Outcome.note, f"not built yet; they go to {place}", f"{ahead} builds them, in minutes"
