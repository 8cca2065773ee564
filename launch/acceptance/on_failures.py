"""Stage failures: memory that runs out, kills and resumption, timeouts, telemetry, GPUs named by their UUIDs."""

from __future__ import annotations

import contextlib
import importlib
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from acceptance import tiny_models
from acceptance.cases import RUN_S, VERIFY_S, guarded, one_thread, within
from acceptance.commands import Running, Steps, together
from acceptance.findings import Outcome
from acceptance.harness_run import HarnessRun, Verdict, directory_of, figures_of, harness_steps, verdict_steps
from acceptance.stage import Stage
from harness.basics.outcome import RUNNING
from harness.results.directory import read_record
from harness.results.table import read_rows

MORE = 2  # requests that a run finishes before it is disturbed
CLOSED_S = 20.0  # for the watchdog to write down the end of a rank that was killed
ADDRESSES = 6_500_000_000  # bytes of address space that a run on a CPU is left to fail in
FORESEEN, LOADING, RUNNING_OUT = "memory foreseen", "out of memory, loading", "out of memory, running"
RESUMED, TIMEOUT, TELEMETRY, UUID, UUIDS = "killed and resumed", "timeout", "telemetry", "GPU by UUID", "GPUs by UUID"
# Keys and values of 9 GB, for which a CPU is asked for six.
WIDE_CACHE = (
    *("model=llama2_7b", "model.weights=dummy", "model.dtype=float32", "model.architecture.num_hidden_layers=2"),
    *("model.architecture.hidden_size=64", "model.architecture.intermediate_size=96", "generation.stop=length"),
    *("+model.architecture.head_dim=128", "dataset=synthetic", "dataset.prompt=random", "dataset.output_len=2000"),
    *("engine.kernels=torch", "engine.kv_memory=6GiB", "timeout_s=120"),
)


def run(stage: Stage) -> None:
    """Runs the stage."""
    models = stage.folder / "models"
    beside: dict[str, Steps[Verdict]] = {FORESEEN: foreseen(stage), TIMEOUT: timed_out(stage)}
    alone = {LOADING: loading(stage)}  # they take all memory that a GPU has
    if not stage.rehearse:
        beside[UUID] = by_uuid(stage, 1)
        beside[UUIDS] = by_uuid(stage, 2)
        alone[RUNNING_OUT] = running_out(stage)
    for name in sorted({UUID, UUIDS, RUNNING_OUT} - {*beside, *alone}):
        if not stage.done(name):
            stage.report(name, Outcome.skipped, "needs a GPU")
    if stage.rehearse:
        beside |= alone
        alone = {}
    jobs = [_reported(stage, name, steps) for name, steps in beside.items() if not stage.done(name)]
    runs: dict[str, HarnessRun] = {}
    try:
        if not stage.done(RESUMED):
            if stage.rehearse:
                together([tiny_models.write_steps(stage, models, ["deep"])], 1)
            jobs = [disturbed(stage, runs), undisturbed(stage, runs), *jobs]
        together(jobs, 2 if stage.rehearse else 4)
        if not stage.done(RESUMED):
            together([_reported(stage, RESUMED, compared(stage, runs["resumed"], runs["undisturbed"]))], 1)
        together([_reported(stage, name, steps) for name, steps in alone.items() if not stage.done(name)], 1)
    finally:
        shutil.rmtree(models, ignore_errors=True)


def _reported(stage: Stage, name: str, steps: Steps[Verdict]) -> Steps[None]:
    (yield from guarded(steps)).report(stage, name)


def _work(stage: Stage) -> list[str]:
    """Returns a job of many seconds whose tokens depend on everything before them."""
    model = [f"model.path={tiny_models.directory(stage.folder / 'models', 'deep')}"] if stage.rehearse else []
    job = [*model, "model.dtype=float32", "engine.kernels=torch", "engine.max_sequences=2"]
    memory = "engine.kv_memory=64MiB" if stage.rehearse else "engine.kv_memory=1GiB"
    return [*job, memory, f"dataset.num_samples={12 if stage.rehearse else 24}", "generation.stop=length"]


def _steps(stage: Stage, name: str, *overrides: str, **how: Any) -> Steps[HarnessRun]:
    how["env"] = {**one_thread(stage), **how.get("env", {})}
    return harness_steps(stage, name, *overrides, timeout_s=within(stage, RUN_S), **how)


def _judge(run: HarnessRun, status: str, exit_status: int, *words: str) -> Verdict:
    """Returns whether a run ended as it should: by status, exit status and what its one line says."""
    row = run.row or {}
    wrong = [f"it does not say {word!r}" for word in words if word not in run.stderr_last]
    if row.get("status") != status:
        wrong.insert(0, f"status {row.get('status')}, not {status}")
    if run.status != exit_status:
        wrong.insert(0, f"exit status {run.status}, not {exit_status}")
    detail = ", ".join([*wrong, run.stderr_last.removeprefix("error: ")])
    return Verdict(Outcome.failed if wrong else Outcome.passed, detail, {"run_s": round(run.seconds, 1)})


