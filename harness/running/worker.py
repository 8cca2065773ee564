"""One rank's run: load, warm up, generate, record."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from harness.basics.errors import INTERRUPTED, REFUSED, UserError, complain, one_line, printable, report
from harness.basics.outcome import Fault
from harness.machine import device, memory, snapshot
from harness.ranks import signals
from harness.ranks.rank import PARENT_VARIABLE, RUN_ID_VARIABLE, Rank, check_world
from harness.ranks.rendezvous import RankFailed, Rendezvous
from harness.results.directory import new_run_id
from harness.results.recorder import RunRecorder
from harness.running import faults, setup, watchdog
from harness.running import job as jobs
from harness.running.job import Job
from harness.running.launcher import myself
from harness.running.lifecycle import LAST_WORDS_S, _tell, same_everywhere
from harness.running.log import _log_to, log
from harness.workload.records import Completion, Request

if TYPE_CHECKING:
    from harness.basics.clock import Clock
    from harness.machine.telemetry import Sampler
    from harness.ranks.replicas import Replicas


def run(composed: DictConfig, rank: Rank, begun: tuple[RunRecorder, Job] | None = None) -> int:
    """Runs this rank's part of the job; returns the exit status.

    Rank 0 owns the run directory, the terminal and the row in ``runs.csv``; the others say what went
    wrong on standard error and leave.

    Args:
        begun: the record and the checked job, where this process has made them before it became the only rank.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings about lost peers would bury our own line
    resolved = jobs.resolved(composed)
    recorder: RunRecorder | None = None
    kills = memory.OomKills()
    if rank.first:
        try:
            recorder = _recorder(resolved) if begun is None else begun[0]
        except UserError as error:
            return report(error)
        if os.environ.get(PARENT_VARIABLE) in (None, str(os.getpid())):
            watchdog.watch(recorder.results_dir, recorder.run_id, resolved.get("timeout_s"))
        _log_to(f"{recorder.directory}/run.log")
    running = False
    work: _Run | None = None
    # A thread cannot raise in this one; a signal can.
    rendezvous = Rendezvous(rank, failed=lambda: os.kill(os.getpid(), signal.SIGTERM))

    def facts() -> dict[str, Any]:
        return {"phase": "load"} if work is None else work.facts

    def elsewhere(failure: RankFailed) -> Fault:
        if failure.status is not None:
            return Fault(failure.status, str(failure), failure.exit_status)
        if failure.died is not None and failure.host == rank.host and kills:
            return faults.killed(failure.died, 0, kills, resolved, facts())
        status = {REFUSED: "failed" if running else "invalid", INTERRUPTED: "interrupted"}
        return Fault(status.get(failure.exit_status, "failed"), str(failure), failure.exit_status)

    def ending(signum: int) -> Fault:
        if signum == signal.SIGALRM:
            return faults.timed_out(resolved["timeout_s"])
        if rank.world > 1 and signum == signal.SIGTERM:
            # So the launcher ends the others when a rank has died; a user's Ctrl-C comes as SIGINT.
            text = "another rank died, or the launcher was ended"
            return elsewhere(
                rendezvous.heard(LAST_WORDS_S) or RankFailed(text, died="another rank of this host", host=rank.host)
            )
        return Fault("interrupted", "interrupted", INTERRUPTED)

    def lost() -> Fault | None:
        gone = recorder.gone() if recorder is not None else None
        return None if gone is None else Fault("failed", str(gone), REFUSED)

    def hung(signum: int) -> None:
        gone = lost()
        fault = gone or ending(signum)
        line = f"rank {rank.rank}: {fault.error}"
        try:
            if recorder is not None:
                kept = f" ({faults.way_on(recorder.directory, recorder.run_id)})" if running and gone is None else ""
                line = fault.error + kept
                recorder.finish(fault.status, fault.error, **({} if work is None else work.measured()))
        finally:  # whatever it is that cannot be written
            complain(line)
            rendezvous.fail(fault.error, fault.exit_status, fault.status)
            os._exit(fault.exit_status)

    try:
        with signals.handled(resolved.get("timeout_s"), hung):
            if begun is None:
                signals.end_with_the_parent()
            if recorder is not None:
                recorder.watch_files(lost=lambda: os.kill(os.getpid(), signal.SIGTERM))
            rendezvous.open()
            if begun is None:
                job = together(lambda config: jobs.prepare(config, rank), composed, rank, rendezvous)
            else:
                job = begun[1]
            resolved.update(job.settings)
            work = _Run(job, rank, recorder, rendezvous)
            work.prepare()
            running = True
            work.go()
            return work.finish()
    except UserError as error:
        fault = Fault("failed" if running else "invalid", str(error), REFUSED)
        if work is not None and memory.out_of_memory(error):
            fault = faults.classify(error, resolved, facts())
    except RankFailed as failure:
        fault = elsewhere(failure)
    except signals.Ended as end:
        fault = ending(end.signum)
    except Exception as error:
        # A rank that ends breaks its connections: why it ended says more than that they broke.
        cause = rendezvous.heard(LAST_WORDS_S)
        if cause is None:
            log.exception("the run failed")
        fault = faults.classify(error, resolved, facts()) if cause is None else elsewhere(cause)
    if work is not None and work.replicas is not None:
        work.replicas.stop()
    measured = {} if work is None else work.measured()
    if recorder is None:
        complain(f"rank {rank.rank}: {fault.error}")
        _tell(rendezvous, fault)
        return fault.exit_status
    if (gone := lost()) is not None:
        with contextlib.suppress(UserError):  # there may be nowhere to write it
            recorder.finish(gone.status, gone.error, **measured)
        complain(gone.error)
        _tell(rendezvous, gone)
        return gone.exit_status
    log.error("%s: %s", fault.status, fault.error)
    kept = f" ({faults.way_on(recorder.directory, recorder.run_id)})" if running else ""
    try:
        row = recorder.finish(fault.status, fault.error, **measured)
        if row["status"] == "ok":
            kept = " (the run is complete)"
    except UserError as error:
        kept = f"{kept}; its row cannot be written either" if running else f"; nor can its row be written: {error}"
    complain(f"{fault.error}{kept}")
    _tell(rendezvous, fault)
    return fault.exit_status


