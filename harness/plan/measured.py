"""A real run as it was measured: its config, its model's sizes, its passes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.basics.errors import UserError, quoted
from harness.config.compose import to_config
from harness.config.schema import Config, HardwareConfig
from harness.costs.fitting import Array, Observed
from harness.costs.roofline import Host, Roofline
from harness.costs.shape import ModelShape
from harness.costs.work import PassWork
from harness.engines import catalogue
from harness.engines.simulate import replay
from harness.models import locate
from harness.results.completions import read_completions
from harness.results.directory import read_record
from harness.results.passes import pass_figures, pass_rows

RUN_AGAIN = f"run it again with this version, with engine={replay.ENGINE}"


@dataclass(frozen=True)
class Measured:
    """A run that has ended well.

    Attributes:
        directory: of the run.
        record: its ``record.json``.
        config: its config, typed.
        shape: the sizes of its model.
    """

    directory: Path
    record: dict[str, Any]
    config: Config
    shape: ModelShape

    @classmethod
    def of(cls, option: str, run: str, results_dir: str) -> Measured:
        """Returns a run by its id in ``results_dir``, or by its directory.

        Args:
            option: what it was named by, for what is wrong.

        Raises:
            UserError: there is no such run, or it is none that passes can be learned from.
        """
        directory = Path(run) if Path(run).is_dir() else Path(results_dir) / run
        record = read_record(directory.parent, directory.name) if directory.is_dir() else None
        if record is None:
            raise UserError(
                option, f"{quoted(run)} is no run of {results_dir}", "give a run_id of runs.csv, or a directory"
            )
        name = directory.name
        if record.get("simulated") or catalogue.of_record(record.get("engine")).simulates:
            raise UserError(option, f"{name} is a simulation, not a measurement", "give a real run")
        if record.get("engine") != replay.ENGINE:
            raise UserError(option, f"{name} is a run of {quoted(record.get('engine'))}", RUN_AGAIN)
        if record.get("status") != "ok":
            raise UserError(option, f"{name} is {quoted(record.get('status'))}", "give a run that is ok")
        if record.get("segments"):
            raise UserError(option, f"{name} was interrupted and resumed", "give a run without a break")
        if drafted := record.get("draft_tokens"):
            found = f"{name} computed {drafted:,} drafts (engine.draft), which no plan and no simulation has"
            raise UserError(option, found, "give a run with engine.draft=null")
        figures = pass_figures(directory / "passes.csv")
        if figures is None:
            raise UserError(option, f"{name} has no passes in its passes.csv", RUN_AGAIN)
        if next(pass_rows(directory / "passes.csv", *PassWork._fields), None) is None:
            raise UserError(option, f"the passes of {name} lack logit_rows: another version's", RUN_AGAIN)
        try:
            config = to_config(catalogue.typed(OmegaConf.create(record["config"])))
        except (UserError, OmegaConfBaseException, KeyError, ValueError) as error:
            raise UserError(option, f"the config of {name} is another version's", RUN_AGAIN) from error
        share = catalogue.find(replay.ENGINE).share(config)
        architecture = locate.described(config.model).architecture
        bits = None if share.weight_bytes is None else 8 * share.weight_bytes
        return cls(directory, record, config, ModelShape.of(architecture, record["dtype"], bits))

    @property
    def name(self) -> str:
        """The run's id."""
        return self.directory.name

    @property
    def tp(self) -> int:
        """Ranks that share a model."""
        return int(self.record["tp"])

    @property
    def dp(self) -> int:
        """Replicas."""
        return int(self.record["dp"])

    @property
    def host_ranks(self) -> int:
        """Ranks on a host."""
        hosts = (self.record.get("telemetry") or {}).get("hosts") or [None]
        return max(1, self.tp * self.dp // len(hosts))

    @property
    def host(self) -> Host | None:
        """The host of a CPU's ranks; None for GPUs."""
        if self.record.get("device") != "cpu":
            return None
        environment = self.record.get("environment") or {}
        cores = int((environment.get("cpu") or {}).get("cores_visible") or 1) * self.host_ranks  # rank 0 sees its own
        threads = str((environment.get("env") or {}).get("OMP_NUM_THREADS") or "")
        return Host(cores, int(threads) if threads.isdecimal() and int(threads) else None)

    @cached_property
    def table(self) -> tuple[Array, Array, PassWork]:
        """When rank 0's passes began, how long they took, and what they computed, an array a column."""
        columns = ("started_s", "seconds", *PassWork._fields)
        rows = np.array(list(pass_rows(self.directory / "passes.csv", *columns)), float)
        rows = rows[rows[:, 1] > 0]
        return rows[:, 0], rows[:, 1], PassWork(*rows[:, 2:].T)  # type: ignore[arg-type]

    @cached_property
    def completions(self) -> list[dict[str, Any]]:
        """Its completions, those that were not rejected."""
        found = read_completions(self.directory / "completions.jsonl")
        return [line for line in found if line["finish_reason"] != "rejected"]

    def observed(self, hardware: HardwareConfig) -> Observed:
        """Returns its passes with what a rank of ``hardware`` takes for them at best; raises UserError."""
        started, seconds, work = self.table
        time = self.record["time"]
        finished = None
        if self.dp == 1:
            ends = np.sort([line["finished_s"] for line in self.completions])
            before = np.searchsorted(ends, started)
            finished = np.diff(before, prepend=0).astype(float)
        return Observed(
            name=self.name,
            work=work,
            started=started,
            seconds=seconds,
            finished=finished,
            roofline=Roofline.of(self.shape, hardware, self.record["dtype"], self.tp),
            ranks=self.host_ranks,
            tokenize_s=time["tokenize_s"],
            detokenize_s=time["detokenize_s"],
            prompt_tokens=self.record["prompt_tokens"],
            completed=self.record["completed"],
            replicas=self.dp,
        )