# --- memory ---


def foreseen(stage: Stage) -> Steps[Verdict]:
    """A KV cache larger than any memory is refused before anything is loaded."""
    run = yield from _steps(stage, FORESEEN, "engine.kv_memory=1000000GiB", "dataset.num_samples=4")
    if stage.rehearse:
        return _judge(run, "invalid", 2, "engine.kv_memory: 1000000GiB asks for 1000000.0 GiB", "are free")
    return _judge(run, "invalid", 2, "a rank needs", "give engine.kv_memory at most")


def loading(stage: Stage) -> Steps[Verdict]:
    """Weights that no device holds, let through: status oom, and what to try."""
    if stage.rehearse:
        run = yield from _steps(stage, LOADING, *WIDE_CACHE, tick=_narrow)
        return _judge(run, "oom", 2, "out of memory of the host (", "; try ")
    # 276 GB; each weight is made on the device, so that nothing of it takes the host's memory.
    words = ["model=llama2_70b", "model.weights=dummy", "model.dtype=float32", "engine.kernels=torch"]
    run = yield from _steps(stage, LOADING, *words, "dataset=synthetic", "dataset.num_samples=4", "preflight=false")
    return _judge(run, "oom", 2, "out of memory of the GPU (", "; try model.dtype=bfloat16")


def _narrow(running: Running) -> None:
    """Leaves a run less address space than its KV cache takes."""
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(running.process.pid, resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))


def running_out(stage: Stage) -> Steps[Verdict]:
    """A batch whose keys and values, 780 GB, come to be in the first pass: status oom, and a smaller batch to try."""
    words = ["engine=ds_inference", "engine.batch_size=4096", "engine.batch_tokens=40000000", "preflight=false"]
    words += ["dataset=synthetic", "dataset.prompt=random", "dataset.num_samples=4096", "dataset.input_len=8"]
    run = yield from _steps(stage, RUNNING_OUT, *words, "dataset.output_len=8000", "generation.stop=length")
    return _judge(run, "oom", 2, "out of memory of the GPU (", "; try engine.batch_size=2048")


# --- ends ---


def timed_out(stage: Stage) -> Steps[Verdict]:
    """A run of minutes ends itself after ``timeout_s``."""
    seconds = 3 if stage.rehearse else 15
    run = yield from _steps(stage, TIMEOUT, "engine=baseline", "generation.stop=length", f"timeout_s={seconds}")
    return _judge(run, "timeout", 1, f"not finished after timeout_s={seconds}")


def undisturbed(stage: Stage, runs: dict[str, HarnessRun]) -> Steps[None]:
    """Runs a job that nothing disturbs, looks at its telemetry, and keeps it as ``undisturbed``."""
    before = _joules(stage)
    run = runs["undisturbed"] = yield from _steps(stage, TELEMETRY, *_work(stage))
    _telemetry(stage, run, before, _joules(stage)).report(stage, TELEMETRY)


def disturbed(stage: Stage, runs: dict[str, HarnessRun]) -> Steps[None]:
    """Runs the same job, ended by SIGTERM, resumed and killed, and resumed again, and keeps that as ``resumed``.

    An end that is not as it should be is reported at once.
    """
    first = yield from _steps(stage, "ended by SIGTERM", *_work(stage), tick=signalled(stage, signal.SIGTERM))
    verdict = _judge(first, "interrupted", 130, "interrupted", "resume=")
    if verdict.outcome is not Outcome.passed or first.directory is None:
        verdict.report(stage, RESUMED)
        return
    again = f"resume={first.directory.name}"
    second = yield from _steps(stage, "killed", again, tick=signalled(stage, signal.SIGKILL))
    verdict = _judge(_closed(stage, second), "failed", -signal.SIGKILL, "rank 0 was ended by signal SIGKILL", again)
    if verdict.outcome is not Outcome.passed:
        verdict.report(stage, RESUMED)
        return
    runs["resumed"] = yield from _steps(stage, "resumed", again)


def compared(stage: Stage, last: HarnessRun, whole: HarnessRun) -> Steps[Verdict]:
    """Returns whether the disturbed run has the tokens of the undisturbed one, and adds up."""
    for run in (last, whole):
        if not run.ok:
            return Verdict(Outcome.failed, run.how, figures_of(run))
    same = sum(last.token_ids.get(index) == ids for index, ids in whole.token_ids.items())
    figures = {**figures_of(last), "segments": len(last.record.get("segments", []))}
    count = len(whole.token_ids)
    detail = f"{same} of {count} requests as in the undisturbed run"
    if stage.rehearse:  # a judge takes a CPU too long
        return Verdict(Outcome.passed if same == count else Outcome.failed, detail, figures)
    verdict = yield from verdict_steps(stage, RESUMED, last, model=same < count, timeout_s=VERIFY_S)
    return replace(verdict, detail=f"{detail}; {verdict.detail}", figures=figures)