def _recorder(resolved: dict[str, Any]) -> RunRecorder:
    """Returns what writes the run: a new one, the one that the launcher made, or the one to go on with."""
    results_dir, launched = str(resolved["results_dir"]), os.environ.get(RUN_ID_VARIABLE)
    if launched is None and resolved["resume"] is not None:
        return RunRecorder.resume(results_dir, str(resolved["resume"]), resolved, sys.argv)
    run_id = launched or new_run_id(str(resolved["engine"].get("name")))
    parent = None if launched is None else myself(int(os.environ[PARENT_VARIABLE]))
    return RunRecorder.create(results_dir, run_id, resolved, sys.argv, hold=True, launcher=parent)


def together(prepare: Callable[[DictConfig], Job], composed: DictConfig, rank: Rank, rendezvous: Rendezvous) -> Job:
    """Returns the job once all ranks are there and about to run it, split as rank 0 has split it.

    What fits is a question of free memory, which another rank may have found otherwise a moment later.
    """
    job = prepare(composed)
    check_world(rank, job.tp, job.dp)
    tp, dp = rendezvous.meet(same_everywhere(job), (job.tp, job.dp))
    return job if (tp, dp) == (job.tp, job.dp) else prepare(jobs.with_split(composed, tp, dp))


class _Run:
    """The state of one rank between its phases."""

    def __init__(self, job: Job, rank: Rank, recorder: RunRecorder | None, rendezvous: Rendezvous) -> None:
        # Imported here: rich and the engines are not needed to refuse a config.
        from harness.basics.terminal import console

        self.job = job
        self.rank = rank
        self.recorder = recorder
        self.rendezvous = rendezvous
        self.screen = console()
        self.notes: list[str] = []
        self.replicas: Replicas | None = None
        self.telemetry: Sampler | None = None
        self.facts: dict[str, Any] = {"phase": "load", "dtype": job.dtype}  # for advice when memory runs out
        self.others: list[dict[str, Any]] = []
        self.booking = threading.Lock()
        self.done: set[int] = set()
        self.twice: set[int] = set()
        self.rejected = 0
        self.rejection: str | None = None
        self.clock: Clock | None = None
        self.elapsed_s: float | None = None

    @property
    def clock_s(self) -> float | None:
        """The run's clock, stopped or not; None where it has not been started."""
        return self.elapsed_s if self.elapsed_s is not None or self.clock is None else self.clock()

    def prepare(self) -> None:
        """Loads and warms the engine; all of it outside the clock."""
        from harness.engines import catalogue
        from harness.engines.proof import proof
        from harness.models.loaded import identity
        from harness.running.sampling import of_rank
        from harness.workload import reading

        job, config = self.job, self.job.config
        setup.use_cores(job, self.rank)
        # The baseline spreads a large model over all the GPUs there are.
        directory = self.recorder.directory if self.recorder is not None else None
        self.telemetry = of_rank(self.rank, job.accelerator, config.engine.name == "baseline", directory)
        if self.rank.world > 1:
            from harness.ranks.replicas import Replicas

            self.replicas = Replicas(self.rank, job.accelerator, self.rendezvous, job.tp)
            self.replicas.join()
        settings = setup.engine_settings(job, self.rank, self.replicas)
        self.device = settings.device
        if config.model.dtype.value == "auto" and job.dtype == "float32":
            self.notes.append("this machine does not compute bfloat16: model.dtype=auto took float32")
        model = job.work["model"]
        if model != config.model.name:
            self.notes.append(f"the checkpoint is not the one that model={config.model.name} describes; its own counts")
        if self.recorder is not None:
            self.recorder.check_work(**job.work)
            if RUN_ID_VARIABLE not in os.environ:  # else the launching parent has done it
                self.recorder.settle(job.settings, split=job.split.record)
        self._note(
            **job.work,
            job_hash=job.job_hash,
            requests=len(job.workload.requests),
            device=job.accelerator,
            device_name=device.device_name(job.accelerator),
            environment=snapshot.snapshot(job.accelerator),
            phase="load",
        )
        self.engine = catalogue.create(settings)
        self._say(f"loading {model} ({job.dtype}) for {config.engine.name} on {self.device}")
        started = time.perf_counter()
        try:
            self.engine = proof.load(self.engine, self._say)
        finally:
            self.facts["phase"] = self.engine.phase
        proven = self.engine.proof or {}
        self.load_s = time.perf_counter() - started - proven.get("seconds", 0.0)
        self.facts["phase"] = "run"
        self._note(load_s=self.load_s, proof=self.engine.proof, phase="run")
        self.workload = reading.resolve(
            job.workload,
            config.generation,
            vocab_size=job.source.architecture.get("vocab_size"),
            count_tokens=lambda texts: [len(ids) for ids in self.engine.tokenizer(texts).input_ids],
        )
        started = time.perf_counter()
        self.engine.warm_up()
        self.warmup_s = time.perf_counter() - started
        self.notes += self.engine.notes
        self._note(
            requests=len(self.workload.requests),
            kernels=self.engine.kernels,
            **self.engine.limits,
            warmup_s=self.warmup_s,
            left_out=self.workload.left_out or None,
        )
        if self.recorder is not None:
            self._note(loaded=identity(self.recorder.record, job.source))
        self._say(f"running {len(self.workload.requests)} requests of {self.workload.name}")

    def go(self) -> None:
        """Runs every request; the clock is this method's loop."""
        from harness.basics.clock import Clock
        from harness.running.accounting import ModelFlops, PromptLengths
        from harness.running.progress import Display

        requests = self.engine.arrange(self.workload.requests)
        if self.rank.first:
            self.claims = PromptLengths({request.index: request.claimed_prompt_len for request in requests})
            self.flops = ModelFlops(self.job)
        already_s = self._take_up()
        requests = [request for request in requests if request.index not in self.done]
        if not self.rank.first:
            self._follow(requests, already_s)
            return
        estimates = {r.index: (r.claimed_prompt_len or len(r.prompt) // 3) + (r.output_len or 0) for r in requests}
        with Display(self.screen, estimates, len(self.done)) as self.display:
            if self.recorder is not None:
                self.engine.on_pass = self.recorder.add_pass
            self.engine.on_progress = self.display.update
            mine = iter(requests)
            if self.replicas is not None:
                self.replicas.receive(self._deliver)
                mine = self.replicas.take(requests)
                self.replicas.barrier()
            self.clock = clock = Clock(already_s)
            if self.recorder is not None:
                self.recorder.clock_started(clock())
            if self.telemetry is not None:
                self.telemetry.clock_started(clock)
            for completion in self.engine.generate(mine, clock):
                self._deliver(completion, elsewhere=False)
            self.elapsed_s = clock()
            self.others = list(self.replicas.wait().values()) if self.replicas is not None else []
            if self.telemetry is not None:
                self.telemetry.stop()

    def _take_up(self) -> float:
        """Books what earlier segments of a resumed run have done, and returns the seconds that they took."""
        completions, already_s = [], 0.0
        if self.recorder is not None:
            completions, already_s = self.recorder.done(), self.recorder.clock_s
        known = {request.index for request in self.workload.requests}
        for completion in completions:
            if completion.index not in known:
                raise UserError("resume", f"request {completion.index} is not in the dataset", "start a new run")
            self._book(completion)
        if self.replicas is not None:
            indices, already_s = self.replicas.share((sorted(self.done), already_s))
            self.done.update(indices)
        if self.done:
            self._say(f"resuming after {already_s:,.1f} s: {len(self.done)} requests are done")
        return already_s

    def _deliver(self, completion: Completion, elsewhere: bool = True) -> None:
        """Writes and books a completion; another rank's come through a thread."""
        with self.booking:
            assert self.recorder is not None
            if self.replicas is not None and not elsewhere:
                self.replicas.check()
            self.recorder.add(completion)
            self._book(completion)
            self.display.request_done(completion, elsewhere)

    def _book(self, completion: Completion) -> None:
        self.claims.add(completion)
        self.flops.add(completion)
        if completion.index in self.done:
            self.twice.add(completion.index)
        self.done.add(completion.index)
        if completion.finish_reason == "rejected":
            self.rejected += 1
            self.rejection = completion.error

    def _follow(self, requests: list[Request], already_s: float) -> None:
        """Runs this rank's share and sends all of it to rank 0, or computes along with its model's leader."""
        from harness.basics.clock import Clock

        assert self.replicas is not None
        leads = self.engine.settings.leads
        self.replicas.barrier()
        clock = Clock(already_s)
        if self.telemetry is not None:
            self.telemetry.clock_started(clock)
        if leads:
            for completion in self.engine.generate(self.replicas.take(requests), clock):
                self.replicas.send(completion)
        else:
            self.engine.follow()
        elapsed_s = clock()
        figures: dict[str, Any] = {
            "elapsed_s": elapsed_s,
            "statistics": dataclasses.asdict(self.engine.statistics) if leads else None,
            "peak_memory_bytes": memory.peak_memory_bytes(self.device),
        }
        if self.telemetry is not None:
            self.telemetry.stop()
            figures["telemetry"] = self.telemetry.summary(elapsed_s)
        self.replicas.finish(figures)

    def finish(self) -> int:
        """Writes record and row and prints the summary; returns the exit status."""
        from harness.engines.base import EngineStatistics, combined
        from harness.machine.telemetry import across_hosts
        from harness.results.summary import summary

        if self.replicas is not None:
            self.replicas.leave()
        if not self.rank.first:
            return 0
        assert self.recorder is not None
        assert self.elapsed_s is not None and self.clock is not None
        # From the first rank's start, which the barrier made everyone's, to the last one's end.
        elapsed_s = max([self.elapsed_s, *(other["elapsed_s"] for other in self.others)])
        peak_memory = [memory.peak_memory_bytes(self.device), *(o["peak_memory_bytes"] for o in self.others)]
        statistics = dataclasses.asdict(
            combined(
                [
                    self.engine.statistics,
                    *(EngineStatistics(**other["statistics"]) for other in self.others if other["statistics"]),
                ]
            )
        )
        times = {key: statistics.pop(key) for key in ("prefill_s", "decode_s", "tokenize_s", "detokenize_s")}
        times["host_s"] = elapsed_s - self.recorder.clock_s - sum(times.values())
        missing = len(self.workload.requests) - len(self.done)
        if self.claims.differing:
            self.notes.append(self.claims.note())
        if self.job.config.generation.max_output_len is not None:
            self.notes.append(f"generation.max_output_len={self.job.config.generation.max_output_len} caps output_len")
        hosts = [None if self.telemetry is None else self.telemetry.summary(elapsed_s)]
        hosts += [other["telemetry"] for other in self.others if "telemetry" in other]
        measured = across_hosts(hosts, self.job.accelerator)
        status, error = "ok", None
        if missing:
            status, error = "failed", f"{missing} of {len(self.workload.requests)} requests did not come back"
        elif self.twice:
            status, error = "failed", f"{len(self.twice)} requests came back twice, the first: {min(self.twice)}"
        elif self.rejected == len(self.done):
            status, error = "invalid", f"all {self.rejected} requests were rejected; the last: {self.rejection}"
        row = self.recorder.finish(
            status,
            error,
            expected=len(self.workload.requests),
            elapsed_s=elapsed_s,
            steps=statistics["steps"],
            preemptions=statistics["preemptions"],
            kv_peak_utilisation=statistics["kv_peak_utilisation"],
            peak_memory_bytes=max(peak_memory),
            model_flops_utilisation=self.flops.utilisation(elapsed_s),
            model_flops=self.flops.total or None,
            time=times,
            engine_statistics=statistics,
            prompt_len_check=self.claims.record(),
            notes=self.notes,
            energy_j=measured["energy_j"],
            telemetry=measured,
        )
        status, error = row["status"], row["error"]
        if self.job.config.verify and status == "ok":
            row, error = self._verify(row)
            status = row["status"]
        places = {"directory": self.recorder.directory, "results_dir": self.recorder.results_dir}
        summary(self.screen, row, self.recorder.record | places)
        log.info("%s: %s total tokens/s", row["status"], row["total_tokens_per_s"])
        if error is not None:
            complain(error)
        return {"ok": 0, "invalid": REFUSED}.get(status, 1)

    def _verify(self, row: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
        """Checks random requests against Hugging Face; returns the row then, and why the run is not ok if it is not.

        The row is written already: whatever happens here, no completion is lost. But a run that was to be checked and
        was not is not ok: ``resume`` checks again.
        """
        assert self.recorder is not None
        notes = list(self.recorder.record["notes"])
        figures: dict[str, Any] = {}
        error: str | None
        try:
            found = self._parity()
            checked, exact, near, wrong = (found[name] for name in ("checked", "exact", "near_tie", "wrong"))
            figures = {
                "parity": found,
                "parity_checked": checked,
                "parity_exact_share": exact / checked,
                "parity_explained_share": near / checked,
            }
            error = self._wrong(found) if wrong else None
            if wrong and error is None:
                notes.append(f"{wrong} of {checked} checked outputs differ by more than rounding: quantized weights")
        except (Exception, signals.Ended) as failure:
            interrupted = isinstance(failure, signals.Ended)
            why = "interrupted" if interrupted else one_line(str(failure) or type(failure).__name__, 300)
            error = f"verify={self.job.config.verify}: nothing was checked: {why}; the completions are all there"
            log.info(error)
        return self.recorder.amend("ok" if error is None else "failed", error, notes=notes, **figures), error

    def _parity(self) -> dict[str, Any]:
        """Returns the record's section ``parity``, of as many random requests as the config asks for, or of all."""
        from harness.verify import in_run

        assert self.recorder is not None
        config = self.job.config
        completions = {entry.index: entry for entry in self.recorder.done() if entry.finish_reason != "rejected"}
        chosen = in_run.sample(list(completions), config.verify, self.recorder.run_id)
        by_index = {request.index: request for request in self.workload.requests}
        requests = [by_index[index] for index in chosen]
        prompts = self.engine.tokenize(requests)
        if self.job.source.kind == "dummy" and self.engine.kernels == "deepspeed":
            raise UserError("verify", "these kernels draw dummy weights of their own", "use a checkpoint")
        del self.engine  # its memory is the reference's
        asked = f"verify={config.verify}; not in the clock"
        self._say(f"checking {len(chosen)} requests against Hugging Face ({asked})")
        return in_run.of_run(self.job, self.device, requests, prompts, [completions[index] for index in chosen])

    def _wrong(self, found: dict[str, Any]) -> str | None:
        """Returns why a run with wrong outputs failed; None where quantized weights may have made them."""
        assert self.recorder is not None
        if self.job.config.engine.quantization is not None:
            return None
        first = next(one for one in found["requests"] if one["verdict"] == "wrong")
        return (
            f"{found['wrong']} of {found['checked']} checked outputs are wrong, the first is request {first['index']}: "
            f"{first['problem']}; see python -m harness.verify {self.recorder.run_id} --model"
        )

    def measured(self) -> dict[str, Any]:
        """Returns what a run that ends early has for its record, and ends the sampling."""
        from harness.machine.telemetry import across_hosts

        figures: dict[str, Any] = {"clock_s": self.clock_s}
        with contextlib.suppress(AttributeError, RuntimeError):  # no device yet, or one that does not answer any more
            figures["peak_memory_bytes"] = memory.peak_memory_bytes(self.device)
        if self.telemetry is not None:
            self.telemetry.stop()
            figures["telemetry"] = across_hosts([self.telemetry.summary()], self.job.accelerator)
        return figures

    def _note(self, **figures: Any) -> None:
        if self.recorder is not None:
            self.recorder.note(**figures)

    def _say(self, line: str) -> None:
        log.info(line)
        if self.rank.first:
            self.screen.print(printable(line), markup=False)
