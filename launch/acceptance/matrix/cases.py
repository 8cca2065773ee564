"""What is run, in which order: the most valuable first, for a device may be gone in ten minutes.

Each case is a normal run of the harness and a row of its table. In a rehearsal the same cases run a tiny checkpoint on
the CPU, with kernels standing in where theirs need a GPU; what is refused there, is refused in one line.
"""

from __future__ import annotations

from dataclasses import dataclass

from acceptance import on_engines, on_mii
from acceptance.matrix import forecast
from acceptance.matrix.forecast import Kind
from harness.engines.shared import deepspeed_ops

TRITON = ("engine=fastgen", "engine.kernels=triton")
DEEPSPEED = ("engine=fastgen", "engine.kernels=deepspeed")
TORCH = ("engine=fastgen", "engine.kernels=torch")
# The fastest kernels that a CPU has, in passes so small that few requests need several of a kind, and that larger ones
# promise more.
ANY = ("engine=fastgen", "engine.kernels=auto", "engine.token_budget=64", "engine.max_sequences=8")
STATIC = ("engine=ds_inference",)
GRAPHED, INJECTED = (*STATIC, "engine.cuda_graph=true"), (*STATIC, "engine.kernel_inject=true")
RAGGED = deepspeed_ops.RAGGED
SECONDS, SHORT = 100.0, 40.0  # of a case's own clock, by which its requests are chosen; the loop has one at a time
# Of what a case may be refused; any other refusal is a failure.
NO_CUDA, NO_ROOM = "needs CUDA", "a rank needs .* its device has"
REFUSALS = {
    TRITON: f"{NO_ROOM}|{on_engines.OLD_CARD}",
    DEEPSPEED: f"{NO_ROOM}|^engine.kernels: deepspeed: ",
    ("engine=mii",): f"{NO_ROOM}|{on_mii.NOT_INSTALLED}|{on_mii.OTHER_CARD}|DeepSpeed's kernels",
    INJECTED: f"{NO_ROOM}|^engine.kernel_inject: true: DeepSpeed",
}
FIRST, REST = 1, 2  # all of the first part comes before the 70B layers and the profile, the rest after


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        name: of the finding.
        size: of the model, ``7B`` or ``13B``.
        overrides: beside those of the model, the requests and the stop rule.
        kind: for the prediction.
        requests: at most.
        clock_s: see :data:`SECONDS`.
        stand_in: overrides in a rehearsal, where these need a GPU and are not to be refused.
        like: a case that has to have run before: with the same number of requests, or, with ``tuned``, with settings
            that its simulation promises more of.
        needs: extensions of DeepSpeed that have to be compiled before.
        part: FIRST or REST.
        rehearsed: whether a rehearsal runs it; the 13B ones differ from the 7B ones there in nothing but a path.
    """

    name: str
    size: str
    overrides: tuple[str, ...]
    kind: Kind
    requests: int = 1000
    clock_s: float = SECONDS
    stand_in: tuple[str, ...] | None = None
    like: str | None = None
    tuned: bool = False
    needs: tuple[str, ...] = ()
    part: int = FIRST
    rehearsed: bool = True

    def words(self, rehearse: bool) -> tuple[str, ...]:
        """Returns its own overrides."""
        return self.stand_in if rehearse and self.stand_in is not None else self.overrides

    def refusal(self, rehearse: bool) -> str:
        """Returns of what it may be refused, a regular expression."""
        return NO_CUDA if rehearse else REFUSALS.get(self.overrides, NO_ROOM)


def cases() -> list[Case]:
    """Returns all cases, in order."""
    paged = [
        Case("7B fastgen triton", "7B", TRITON, forecast.TRITON, stand_in=ANY),
        Case("7B mii", "7B", ("engine=mii",), forecast.MII, needs=RAGGED),
        Case("7B baseline", "7B", ("engine=baseline",), forecast.ONE_BY_ONE, requests=20, clock_s=SHORT),
        Case("7B fastgen deepspeed", "7B", DEEPSPEED, forecast.DEEPSPEED, needs=RAGGED),
        Case("7B fastgen torch", "7B", TORCH, forecast.TORCH),
    ]
    static = [
        Case("7B ds_inference", "7B", STATIC, forecast.STATIC),
        Case("7B ds_inference graph", "7B", GRAPHED, forecast.GRAPHED),
    ]
    later = [
        Case("7B fastgen triton again", "7B", TRITON, forecast.TRITON, stand_in=ANY, like="7B fastgen triton"),
        Case(
            "7B fastgen triton tuned", "7B", TRITON, forecast.TRITON,
            stand_in=ANY, like="7B fastgen triton", tuned=True,
        ),
        Case(
            "7B fastgen deepspeed tuned", "7B", DEEPSPEED, forecast.DEEPSPEED,
            like="7B fastgen deepspeed", tuned=True,
        ),
        Case(
            "7B fastgen torch tuned", "7B", TORCH, forecast.TORCH,
            like="7B fastgen torch", tuned=True, rehearsed=False,
        ),
        Case("7B ds_inference injected", "7B", INJECTED, forecast.GRAPHED, needs=deepspeed_ops.INJECTED),
    ]  # fmt: skip
    larger = [
        Case("13B fastgen triton", "13B", TRITON, forecast.TRITON, stand_in=ANY),
        Case("13B mii", "13B", ("engine=mii",), forecast.MII, needs=RAGGED, rehearsed=False),
        Case("13B fastgen deepspeed", "13B", DEEPSPEED, forecast.DEEPSPEED, needs=RAGGED, rehearsed=False),
        Case("13B fastgen torch", "13B", TORCH, forecast.TORCH, part=REST, rehearsed=False),
        Case("13B ds_inference", "13B", STATIC, forecast.STATIC, part=REST, rehearsed=False),
        Case(
            "13B ds_inference graph", "13B", GRAPHED, forecast.GRAPHED, part=REST, rehearsed=False,
        ),
        Case(
            "13B baseline", "13B", ("engine=baseline",), forecast.ONE_BY_ONE,
            requests=20, clock_s=SHORT, part=REST, rehearsed=False,
        ),
        Case(
            "13B fastgen triton tuned", "13B", TRITON, forecast.TRITON,
            like="13B fastgen triton", tuned=True, part=REST, rehearsed=False,
        ),
    ]  # fmt: skip
    return [*paged, *static, *later, *larger]
