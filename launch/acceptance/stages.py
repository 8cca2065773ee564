"""The stages in their order, with their limits on one H100 and 16 cores."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """What the driver knows of a stage.

    Attributes:
        title: what it does, for the table's readers.
        limit_s: seconds until it gets SIGTERM.
        needs: stages whose end it waits for; others that need nothing go first meanwhile.
        background: whether the following ones run beside it.
        path: of its module, if that is not ``acceptance.on_NAME``.
    """

    name: str
    title: str
    limit_s: float
    needs: tuple[str, ...] = ()
    background: bool = False
    path: str = ""

    @property
    def module(self) -> str:
        """Returns the module that has ``run(stage)``."""
        return self.path or f"acceptance.on_{self.name}"


BUILT = ("builds",)
STAGES = (
    Plan("machine", "versions, card, compilers, copy and matrix rates, doctor", 120),
    Plan("builds", "DeepSpeed's kernels compiled", 600, background=True),
    Plan("kernels", "attention and the other kernels against float64", 120),
    Plan("engines", "every engine on tiny models and the demo model, judged by verify", 180),
    Plan("deepspeed_ops", "each compiled DeepSpeed op against its stand-in", 120, needs=BUILT),
    Plan("wide", "models of real width, their logits against float32", 120, needs=BUILT),
    Plan("mii", "DeepSpeed-MII on the same requests", 120, needs=BUILT),
    # Nothing compiles beside what is measured.
    Plan("matrix", "the engines at 7B, 13B and 70B width, and a profile", 600, needs=BUILT),
    Plan("failures", "out of memory, kill and resume, telemetry, UUIDs of GPUs", 180),
    Plan("injected", "kernel injection, with its own kernels compiled first", 420, needs=BUILT),
)
