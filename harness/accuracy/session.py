"""One rank of an evaluation: load, then score (rank 0 asks, all compute), then record and compare."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from harness.accuracy import perplexity, record, tasks
from harness.accuracy.pool import Pool
from harness.accuracy.tasks import TaskOptions
from harness.basics.clock import utc_now
from harness.basics.errors import FULL_ERROR, UserError, complain, printable, show_traceback
from harness.basics.files import json_bytes, plain, replace, yaml_bytes
from harness.basics.outcome import Fault
from harness.config.identity import config_hash
from harness.engines import catalogue
from harness.engines.base import SCORING
from harness.machine import device, openmp
from harness.machine import snapshot as snapshots
from harness.models import locate
from harness.ranks.rank import Rank
from harness.ranks.rendezvous import Rendezvous
from harness.results.directory import new_run_id
from harness.running import job as jobs
from harness.running import setup, tracking
from harness.running.job import Job
from harness.running.lifecycle import Lifecycle, RankWork

LINES = "scores.jsonl"


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for beside the config."""

    tasks: TaskOptions | None
    against: str | None
    within: float
    prefill: bool


def check(composed: DictConfig, options: Options, rank: Rank | None = None) -> Job:
    """Returns the job; raises UserError for what can be refused before a model is loaded."""
    job = jobs.prepare(composed, rank)
    config = job.config
    if not catalogue.find(config.engine.name).scores:
        raise UserError("engine", f"{config.engine.name} cannot score given tokens", SCORING)
    if config.repeat > 1:
        raise UserError("repeat", f"{config.repeat}: scores do not vary as times do", "leave it out")
    if config.dataset.chat_template and options.tasks is not None:
        raise UserError("dataset.chat_template", "true, but tasks bring prompts of their own", "leave it out")
    if config.tracking.name != tracking.NONE:
        raise UserError("tracking", f"{config.tracking.name} is sent runs, no evaluations", "leave it out")
    if config.power_limit_w is not None:
        raise UserError("power_limit_w", "an evaluation is not measured, so that no limit is seen", "leave it out")
    if rank is None or rank.first:
        if options.against is not None:
            names = None if options.tasks is None else options.tasks.names
            record.check_comparable(names, record.read(config.results_dir, options.against))
        if options.tasks is not None:
            tasks.check(options.tasks)
    return job


def run(composed: DictConfig, rank: Rank, options: Options, checked: Job | None = None) -> int:
    """Runs this rank's part of an evaluation; returns the exit status: 1 where it failed, or is worse than allowed.

    Args:
        checked: the job, where this process has checked it before it became the only rank.
    """
    openmp.wait_briefly()
    return Lifecycle(rank, _Evaluation(composed, rank, options, checked), alone=checked is not None).run(composed)


