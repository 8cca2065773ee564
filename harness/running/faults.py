"""What ended a run, seen from inside or outside: out of memory, a kill, a lost host; and what to do about it.

Nothing here imports torch or DeepSpeed: the process that asks may be a launcher, or all that is left of a run.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any

from harness.basics.errors import REFUSED, one_line
from harness.basics.outcome import Fault
from harness.machine.memory import OomKills, out_of_memory

DEVICE_WORDS = ("cuda", "cublas", "cudnn", "cusolver", "nccl", "gpu", "insufficient memory")

IN_THE_LOG = "the traceback is in run.log"


def on_device(error: BaseException) -> bool:
    """Returns whether memory ran out on the GPU, not on the host."""
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return named or any(word in str(error).lower() for word in DEVICE_WORDS)


def classify(
    error: BaseException, config: Mapping[str, Any], facts: Mapping[str, Any], traceback: str = IN_THE_LOG
) -> Fault:
    """Returns how a run ended that an exception ended, which is not the user's to read in full.

    Args:
        config: the resolved config.
        facts: see :func:`advice`.
        traceback: where the user finds it, in a clause.
    """
    cause = out_of_memory(error)
    if cause is None:
        return Fault("failed", f"{one_line(f'{type(error).__name__}: {error}', 300)}; {traceback}", 1)
    text = one_line(f"{type(cause).__name__}: {cause}", 300)
    device = on_device(cause)
    where = "of the GPU" if device else "of the host"
    return Fault("oom", f"out of memory {where} ({text}); {advice(config, facts, device)}", REFUSED)


def killed(who: str, number: int, kills: OomKills, config: Mapping[str, Any], facts: Mapping[str, Any]) -> Fault:
    """Returns how a run ended of which a process was ended by a signal.

    Args:
        who: the process, such as ``rank 1 on node7``.
        number: the signal; 0 where it is not known.
        kills: made before the process was started.
        config, facts: as for :func:`advice`.
    """
    if number in (0, signal.SIGKILL) and kills:
        text = f"out of memory of the host: the kernel ended {who} (SIGKILL)"
        return Fault("oom", f"{text}; {advice(config, facts, device=False)}", REFUSED)
    if number == 0:
        return Fault("failed", f"{who} died without an error message; the system's log (dmesg) may say why", 1)
    name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
    text = f"{who} was ended by signal {name}"
    if number == signal.SIGKILL:
        text += (
            ", and not because memory ran out: by hand, or by a job system"
            if kills.known
            else ", as the system does when memory runs out"
        )
    elif number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE):
        text += ": native code crashed; what it said is above, or in the system's log (dmesg)"
    return Fault("failed", text, 1)


def timed_out(timeout_s: float) -> Fault:
    """Returns how a run ended that took longer than it was given."""
    return Fault("timeout", f"not finished after timeout_s={timeout_s:g}; raise timeout_s, or run fewer requests", 1)


def way_on(directory: object, run_id: str) -> str:
    """Returns what a message adds when a run left some of its requests undone."""
    return f"what was finished is in {directory}; resume={run_id} does the rest"


def advice(config: Mapping[str, Any], facts: Mapping[str, Any], device: bool) -> str:
    """Returns which settings to lower, and to what, so that a run needs less memory.

    Args:
        config: the resolved config as plain data.
        facts: what the record says of the run so far: ``phase`` (``load``: the weights; ``cache``: the KV cache;
            anything else: running) and ``dtype`` (resolved).
        device: whether the memory is a GPU's.
    """
    from harness.engines import catalogue  # not before it is needed: a watchdog has to be there soon

    engine, model, parallel = (config.get(name) or {} for name in ("engine", "model", "parallel"))
    room = catalogue.of_record(engine.get("name"))
    phase, dtype = facts.get("phase"), facts.get("dtype") or model.get("dtype")
    changes: list[tuple[str, object, object]] = []
    tp, dp = int(parallel.get("tp") or 1), int(parallel.get("dp") or 1)
    if not device and dp > 1:  # ranks of one host share its memory
        changes.append(("parallel.dp", dp // 2, dp))
    if phase == "load":
        if dtype == "float32":
            changes.append(("model.dtype", "bfloat16", dtype))
        heads = (model.get("architecture") or {}).get("num_key_value_heads")  # of the named model; a path may differ
        if device and room.shards and not (isinstance(heads, int) and 2 * tp > heads):
            changes.append(("parallel.tp", 2 * tp, tp))
            if dp > 1:
                changes.append(("parallel.dp", dp // 2, dp))
    elif (lower := room.less_memory(engine, phase)) is not None:
        changes += lower
    elif dtype == "float32":
        changes.append(("model.dtype", "bfloat16", dtype))
    if not changes:
        return "use a smaller model, or " + ("a GPU with more memory" if device else "a machine with more memory")
    new = " ".join(f"{key}={value}" for key, value, _ in changes)
    return f"try {new} (now {', '.join(str(value) for _, _, value in changes)})"
