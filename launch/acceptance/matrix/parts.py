"""What the matrix finds out beside its cases: where the time went, 70B by its layers, a profile, and a recount."""

from __future__ import annotations

import json

from acceptance.commands import Steps, command_steps
from acceptance.findings import Figure, Outcome
from acceptance.harness_run import harness_steps
from acceptance.matrix import scaled
from acceptance.matrix.cases import ANY, TORCH, TRITON, Case, cases
from acceptance.matrix.course import Course
from acceptance.matrix.forecast import TRITON as PACE
from acceptance.matrix.models import DTYPE
from acceptance.matrix.scaled import Layers

SEVENTY, SCALED, PROFILE = "70B layers fastgen triton", "70B scaled", "7B profile"
PROFILE_S, SIMULATE_S, RECOUNT_S = 150.0, 90.0, 90.0
TOP = 5  # kernels of a finding; the file has all


def explain_all(course: Course) -> None:
    """Reports where the time of each default run of FastGen went."""
    stage = course.stage
    for case in cases():
        name = f"{case.name} explained"
        found = None if stage.done(name) else course.explained(case.name)
        if found is None:
            continue
        if "error" in found:
            stage.report(name, Outcome.refused, found["error"])
            continue
        elapsed = found["parts"][0]["before_s"]
        parts: dict[str, Figure] = {
            f"{part['key']}_share": (part["before_s"] - part["after_s"]) / elapsed for part in found["parts"]
        }
        promised = ", ".join(f"{one['setting']} {one['gain']:+.0%}" for one in found["changes"]) or "no setting alone"
        detail = f"parts of the time; simulated, promises most: {promised}"
        stage.report(name, Outcome.measured, detail, limit_tokens_per_s=found["limit_tokens_per_s"], **parts)


def seventy(course: Course) -> Steps[None]:
    """Measures as many layers of 70B as fit, and simulates all of them."""
    stage = course.stage
    if not stage.done(SEVENTY):
        yield from _measure_layers(course)
    measured = stage.finding(SEVENTY)
    if stage.done(SCALED) or measured is None:
        return
    if measured.outcome is not Outcome.measured:
        stage.report(SCALED, Outcome.skipped, f"{SEVENTY} has no figures to scale")
        return
    whole = course.models.dummy("70B")
    with stage.check(SCALED) as check:
        run = Layers(stage.results / str(measured.figures["run_id"]), whole.architecture)
        kept = stage.folder / "conf"
        off = run.write_fit(course.hardware, kept)
        words = (*course.job(whole, int(measured.figures["requests"])), "model.name=llama2_70b_scaled")
        asked = (*words, *run.overrides(kept))
        simulated = yield from harness_steps(stage, SCALED, *asked, timeout_s=SIMULATE_S)
        if not simulated.ok:
            raise RuntimeError(simulated.how)
        check.outcome = Outcome.measured
        check.detail, found = scaled.of_simulation(simulated, run.layers, whole.architecture["num_hidden_layers"])
        check.figures |= found | off


def _measure_layers(course: Course) -> Steps[None]:
    stage = course.stage
    whole = course.models.dummy("70B").architecture
    layers = whole["num_hidden_layers"] // 2
    if not stage.rehearse:
        memory = stage.figure("machine", "memory_bytes")
        if not isinstance(memory, int | float):
            stage.report(SEVENTY, Outcome.skipped, "the stage machine has not said how much memory the card has")
            return
        layers = scaled.layers_that_fit(whole, DTYPE, float(memory))
    model = course.models.dummy("70B", num_hidden_layers=layers)
    case = Case(SEVENTY, "70B", TRITON, PACE, stand_in=ANY)
    choice = course.choice(case, model)
    if choice is None:
        return
    named = f"model.name=llama2_70b_width_{layers}_layers"  # or the table would say that it is all of the model
    run = yield from course.measured(SEVENTY, "70B", model, (named, *case.words(stage.rehearse)), choice)
    if not run.ok or run.directory is None:
        course.not_run(case, run, run.how, requests=choice.requests)
        return
    what = f"of a tiny model; stand-in: {' '.join(ANY)}" if stage.rehearse else "at full width"
    with stage.check(SEVENTY) as check:
        check.figures |= course.figures_of(run, model)
        check.outcome = Outcome.measured
        check.detail = f"{layers} of {whole['num_hidden_layers']} layers {what}, made-up weights"
        check.figures |= Layers(run.directory, whole).by_layer()


