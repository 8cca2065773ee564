"""LLaMA-2-70B from as many of its layers as a card holds: their passes are measured, the whole model is simulated.

The factors of the pass times are fitted to the measured passes and kept for as many layers as the model has
(:mod:`harness.plan.fit`, :mod:`harness.engines.simulate`). What comes out is a simulated row, and its figures are
called so: nothing here is named as a measured one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from acceptance.findings import Figure
from acceptance.harness_run import HarnessRun
from harness.config.schema import HardwareConfig
from harness.costs import fitting
from harness.costs.roofline import defaults
from harness.costs.shape import ModelShape
from harness.plan import fit
from harness.plan.measured import Measured

MEMORY_SHARE = 0.7  # of a card, for the layers: the rest is for the KV cache and passes
SIMULATED = "simulated_"
OPTION = "scaled_from_layers"


def layers_that_fit(architecture: dict[str, Any], dtype: str, memory: float) -> int:
    """Returns how many of the model's layers take :data:`MEMORY_SHARE` of so many bytes; at least 1, at most all."""
    shape = ModelShape.of(architecture, dtype)
    room = MEMORY_SHARE * memory - shape.other_bytes
    return max(1, min(shape.layers, int(room / (shape.matrix_bytes / shape.layers))))


@dataclass(frozen=True)
class Layers:
    """A run of a model's first layers.

    Attributes:
        directory: of the run.
        whole: the architecture of the whole model.

    Raises:
        UserError: from all methods: its passes tell too little.
    """

    directory: Path
    whole: dict[str, Any]

    @cached_property
    def measured(self) -> Measured:
        """The run."""
        return Measured.of("70B", str(self.directory), "")

    @property
    def layers(self) -> int:
        """How many of them ran."""
        return self.measured.shape.layers

    @cached_property
    def shape(self) -> ModelShape:
        """Of the whole model, in the run's type."""
        return ModelShape.of(self.whole, str(self.measured.record["dtype"]))

    @property
    def cache_bytes(self) -> int:
        """Of the run's KV cache, had it all layers."""
        engine: Any = self.measured.config.engine
        blocks = int((self.measured.record.get("engine_statistics") or {})["kv_blocks"])
        return math.ceil(blocks * int(engine.kv_block_size) * self.shape.kv_token_bytes)

    def by_layer(self) -> dict[str, Figure]:
        """Returns seconds of the passes for each of the layers that ran; embedding and head are in them."""
        _, seconds, work = self.measured.table
        prompts: Any = work.prompt_tokens
        tokens: Any = work.tokens
        found: dict[str, Figure] = {"layers": self.layers, "pass_s_per_layer": float(seconds.mean()) / self.layers}
        for kind, chosen in (("decode", prompts == 0), ("mixed", prompts > 0)):
            if chosen.any():
                found[f"{kind}_pass_s_per_layer"] = median(seconds[chosen].tolist()) / self.layers
                found[f"{kind}_pass_tokens"] = median(tokens[chosen].tolist())
        return found

    def write_fit(self, given: HardwareConfig | None, directory: Path) -> dict[str, Figure]:
        """Writes ``hardware/OPTION.yaml`` below ``directory``: this device by the run's passes, with room for all.

        Args:
            given: the device's figures; None where they are not known.

        Returns:
            How far the fit is off on the time of the run that it was made from.
        """
        run = self.measured
        own = replace(run.config.hardware, fit={}) if given is None else given
        hardware, _ = fit.figures([run], own)
        seen, assumed = [run.observed(hardware)], defaults(hardware.accelerator)
        found = fitting.fit(seen, assumed, run.host)
        errors: dict[str, Any] = {
            "passes": fitting.held_out(seen, assumed, run.host),
            "runs": fitting.totals(seen, found.factors),
            "left_out": {},
        }
        room = math.ceil(1.1 * (self.shape.matrix_bytes + self.shape.other_bytes) + 1.5 * self.cache_bytes) + (8 << 30)
        content = fit.file_content(OPTION, replace(hardware, memory_bytes=room), [run], seen, found, errors)
        place = directory / "hardware"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{OPTION}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return {"fit_error_of_run": errors["runs"][run.name], "kinds_of_passes": len(fitting.kinds_seen(seen))}

    def overrides(self, directory: Path) -> tuple[str, ...]:
        """Returns what has the harness simulate the whole on one such device, with the run's passes and KV cache.

        Args:
            directory: where :meth:`write_fit` has written.
        """
        engine: Any = self.measured.config.engine
        return (
            f"hydra.searchpath=[file://{directory}]",
            "engine=simulate",
            f"hardware={OPTION}",
            f"engine.token_budget={engine.token_budget}",
            f"engine.max_sequences={engine.max_sequences}",
            f"engine.kv_block_size={engine.kv_block_size}",
            f"engine.kv_memory={self.cache_bytes}",
        )


def of_simulation(run: HarnessRun, layers: int, whole: int) -> tuple[str, dict[str, Figure]]:
    """Returns the detail and the figures of a finding that nobody can take for a measurement.

    Args:
        layers, whole: that were measured, and that were simulated.

    Raises:
        ValueError: the row does not say that it was simulated.
    """
    assert run.row is not None
    if not run.row.get("simulated"):
        raise ValueError(f"{run.row['run_id']} is not marked as simulated")
    keys = ("total_tokens_per_s", "output_tokens_per_s", "elapsed_s")
    found: dict[str, Figure] = {SIMULATED + key: float(run.row[key]) for key in keys}
    found |= {"run_id": run.row["run_id"], "measured_layers": layers, "simulated_layers": whole}
    outside = "; ".join((run.record.get("simulation") or {}).get("outside") or [])
    detail = (
        f"SIMULATED, not measured: {whole} layers on one such device with room for them, by passes of {layers} layers"
    )
    return detail + (f" ({outside})" if outside else ""), found
