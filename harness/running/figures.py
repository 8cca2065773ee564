"""What came of a run, summed up after its clock: the row, the summary, and the check against Hugging Face."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from harness.basics.errors import REFUSED, UserError, complain, one_line
from harness.engines.statistics import EngineStatistics, merged_statistics
from harness.machine import memory
from harness.machine.telemetry import INTERVAL_S, across_hosts
from harness.ranks import signals
from harness.results import batch_output
from harness.results.power_limit import judged
from harness.results.recorder import RunRecorder
from harness.results.summary import summary
from harness.running import tracking
from harness.running.context import RunContext
from harness.running.delivering import Delivery
from harness.running.log import log


def conclude(run: RunContext, delivery: Delivery) -> int:
    """Writes record and row and prints the summary; returns the exit status. Rank 0's."""
    recorder = run.recorder
    assert recorder is not None
    status, error = _verdict(delivery)
    row = recorder.finish(status, error, expected=len(delivery.loaded.workload.requests), **_figures(run, delivery))
    if run.job.config.export is not None and row["status"] in ("ok", "invalid"):
        row = _export(run, delivery, recorder, row)
    status, error = row["status"], row["error"]
    if run.job.config.verify and status == "ok":
        row, error = _verify(run, delivery, recorder)
    places = {"directory": recorder.directory, "results_dir": recorder.results_dir}
    summary(run.screen, row, recorder.record | places)
    log.info("%s: %s total tokens/s", row["status"], row["total_tokens_per_s"])
    if error is not None:
        complain(error)
    if (line := tracking.send(run.job.config.tracking, recorder)) is not None:
        run.say(line)
    return {"ok": 0, "invalid": REFUSED}.get(row["status"], 1)


def of_an_early_end(run: RunContext, clock_s: float | None) -> dict[str, Any]:
    """Returns what a run that ends early has for its record, and ends the sampling."""
    figures: dict[str, Any] = {"clock_s": clock_s}
    if run.device is not None:
        with contextlib.suppress(RuntimeError):  # one that does not answer any more
            figures["peak_memory_bytes"] = memory.peak_memory_bytes(run.device)
    if run.telemetry is not None:
        run.telemetry.stop()
        figures["telemetry"] = across_hosts([run.telemetry.summary()], run.job.accelerator)
        figures["others_cpu_share"] = figures["telemetry"]["others_cpu_share"]
        figures |= _power(run, [None] if run.rank.several_hosts else [])
    return figures


def _verdict(delivery: Delivery) -> tuple[str, str | None]:
    """Returns the status of a run that has come to its end, and why it is not ok if it is not."""
    requests = len(delivery.loaded.workload.requests)
    if missing := requests - len(delivery.done):
        return "failed", f"{missing} of {requests} requests did not come back"
    if delivery.twice:
        return "failed", f"{len(delivery.twice)} requests came back twice, the first: {min(delivery.twice)}"
    if delivery.rejected == len(delivery.done):
        return "invalid", f"all {delivery.rejected} requests were rejected; the last: {delivery.rejection}"
    return "ok", None


def _figures(run: RunContext, delivery: Delivery) -> dict[str, Any]:
    """Returns what the record and the row say of a run, of all its ranks together."""
    engine, others = delivery.loaded.engine, delivery.others
    assert delivery.elapsed_s is not None and run.recorder is not None
    # From the first rank's start, which the barrier made everyone's, to the last one's end.
    elapsed_s = max([delivery.elapsed_s, *(other["elapsed_s"] for other in others)])
    peak_memory = [engine.peak_memory_bytes(), *(other["peak_memory_bytes"] for other in others)]
    elsewhere = [EngineStatistics(**other["statistics"]) for other in others if other["statistics"]]
    statistics = dataclasses.asdict(merged_statistics([engine.statistics, *elsewhere]))
    times = {key: statistics.pop(key) for key in ("prefill_s", "decode_s", "tokenize_s", "detokenize_s")}
    times["host_s"] = elapsed_s - run.recorder.clock_s - sum(times.values())
    busy_s = statistics["device_busy_s"]
    hosts = [None if run.telemetry is None else run.telemetry.summary(elapsed_s)]
    hosts += [other["telemetry"] for other in others if "telemetry" in other]
    telemetry = across_hosts(hosts, run.job.accelerator)
    return {
        "elapsed_s": elapsed_s,
        "steps": statistics["steps"],
        "preemptions": statistics["preemptions"],
        "draft_tokens": statistics["draft_tokens"],
        "accepted_draft_tokens": statistics["accepted_draft_tokens"],
        "kv_peak_utilisation": statistics["kv_peak_utilisation"],
        "peak_memory_bytes": max(peak_memory),
        "device_busy_share": None if busy_s is None else busy_s / (elapsed_s - run.recorder.clock_s),
        "model_flops_utilisation": delivery.flops.utilisation(elapsed_s),
        "model_flops": delivery.flops.total or None,
        "time": times,
        "engine_statistics": statistics,
        "replicas": _replicas(delivery, run.job.tp),
        "prompt_len_check": delivery.claims.record(),
        "notes": _notes(run, delivery),
        "energy_j": telemetry["energy_j"],
        "others_cpu_share": telemetry["others_cpu_share"],
        "telemetry": telemetry,
        **_power(run, [other["power"] for other in others if "power" in other]),
    }


