"""How long passes take on a machine, from its figures and, where runs were fitted, from what they took."""

from __future__ import annotations

import math
from dataclasses import astuple

from harness.config.schema import HardwareConfig
from harness.costs.fitted import Fitted
from harness.costs.roofline import Factors, Roofline, defaults, on_other_ranks
from harness.costs.shape import ModelShape
from harness.costs.work import PassWork


class PassTime:
    """Seconds of passes of one replica, and of its host between them.

    On a CPU without a fit the figures are those of one rank, as ``conf/hardware/cpu.yaml`` has them; a fit's are those
    of the host with one rank on it, and its factors say what several do to each other.

    Args:
        shape: of the model.
        hardware: figures, and ``fit`` if there is one.
        dtype: torch type of weights and activations.
        tp: ranks that share the model.
        host_ranks: ranks on a host, of all replicas.
        token_budget, max_sequences: of the run, for :attr:`outside`; None where they are not known yet.

    Attributes:
        fitted: what runs have told, None where none were fitted.
        outside: why the run lies outside of what was fitted, a clause each; empty without a fit.

    Raises:
        UserError: a figure is not known, or the fit is none.
    """

    def __init__(
        self,
        shape: ModelShape,
        hardware: HardwareConfig,
        dtype: str,
        tp: int,
        host_ranks: int,
        token_budget: int | None = None,
        max_sequences: int | None = None,
    ) -> None:
        self.fitted = Fitted.of(hardware.fit)
        self.outside: list[str] = []
        if self.fitted is not None:
            settings = {"tp": tp, "token_budget": token_budget, "max_sequences": max_sequences}
            self.outside = self.fitted.beyond(shape, dtype, host_ranks, **settings)
        self.roofline = Roofline.of(shape, hardware, dtype, tp)
        self.factors = _factors(self.fitted, hardware, host_ranks)
        self._set()

    def _set(self) -> None:
        """Multiplies once what :meth:`seconds` would in each of a million passes."""
        roofline, factors = self.roofline, self.factors
        self._norm, self._inverse = factors.norm, 1 / factors.norm
        self._product = factors.matrices * roofline.matrix
        self._reading = (factors.weights * roofline.weights) ** self._norm
        self._row, self._head = factors.head * roofline.row, (factors.head * roofline.head) ** self._norm
        self._pair, self._key = factors.attention * roofline.pair, factors.kv * roofline.key
        self._token = factors.pointwise * roofline.point + factors.all_reduce * roofline.exchange
        self._pass = factors.launch_s * roofline.layers + factors.all_reduce_s * roofline.reduces
        self._sequence = factors.sequence_s * roofline.layers

    def seconds(self, work: PassWork) -> float:
        """Returns the seconds of a pass: the sum of :meth:`parts`."""
        tokens, _, _, sequences, rows, keys, pairs = work
        p, q = self._norm, self._inverse
        took = ((self._product * tokens) ** p + self._reading) ** q + self._pass + self._token * tokens
        if rows:
            took += ((self._row * rows) ** p + self._head) ** q
        return took + self._pair * pairs + self._key * keys + self._sequence * sequences

    def parts(self, work: PassWork) -> dict[str, float]:
        """Returns the seconds of a pass by cause, see :meth:`Roofline.parts`."""
        return self.roofline.parts(self.factors, work)

    def host_seconds(self, work: PassWork, finished: int, admitted_tokens: int) -> float:
        """Returns the seconds before a pass in which the device waits for its host.

        Args:
            work: of the pass that is scheduled.
            finished: requests that the pass before has finished.
            admitted_tokens: of the prompts that were tokenized since the pass before.
        """
        factors = self.factors
        took = factors.host_pass_s + factors.host_sequence_s * work.sequences
        return took + factors.host_finished_s * finished + factors.host_token_s * admitted_tokens

    def with_factors(self, **changed: float) -> PassTime:
        """Returns the same with other factors: a cause made smaller, or taken away."""
        other = object.__new__(PassTime)
        other.__dict__ |= self.__dict__
        values = dict(zip(Factors.__dataclass_fields__, astuple(self.factors), strict=True)) | changed
        other.factors = Factors(**values)
        other._set()
        return other


def _factors(fitted: Fitted | None, hardware: HardwareConfig, host_ranks: int) -> Factors:
    """Returns the factors for so many ranks on a host, of the nearest number that was seen."""
    if fitted is None:
        return defaults(hardware.accelerator)
    seen = min(fitted.factors, key=lambda ranks: abs(math.log(ranks / host_ranks)))
    return on_other_ranks(fitted.factors[seen], seen, host_ranks, fitted.host)
