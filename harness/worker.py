"""One rank's run: load, warm up, generate, record."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from harness import checkpoint, environment, rank_setup, ranks, signals
from harness import job as jobs
from harness.errors import INTERRUPTED, REFUSED, UserError, one_line, report
from harness.job import Job
from harness.launcher import RUN_ID_VARIABLE
from harness.ranks import Rank
from harness.rendezvous import RankFailed, Rendezvous
from harness.results import UNHASHED_KEYS, RunRecorder, new_run_id
from harness.workload import Completion, Request

if TYPE_CHECKING:
    from harness.replicas import Replicas

log = logging.getLogger("harness")

LAST_WORDS_S = 1.0  # for a rank that ends to say why, after its connections have broken
PLACES = ("model.path", "model.tokenizer", "dataset.path")  # hosts may keep the same files in different places


def run(composed: DictConfig, rank: Rank) -> int:
    """Runs this rank's part of the job; returns the exit status.

    Rank 0 owns the run directory, the terminal and the row in ``runs.csv``; the others say what went
    wrong on standard error and leave.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings about lost peers would bury our own line
    resolved = jobs.resolved(composed)
    recorder: RunRecorder | None = None
    if rank.first:
        run_id = os.environ.get(RUN_ID_VARIABLE) or new_run_id(str(resolved["engine"].get("name")))
        try:
            recorder = RunRecorder.create(str(resolved["results_dir"]), run_id, resolved, sys.argv)
        except UserError as error:
            return report(error)
        _log_to(f"{recorder.directory}/run.log")
    running = False
    work: _Run | None = None
    # A thread cannot raise in this one; a signal can.
    rendezvous = Rendezvous(rank, failed=lambda: os.kill(os.getpid(), signal.SIGTERM))
    status, error_line, exit_status = "failed", "", 1

    def ending(signum: int) -> tuple[str, str, int]:
        if signum == signal.SIGALRM:
            return "timeout", f"not finished after timeout_s={resolved['timeout_s']}", 1
        if rank.world > 1 and signum == signal.SIGTERM:
            # So the launcher ends the others when a rank has died; a user's Ctrl-C comes as SIGINT.
            unknown = RankFailed("another rank died, or the launcher was ended")
            return _elsewhere(rendezvous.heard(LAST_WORDS_S) or unknown, running)
        return "interrupted", "interrupted", INTERRUPTED

    def hung(signum: int) -> None:
        status, error_line, exit_status = ending(signum)
        if recorder is not None:
            recorder.finish(status, error_line)
        print(f"error: {error_line}", file=sys.stderr, flush=True)
        rendezvous.fail(error_line, exit_status)
        os._exit(exit_status)

    try:
        with signals.handled(resolved.get("timeout_s"), hung):
            signals.end_with_the_parent()
            rendezvous.open()
            job = jobs.prepare(composed, rank.local_world)
            ranks.check_world(rank, job.config.parallel.tp, job.config.parallel.dp)
            rendezvous.meet(same_everywhere(job, resolved))
            work = _Run(job, rank, recorder, rendezvous)
            work.prepare()
            running = True
            work.go()
            return work.finish()
    except UserError as error:
        status, error_line, exit_status = "failed" if running else "invalid", str(error), REFUSED
    except RankFailed as failure:
        status, error_line, exit_status = _elsewhere(failure, running)
    except signals.Ended as end:
        status, error_line, exit_status = ending(end.signum)
    except Exception as error:
        # A rank that ends breaks its connections: why it ended says more than that they broke.
        cause = rendezvous.heard(LAST_WORDS_S)
        if cause is None:
            log.exception("the run failed")
        status, error_line, exit_status = _classify(error) if cause is None else _elsewhere(cause, running)
    if work is not None and work.replicas is not None:
        work.replicas.stop()
    if recorder is None:
        print(f"error: rank {rank.rank}: {error_line}", file=sys.stderr)
        _tell(rendezvous, error_line, exit_status)
        return exit_status
    log.error("%s: %s", status, error_line)
    kept = f" (what was finished is in {recorder.directory})" if running else ""
    try:
        recorder.finish(status, error_line, peak_memory_bytes=environment.peak_memory_bytes("cpu"))
    except UserError as error:
        kept = f"; and the record cannot be written: {error}"
    print(f"error: {error_line}{kept}", file=sys.stderr)
    _tell(rendezvous, error_line, exit_status)
    return exit_status