class _Evaluation(RankWork):
    """One rank's part of an evaluation."""

    def __init__(self, composed: DictConfig, rank: Rank, options: Options, checked: Job | None) -> None:
        from harness.basics.terminal import console

        self.config = jobs.resolved(composed)
        self.rank = rank
        self.options = options
        self.checked = checked
        self.screen = console()
        self.started_at = utc_now()
        self.lines: list[dict[str, Any]] = []  # one a request, or one an answered question
        self.notes: list[str] = []

    def check(self, composed: DictConfig) -> Job:
        """Returns the job, checked before or now."""
        return self.checked or check(composed, self.options, self.rank)

    def keep_traceback(self, error: Exception) -> str:
        """Shows it to a user who asked for that."""
        show_traceback(error)
        return f"{FULL_ERROR}=1 shows the traceback"

    def close(self, fault: Fault, heard: bool) -> Fault:
        """Says how the evaluation ended; what another rank has said, rank 0 says alone."""
        if self.rank.first or not heard:
            complain(fault.error if self.rank.first else f"rank {self.rank.rank}: {fault.error}")
        return fault

    def run(self, job: Job, rendezvous: Rendezvous) -> int:
        """Loads and computes on every rank; rank 0 also records and compares. Returns the exit status."""
        self.job = job
        self.config.update(job.settings)
        self.run_id = new_run_id(f"accuracy_{job.config.engine.name}")
        pool = self._load(rendezvous)
        if not self.rank.first:
            pool.serve()
            assert pool.replicas is not None
            pool.replicas.leave()
            return 0
        directory = self._directory()  # before hours of scoring, not after them
        started = time.perf_counter()
        found: dict[str, Any] = {"perplexity": None, "tasks": None}
        if self.options.tasks is None:
            found["perplexity"] = self._perplexity(pool)
        else:
            found["tasks"], self.lines, notes = tasks.run(pool, self.options.tasks)
            self.notes += notes
        seconds = time.perf_counter() - started
        pool.close()
        if pool.replicas is not None:
            pool.replicas.leave()
        return self._conclude(directory, self._record(found, seconds))

    def _load(self, rendezvous: Rendezvous) -> Pool:
        job = self.job
        _, place = setup.use_cores(job, self.rank)
        from harness.engines.proof import proof  # imports torch, whose threads are the cores'

        replicas = setup.join(job, self.rank, rendezvous)
        settings = setup.engine_settings(job, self.rank, replicas, place)
        self.model = locate.model_name(job.config.model, job.source)
        self.engine = catalogue.create(settings)
        self._say(f"loading {self.model} ({job.dtype}) for {job.config.engine.name} on {settings.device}")
        self.engine = proof.load(self.engine, self._say)
        self.notes += self.engine.notes
        return Pool(
            self.engine,
            replicas,
            self.options.prefill,
            lambda done, total: self._say(f"  {done:,} of {total:,} on rank 0"),
        )

    def _directory(self) -> Path:
        directory = Path(self.job.config.results_dir) / self.run_id
        try:
            directory.mkdir(parents=True)
        except (OSError, ValueError) as error:
            found = f"{directory} cannot be made: {getattr(error, 'strerror', None) or error}"
            raise UserError("results_dir", found, "set another directory") from error
        replace(directory / "config.yaml", yaml_bytes(plain(self.config)))
        return directory

    def _perplexity(self, pool: Pool) -> dict[str, Any]:
        job, tokenizer = self.job, self.engine.tokenizer
        requests = jobs.resolve_requests(job, tokenizer).requests
        bos = getattr(tokenizer, "bos_token_id", None)
        items = perplexity.items(self.engine.tokenize(requests), bos)
        self._say(f"scoring {sum(len(item.target_ids) for item in items):,} tokens of {len(items)} prompts")
        self.lines = perplexity.per_request(pool.score(items))
        return {
            "dataset": job.workload.name,
            "dataset_sha256": job.workload.sha256,
            "conditioned_on": "bos" if bos is not None else "first token",
            "fingerprint": perplexity.fingerprint(items),
            **perplexity.figures(self.lines),
        }

    def _record(self, found: dict[str, Any], seconds: float) -> dict[str, Any]:
        job, config = self.job, self.job.config
        snapshot = snapshots.snapshot(job.accelerator)
        return {
            "run_id": self.run_id,
            "started_at": self.started_at,
            "finished_at": utc_now(),
            "command_line": sys.argv,
            "engine": config.engine.name,
            "kernels": self.engine.kernels,
            "model": self.model,
            "weights": config.model.weights,
            "dtype": job.dtype,
            "quantization": getattr(config.engine, "quantization", None),
            "tp": job.tp,
            "dp": job.dp,
            "device": job.accelerator,
            "device_name": device.device_name(job.accelerator),
            **found,
            "prefill": self.options.prefill,
            "seconds": seconds,
            "notes": self.notes,
            "config": self.config,
            "config_hash": config_hash(self.config),
            "git_commit": (snapshot.get("git") or {}).get("commit"),
            "environment": snapshot,
            "lm_eval": None if self.options.tasks is None else tasks.version(),
        }

    def _conclude(self, directory: Path, made: dict[str, Any]) -> int:
        """Writes the record, prints the summary and the comparison."""
        from harness.accuracy.report import comparison, summary

        replace(directory / LINES, b"".join(json_bytes(line) + b"\n" for line in self.lines))
        replace(directory / record.FILE, json_bytes(plain(made), indent=2))
        summary(self.screen, made, directory)
        if self.options.against is None:
            return 0
        other = record.read(self.job.config.results_dir, self.options.against)
        compared = record.differences(made, other, self.options.within)
        comparison(self.screen, other["run_id"], compared, record.settings_that_differ(plain(made), other))
        worse = any(difference.worse for difference in compared)
        return 1 if worse else 0

    def _say(self, line: str) -> None:
        if self.rank.first:
            self.screen.print(printable(line), markup=False)
