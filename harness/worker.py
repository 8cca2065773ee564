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
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil
from omegaconf import DictConfig

from harness import checkpoint, environment, ranks
from harness import job as jobs
from harness.errors import INTERRUPTED, REFUSED, UserError, one_line, report
from harness.job import Job
from harness.launcher import PARENT_VARIABLE, RUN_ID_VARIABLE
from harness.ranks import Rank
from harness.results import RunRecorder, new_run_id
from harness.workload import Completion, Request

if TYPE_CHECKING:
    from harness.replicas import Replicas

log = logging.getLogger("harness")


class Interrupted(BaseException):
    """A signal asked the run to end: not an Exception, so that no library swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class TimedOut(BaseException):
    """``timeout_s`` has passed."""


def run(composed: DictConfig, rank: Rank) -> int:
    """Runs this rank's part of the job; returns the exit status.

    Rank 0 owns the run directory, the terminal and the row in ``runs.csv``; the others say what went
    wrong on standard error and leave.
    """
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
    status, error_line, exit_status = "failed", "", 1
    try:
        with _signals(resolved.get("timeout_s")):
            _end_with_the_parent()
            job = jobs.prepare(composed)
            ranks.check_world(rank, job.config.parallel.tp, job.config.parallel.dp)
            work = _Run(job, rank, recorder)
            work.prepare()
            running = True
            work.go()
            return work.finish()
    except UserError as error:
        status, error_line, exit_status = "failed" if running else "invalid", str(error), REFUSED
    except Interrupted as interrupt:
        status, error_line, exit_status = "interrupted", "interrupted", INTERRUPTED
        if rank.world > 1 and interrupt.signum == signal.SIGTERM:
            # So the launcher ends the others when a rank has died; a user's Ctrl-C comes as SIGINT.
            failure = work.replicas.failure if work is not None and work.replicas is not None else None
            status, error_line, exit_status = "failed", failure or "another rank died, or the launcher was ended", 1
    except TimedOut:
        status, error_line = "timeout", f"not finished after timeout_s={resolved['timeout_s']}"
    except Exception as error:
        log.exception("the run failed")
        status, error_line, exit_status = _classify(error)
    if recorder is None:
        if work is not None and work.replicas is not None:
            work.replicas.fail(error_line)
        print(f"error: rank {rank.rank}: {error_line}", file=sys.stderr)
        return exit_status
    log.error("%s: %s", status, error_line)
    kept = f" (what was finished is in {recorder.directory})" if running else ""
    try:
        recorder.finish(status, error_line, peak_memory_bytes=environment.peak_memory_bytes("cpu"))
    except UserError as error:
        kept = f"; and the record cannot be written: {error}"
    print(f"error: {error_line}{kept}", file=sys.stderr)
    return exit_status


class _Run:
    """The state of one rank between its phases."""

    def __init__(self, job: Job, rank: Rank, recorder: RunRecorder | None) -> None:
        # Imported here: rich and the engines are not needed to refuse a config.
        from harness.display import console

        self.job = job
        self.rank = rank
        self.recorder = recorder
        self.screen = console()
        self.notes: list[str] = []
        self.replicas: Replicas | None = None
        self.others: list[dict[str, Any]] = []

    def prepare(self) -> None:
        """Loads and warms the engine; all of it outside the clock."""
        from harness import engines, workload
        from harness.engines.base import EngineSettings

        job, config = self.job, self.job.config
        self._use_cores()
        if self.rank.world > 1:
            from harness.replicas import Replicas

            self.replicas = Replicas(self.rank, job.accelerator, config.parallel.tp)
            self.replicas.join()
        device = "cpu" if job.accelerator == "cpu" else f"cuda:{self.rank.local_rank}"
        self.device = device
        if config.model.dtype.value == "auto" and job.dtype == "float32":
            self.notes.append("this machine does not compute bfloat16: model.dtype=auto took float32")
        model = checkpoint.model_name(config.model, job.source)
        if model != config.model.name:
            self.notes.append(f"the checkpoint is not the one that model={config.model.name} describes; its own counts")
        self._note(
            model=model,
            dtype=job.dtype,
            requests=len(job.workload.requests),
            dataset_sha256=job.workload.sha256,
            device=job.accelerator,
            device_name=environment.device_name(job.accelerator),
            environment=environment.snapshot(job.accelerator),
        )
        self.engine = engines.create(
            EngineSettings(
                engine=config.engine,
                generation=config.generation,
                source=job.source,
                dtype=job.dtype,
                device=device,
                max_context=job.max_context,
                # What one replica has taken, no other can: only a lone rank may take many at a time.
                lookahead=256 if config.parallel.dp == 1 else 4,
                tensor=self.replicas.tensor if self.replicas is not None else None,
                host_ranks=self.rank.local_world,
            )
        )
        self._say(f"loading {model} ({job.dtype}) for {config.engine.name} on {device}")
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
        self.done: set[int] = set()
        self.rejected = 0
        self.rejection: str | None = None
        estimates = {r.index: (r.claimed_prompt_len or len(r.prompt) // 3) + (r.output_len or 0) for r in requests}
        with Display(self.screen, estimates) as display:

            def deliver(completion: Completion, elsewhere: bool = True) -> None:
                with booking:  # another rank's completions come through a thread
                    assert self.recorder is not None
                    self.recorder.add(completion)
                    self.claims.add(completion)
                    self.flops.add(completion)
                    self.done.add(completion.index)
                    if completion.finish_reason == "rejected":
                        self.rejected += 1
                        self.rejection = completion.error
                    display.request_done(completion, elsewhere)

            booking = threading.Lock()
            if self.recorder is not None:
                self.engine.on_pass = self.recorder.add_pass
            self.engine.on_progress = display.update
            mine = iter(requests)
            if self.replicas is not None:
                # A thread cannot raise in this one; a signal can.
                self.replicas.receive(deliver, failed=lambda: os.kill(os.getpid(), signal.SIGTERM))
                mine = self.replicas.take(requests)
                self.replicas.barrier()
            clock = Clock()
            for completion in self.engine.generate(mine, clock):
                deliver(completion, elsewhere=False)
            self.elapsed_s = clock()
            self.others = list(self.replicas.wait().values()) if self.replicas is not None else []

    def _follow(self, requests: list[Request]) -> None:
        """Runs this rank's share and sends all of it to rank 0; or computes along with the rank that leads its model."""
        from harness.engines.base import Clock

        assert self.replicas is not None
        leads = self.replicas.tensor is None or self.replicas.tensor.leads
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

    def _use_cores(self) -> None:
        """Gives each rank of this host cores of its own, and a thread a core unless the user chose a number."""
        if self.job.accelerator == "cpu":
            ranks.bind_cores(self.rank)
        import torch

        if "OMP_NUM_THREADS" not in os.environ:
            crowded = environment.cores() < self.rank.local_world  # then no rank has a core of its own
            torch.set_num_threads(1 if crowded else environment.cores())

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
        return (
            "oom",
            f"out of memory ({text}); lower engine.kv_memory, engine.max_sequences or engine.token_budget",
            2,
        )
    return "failed", f"{text}; the traceback is in run.log", 1


def _log_to(path: str) -> None:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    log.setLevel(logging.INFO)
    logging.captureWarnings(True)
    warnings.simplefilter("default")


def _end_with_the_parent() -> None:
    """Interrupts this rank when the process that started the launch is gone: nobody would wait for it any more."""
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None:
        return

    def watch() -> None:
        while _alive(int(parent)):
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def _signals(timeout_s: float | None) -> Iterator[None]:
    """Turns SIGINT and SIGTERM into :class:`Interrupted` and the end of ``timeout_s`` into :class:`TimedOut`.

    Once only: what follows the first is not interrupted by the second, since the launcher sends several.
    """

    def quiet() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)

    def interrupt(signum: int, frame: FrameType | None) -> None:
        quiet()
        raise Interrupted(signum)

    def time_out(signum: int, frame: FrameType | None) -> None:
        quiet()
        raise TimedOut

    # Also where a shell started us in the background with SIGINT ignored.
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    if timeout_s is not None:
        signal.signal(signal.SIGALRM, time_out)
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        quiet()  # writing down how the run ended is not interrupted either