def _tell(rendezvous: Rendezvous, error_line: str, exit_status: int) -> None:
    """Tells the other ranks; meanwhile a signal ends this one, since there is nothing left to write down."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    rendezvous.fail(error_line, exit_status)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def same_everywhere(job: Job, resolved: dict[str, Any]) -> dict[str, Any]:
    """Returns, by name, what all ranks of a launch must agree on: every host composes and reads on its own."""
    facts: dict[str, Any] = {}
    for group, keys in resolved.items():
        if group not in UNHASHED_KEYS:
            facts |= {f"{group}.{key}": value for key, value in keys.items()} if isinstance(keys, dict) else {}
    for place in PLACES:
        del facts[place]
    facts["model.dtype"] = job.dtype
    facts["model's config.json"] = job.source.architecture
    facts["dataset's sha256"] = job.workload.sha256
    facts["DS_ACCELERATOR"] = job.accelerator
    return facts


def _elsewhere(failure: RankFailed, running: bool) -> tuple[str, str, int]:
    """Returns status, line and exit status of a run that another rank's failure ended."""
    status = {REFUSED: "failed" if running else "invalid", INTERRUPTED: "interrupted"}
    return status.get(failure.exit_status, "failed"), str(failure), failure.exit_status


class _Run:
    """The state of one rank between its phases."""

    def __init__(self, job: Job, rank: Rank, recorder: RunRecorder | None, rendezvous: Rendezvous) -> None:
        # Imported here: rich and the engines are not needed to refuse a config.
        from harness.display import console

        self.job = job
        self.rank = rank
        self.recorder = recorder
        self.rendezvous = rendezvous
        self.screen = console()
        self.notes: list[str] = []
        self.replicas: Replicas | None = None
        self.others: list[dict[str, Any]] = []
        self.booking = threading.Lock()
        self.done: set[int] = set()
        self.rejected = 0
        self.rejection: str | None = None

    def prepare(self) -> None:
        """Loads and warms the engine; all of it outside the clock."""
        from harness import engines, workload

        job, config = self.job, self.job.config
        rank_setup.use_cores(job, self.rank)
        if self.rank.world > 1:
            from harness.replicas import Replicas

            self.replicas = Replicas(self.rank, job.accelerator, self.rendezvous, config.parallel.tp)
            self.replicas.join()
        settings = rank_setup.engine_settings(job, self.rank, self.replicas)
        self.device = settings.device
        if config.model.dtype.value == "auto" and job.dtype == "float32":
            self.notes.append("this machine does not compute bfloat16: model.dtype=auto took float32")
        model = checkpoint.model_name(config.model, job.source)
        if model != config.model.name:
            self.notes.append(f"the checkpoint is not the one that model={config.model.name} describes; its own counts")
        self._note(
            model=model,
            dtype=job.dtype,
            job_hash=job.job_hash,
            requests=len(job.workload.requests),
            dataset_sha256=job.workload.sha256,
            device=job.accelerator,
            device_name=environment.device_name(job.accelerator),
            environment=environment.snapshot(job.accelerator),
        )
        self.engine = engines.create(settings)
        self._say(f"loading {model} ({job.dtype}) for {config.engine.name} on {self.device}")
        started = time.perf_counter()
        self.engine.load()
        self.load_s = time.perf_counter() - started
        self.workload = workload.resolve(
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
            load_s=self.load_s,
            warmup_s=self.warmup_s,
            left_out=self.workload.left_out or None,
        )
        self._say(f"running {len(self.workload.requests)} requests of {self.workload.name}")

    def go(self) -> None:
        """Runs every request; the clock is this method's loop."""
        from harness.accounting import ModelFlops, PromptLengths
        from harness.display import Display
        from harness.engines.base import Clock

        requests = self.engine.arrange(self.workload.requests)
        if not self.rank.first:
            self._follow(requests)
            return
        self.claims = PromptLengths({request.index: request.claimed_prompt_len for request in requests})
        self.flops = ModelFlops(self.job)
        estimates = {r.index: (r.claimed_prompt_len or len(r.prompt) // 3) + (r.output_len or 0) for r in requests}
        with Display(self.screen, estimates) as self.display:
            if self.recorder is not None:
                self.engine.on_pass = self.recorder.add_pass
            self.engine.on_progress = self.display.update
            mine = iter(requests)
            if self.replicas is not None:
                self.replicas.receive(self._deliver)
                mine = self.replicas.take(requests)
                self.replicas.barrier()
            clock = Clock()
            for completion in self.engine.generate(mine, clock):
                self._deliver(completion, elsewhere=False)
            self.elapsed_s = clock()
            self.others = list(self.replicas.wait().values()) if self.replicas is not None else []

    def _deliver(self, completion: Completion, elsewhere: bool = True) -> None:
        """Books a completion; another rank's come through a thread."""
        with self.booking:
            assert self.recorder is not None
            self.recorder.add(completion)
            self.claims.add(completion)
            self.flops.add(completion)
            self.done.add(completion.index)
            if completion.finish_reason == "rejected":
                self.rejected += 1
                self.rejection = completion.error
            self.display.request_done(completion, elsewhere)

    def _follow(self, requests: list[Request]) -> None:
        """Runs this rank's share and sends all of it to rank 0, or computes along with its model's leader."""
        from harness.engines.base import Clock

        assert self.replicas is not None
        leads = self.engine.settings.leads
        self.replicas.barrier()
        clock = Clock()
        if leads:
            for completion in self.engine.generate(self.replicas.take(requests), clock):
                self.replicas.send(completion)
        else:
            self.engine.follow()
        self.replicas.finish(
            {
                "elapsed_s": clock(),
                "statistics": dataclasses.asdict(self.engine.statistics) if leads else None,
                "peak_memory_bytes": environment.peak_memory_bytes(self.device),
            }
        )

    def finish(self) -> int:
        """Writes record and row and prints the summary; returns the exit status."""
        from harness.display import summary
        from harness.engines.base import EngineStatistics, combined

        if self.replicas is not None:
            self.replicas.leave()
        if not self.rank.first:
            return 0
        assert self.recorder is not None
        # From the first rank's start, which the barrier made everyone's, to the last one's end.
        elapsed_s = max([self.elapsed_s, *(other["elapsed_s"] for other in self.others)])
        peak_memory = [environment.peak_memory_bytes(self.device), *(o["peak_memory_bytes"] for o in self.others)]
        statistics = dataclasses.asdict(
            combined(
                [
                    self.engine.statistics,
                    *(EngineStatistics(**other["statistics"]) for other in self.others if other["statistics"]),
                ]
            )
        )
        times = {key: statistics.pop(key) for key in ("prefill_s", "decode_s", "tokenize_s", "detokenize_s")}
        times["host_s"] = elapsed_s - sum(times.values())
        missing = len(self.workload.requests) - len(self.done)
        if self.claims.differing:
            self.notes.append(self.claims.note())
        if self.job.config.generation.max_output_len is not None:
            self.notes.append(f"generation.max_output_len={self.job.config.generation.max_output_len} caps output_len")
        status, error = "ok", None
        if missing:
            status, error = "failed", f"{missing} of {len(self.workload.requests)} requests did not come back"
        elif self.rejected == len(self.done):
            status, error = "invalid", f"all {self.rejected} requests were rejected; the last: {self.rejection}"
        row = self.recorder.finish(
            status,
            error,
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
        )
        record = {
            "time": times,
            "engine_statistics": statistics,
            "notes": self.notes,
            "directory": self.recorder.directory,
            "results_dir": self.recorder.results_dir,
        }
        summary(self.screen, row, record)
        log.info("%s: %s total tokens/s", row["status"], row["total_tokens_per_s"])
        if error is not None:
            print(f"error: {error}", file=sys.stderr)
        return {"ok": 0, "invalid": REFUSED}.get(status, 1)

    def _note(self, **figures: Any) -> None:
        if self.recorder is not None:
            self.recorder.note(**figures)

    def _say(self, line: str) -> None:
        log.info(line)
        if self.rank.first:
            self.screen.print(line, markup=False)


def _classify(error: Exception) -> tuple[str, str, int]:
    """Returns status, line and exit status for an exception that is not the user's to read in full."""
    text = one_line(f"{type(error).__name__}: {error}", 300)
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text:
        hint = "lower engine.kv_memory, engine.token_budget, engine.max_sequences (ds_inference: engine.batch_tokens)"
        return "oom", f"out of memory ({text}); {hint}", 2
    return "failed", f"{text}; the traceback is in run.log", 1


def _log_to(path: str) -> None:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    log.setLevel(logging.INFO)
    logging.captureWarnings(True)
    warnings.simplefilter("default")