def signalled(stage: Stage, number: int) -> Callable[[Running], None]:
    """Returns what sends a signal, once, to a run that has finished some requests more than there were at first."""
    begun: list[int] = []
    sent: list[int] = []

    def tick(running: Running) -> None:
        directory = None if sent else directory_of(stage, running)
        if directory is None:
            return
        lines = directory / "completions.jsonl"
        finished = lines.read_bytes().count(b"\n") if lines.exists() else 0
        begun.append(finished)
        if finished >= begun[0] + MORE:
            running.process.send_signal(number)
            sent.append(number)

    return tick


def _closed(stage: Stage, run: HarnessRun) -> HarnessRun:
    """Returns a killed run once its record says how it ended, which another process writes."""
    assert run.directory is not None
    until = time.monotonic() + CLOSED_S
    while (read_record(stage.results, run.directory.name) or {}).get("status") == RUNNING and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(1.0)  # it says so after it has written it
    row = next((row for row in read_rows(stage.results / "runs.csv") if row["run_id"] == run.directory.name), None)
    return replace(run, row=row, stderr=(stage.folder / "killed.err").read_text(errors="replace"))


# --- GPUs ---


def gpus() -> list[tuple[str, float | None]]:
    """Returns of each GPU its UUID, and the joules it has counted so far; None where it counts none."""
    nvml: Any = importlib.import_module("pynvml")
    nvml.nvmlInit()
    found = []
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        uuid = nvml.nvmlDeviceGetUUID(handle)
        try:
            joules = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        except nvml.NVMLError:
            joules = None
        found.append((uuid.decode() if isinstance(uuid, bytes) else uuid, joules))
    return found


def by_uuid(stage: Stage, count: int) -> Steps[Verdict]:
    """A run on GPUs that ``CUDA_VISIBLE_DEVICES`` names by their UUIDs, the last ones first."""
    chosen = [uuid for uuid, _ in reversed(gpus())][:count]
    if len(chosen) < count:
        return Verdict(Outcome.skipped, f"needs {count} GPUs, this machine has {len(chosen)}", {})
    words = ["model.dtype=float32", "engine.kernels=torch", "engine.kv_memory=1GiB", "dataset.num_samples=8"]
    name = UUID if count == 1 else UUIDS
    env = {"CUDA_VISIBLE_DEVICES": ",".join(chosen)}
    run = yield from _steps(stage, name, *words, f"parallel.dp={count}", env=env)
    found = (run.record.get("telemetry") or {}).get("hosts") or [{}]
    seen = [gpu["index"] for gpu in found[0].get("gpus", [])]
    if not run.ok or run.row is None or run.row["device"] != "cuda":
        return Verdict(Outcome.failed, run.how, figures_of(run))
    if len(seen) != count:
        return Verdict(Outcome.failed, f"telemetry of {len(seen)} GPUs, not {count}", figures_of(run))
    return Verdict(Outcome.passed, f"CUDA_VISIBLE_DEVICES={env['CUDA_VISIBLE_DEVICES']}", figures_of(run))


def _joules(stage: Stage) -> float | None:
    """Returns what all GPUs have counted so far; None if one counts nothing."""
    counted = [] if stage.rehearse else [joules for _, joules in gpus()]
    return None if None in counted else sum(joules for joules in counted if joules is not None)


def _telemetry(stage: Stage, run: HarnessRun, before: float | None, after: float | None) -> Verdict:
    """Holds peak memory, energy and the busy share of a run against what the GPUs counted around it."""
    figures = figures_of(run)
    if not run.ok:
        return Verdict(Outcome.failed, run.how, figures)
    host = run.record["telemetry"]["hosts"][0]
    wrong = [] if host["samples"] else ["not one sample was taken"]
    wrong += [] if run.figure("peak_memory_bytes") else ["peak_memory_bytes is empty"]
    if not stage.rehearse:
        wrong += _of_gpu(run, host, None if before is None or after is None else after - before)
        seen = host["gpus"][0] if host["gpus"] else {}
        figures |= {key: value for key, value in seen.items() if isinstance(value, int | float)}
        figures["device_busy_share"] = run.figure("device_busy_share") or 0.0
    return Verdict(Outcome.failed if wrong else Outcome.passed, "; ".join(wrong), figures)


def _of_gpu(run: HarnessRun, host: dict[str, Any], joules: float | None) -> list[str]:
    """Returns what does not add up in a run's figures of its GPU; ``joules`` are all GPUs' around the run."""
    wrong = []
    if len(host["gpus"]) != 1:
        return [f"telemetry of {len(host['gpus'])} GPUs"]
    peak, used = run.figure("peak_memory_bytes") or 0.0, host["gpus"][0]["memory_used_peak_bytes"]
    if used is None or used < peak:
        wrong.append(f"NVML saw {used} bytes in use at most, the run {peak:.0f}")
    share = run.figure("device_busy_share")
    if share is None or not 0 < share <= 1:
        wrong.append(f"device_busy_share is {share}")
    energy = run.figure("energy_j")
    if joules is not None and (energy is None or not 0 < energy <= joules):
        wrong.append(f"energy_j is {energy}, and all GPUs drew {joules:.0f} J around the run")
    return wrong