def _power(run: RunContext, elsewhere: list[dict[str, Any] | None]) -> dict[str, Any]:
    """Returns the verdict on the power limit, where there is one.

    Args:
        elsewhere: what the samplers of the other hosts say.
    """
    if (limit_w := run.job.config.power_limit_w) is None:
        return {}
    hosts = [None if run.telemetry is None else run.telemetry.power(), *elsewhere]
    return {"power": judged(limit_w, hosts, INTERVAL_S)}


def _replicas(delivery: Delivery, tp: int) -> list[dict[str, Any]]:
    """Returns what each replica did, by the rank that led it; none for an engine whose passes are not counted."""
    assert delivery.elapsed_s is not None
    engine = delivery.loaded.engine
    played = engine.played or [(delivery.elapsed_s, engine.statistics)]
    here = [
        {"rank": number * tp, "elapsed_s": ended_s, "statistics": statistics}
        for number, (ended_s, statistics) in enumerate(played)
    ]
    others = [
        {**one, "statistics": EngineStatistics(**one["statistics"])} for one in delivery.others if one["statistics"]
    ]
    return [
        {
            "rank": one["rank"],
            "elapsed_s": one["elapsed_s"],
            "passes": statistics.steps,
            "tokens": round((statistics.steps or 0) * (statistics.mean_tokens_per_pass or 0)),
            "forward_s": statistics.prefill_s + statistics.decode_s,
        }
        for one in (*here, *others)
        if (statistics := one["statistics"]).mean_tokens_per_pass is not None
    ]


def _notes(run: RunContext, delivery: Delivery) -> list[str]:
    notes = list(run.notes)
    if delivery.claims.differing:
        notes.append(delivery.claims.note())
    if (cap := run.job.config.generation.max_output_len) is not None:
        notes.append(f"generation.max_output_len={cap} caps output_len")
    if any("\\n" in string for string in run.job.config.generation.stop_strings):
        how = "for a line break write $'generation.stop_strings=[\"\\n\"]' in bash"
        notes.append(f"a stop string has a backslash and an n in it: {how}")
    return notes


def _export(run: RunContext, delivery: Delivery, recorder: RunRecorder, row: dict[str, Any]) -> dict[str, Any]:
    """Writes the completions in another format too; returns the row then.

    A run whose file was asked for and is not there has failed: ``resume`` writes it.
    """
    config, requests = run.job.config, delivery.loaded.workload.requests
    assert config.export is not None
    try:
        batch_output.write(recorder.directory, recorder.record, requests, config.dataset.chat_template)
        return row
    except UserError as failure:
        error = f"export={config.export.value}: {failure}; the completions are all there"
        log.info(error)
        return recorder.amend("failed", error)


def _verify(run: RunContext, delivery: Delivery, recorder: RunRecorder) -> tuple[dict[str, Any], str | None]:
    """Checks random requests against Hugging Face; returns the row then, and why the run is not ok if it is not.

    The row is written already: whatever happens here, no completion is lost. But a run that was to be checked and
    was not is not ok: ``resume`` checks again.
    """
    notes = list(recorder.record["notes"])
    figures: dict[str, Any] = {}
    error: str | None
    try:
        found = _parity(run, delivery, recorder)
        checked, exact, near, wrong = (found[name] for name in ("checked", "exact", "near_tie", "wrong"))
        figures = {
            "parity": found,
            "parity_checked": checked,
            "parity_exact_share": exact / checked,
            "parity_explained_share": near / checked,
        }
        error = _wrong(run, recorder.run_id, found) if wrong else None
        if wrong and error is None:
            notes.append(f"{wrong} of {checked} checked outputs differ by more than rounding: quantized weights")
    except (Exception, signals.Ended) as failure:
        interrupted = isinstance(failure, signals.Ended)
        why = "interrupted" if interrupted else one_line(str(failure) or type(failure).__name__, 300)
        error = f"verify={run.job.config.verify}: nothing was checked: {why}; the completions are all there"
        log.info(error)
    return recorder.amend("ok" if error is None else "failed", error, notes=notes, **figures), error


def _parity(run: RunContext, delivery: Delivery, recorder: RunRecorder) -> dict[str, Any]:
    """Returns the record's section ``parity``, of as many random requests as the config asks for, or of all."""
    from harness.verify import in_run  # imports transformers

    config, loaded = run.job.config, delivery.loaded
    completions = {entry.index: entry for entry in recorder.done() if entry.finish_reason != "rejected"}
    chosen = in_run.sample(list(completions), config.verify, recorder.run_id)
    by_index = {request.index: request for request in loaded.workload.requests}
    requests = [by_index[index] for index in chosen]
    prompts = loaded.engine.tokenize(requests)
    device = loaded.engine.settings.device
    if run.job.source.kind == "dummy" and loaded.engine.kernels == "deepspeed":
        raise UserError("verify", "these kernels draw dummy weights of their own", "use a checkpoint")
    del loaded.engine  # its memory is the reference's
    asked = f"verify={config.verify}; not in the clock"
    run.say(f"checking {len(chosen)} requests against Hugging Face ({asked})")
    return in_run.of_run(run.job, device, requests, prompts, [completions[index] for index in chosen])


def _wrong(run: RunContext, run_id: str, found: dict[str, Any]) -> str | None:
    """Returns why a run with wrong outputs failed; None where quantized weights may have made them."""
    if getattr(run.job.config.engine, "quantization", None) is not None:
        return None
    first = next(one for one in found["requests"] if one["verdict"] == "wrong")
    return (
        f"{found['wrong']} of {found['checked']} checked outputs are wrong, the first is request {first['index']}: "
        f"{first['problem']}; see python -m harness.verify {run_id} --model"
    )