def profile(course: Course) -> Steps[None]:
    """Profiles a decode pass and a mixed one of 7B with the default kernels; traces and tables stay in the folder."""
    stage = course.stage
    if stage.done(PROFILE):
        return
    needed = 20.0 if stage.rehearse else 90.0
    if stage.left_s() < needed:
        course.left_over.append(PROFILE)
        return
    model = course.models.get("7B")
    kernels = TORCH if stage.rehearse else TRITON  # a pass of the native kernels is one call
    folder = stage.folder / "profile"
    size = ("--decodes", "8", "--context", "24", "--prompt", "16", "engine.token_budget=48") if stage.rehearse else ()
    count = course.requests.available if stage.rehearse else min(1000, course.requests.available)
    words = ["launch/profile_pass.py", "--out", str(folder), *size, *course.job(model, count), *kernels]
    done = yield from command_steps(stage, PROFILE, words, PROFILE_S)
    if done.status:
        course.not_run(Case(PROFILE, "7B", TRITON, PACE), done, done.how)
        return
    (folder / "profile.txt").write_text(done.stdout)
    for one in json.loads((folder / "profile.json").read_text())["passes"]:
        stage.report(f"{PROFILE}, {one['name']} pass", Outcome.measured, _kernels(one), **_pass(one))
    stage.report(PROFILE, Outcome.passed, f"tables and traces for ui.perfetto.dev in {folder.relative_to(stage.out)}")


def _kernels(one: dict[str, object]) -> str:
    """Returns the kernels that take most of a pass, in a line."""
    kernels: list[dict[str, float]] = one["kernels"]  # type: ignore[assignment]
    whole = sum(kernel["seconds"] for kernel in kernels) or 1.0
    shown = [f"{kernel['seconds'] / whole:.0%} {str(kernel['name'])[:40]} x{kernel['calls']}" for kernel in kernels]
    return ", ".join(shown[:TOP])


def _pass(one: dict[str, object]) -> dict[str, Figure]:
    kernels: list[dict[str, float]] = one["kernels"]  # type: ignore[assignment]
    found: dict[str, Figure] = {key: one[key] for key in ("tokens", "decodes", "prompt_tokens", "keys_read", "seconds")}  # type: ignore[misc]
    found |= {"launches": sum(int(kernel["calls"]) for kernel in kernels)}
    found |= {"kernel_s": sum(kernel["seconds"] for kernel in kernels)}
    found |= {key: float(one[key]) for key in ("busy_s", "span_s") if one[key] is not None}  # type: ignore[arg-type]
    return found


def recount(course: Course, case: Case) -> Steps[None]:
    """Has the tokens of a run counted again, by ``harness.verify``: of those that the goals rest on."""
    stage, name, finding = course.stage, f"{case.name} recounted", course.stage.finding(case.name)
    if stage.done(name) or finding is None or finding.outcome is not Outcome.measured:
        return
    if stage.left_s() < 15.0:
        course.left_over.append(name)
        return
    words = ["-m", "harness.verify", str(finding.figures["run_id"]), "--results", str(stage.results), "--json"]
    done = yield from command_steps(stage, name, words, RECOUNT_S)
    outcome = Outcome.passed if done.status == 0 else Outcome.failed
    try:
        detail = str(json.loads(done.stdout)["verdict"])
    except (ValueError, KeyError):
        detail = done.how
    stage.report(name, outcome, detail)
