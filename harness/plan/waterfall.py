"""From the limit to the measured rate of a run: each cause's part is what a simulation without it gains.

Causes are taken away one after the other, in a fixed order, each from what the one before has left, so that the parts
add up to the whole gap. What a run's settings decide goes first, what its kernels do last; what is left then is the
limit: all matrix products at the hardware's peak, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from harness.costs.pass_time import PassTime
from harness.costs.roofline import HOST
from harness.costs.work import PassWork
from harness.engines.simulate.replay import Item, Pass, Setup, replay

LARGEST_PASS = 8192  # tokens; a larger one saves next to nothing of what a pass costs by itself
MOST_MEMORY = 0.9  # of what is free, for the KV cache
LEAD, MORE = 2, 12  # times as many requests as run at a time, at least: to get going, and to be counted then


class Part(NamedTuple):
    """A cause and what it costs.

    Attributes:
        key, title: of the cause.
        kind: ``settings`` where a run's settings decide it, ``kernels`` where what computes does, ``model`` for what
            the model of the pass times does not explain.
        before_s, after_s: what the run takes with it and without it, those before it in the list taken away already.
    """

    key: str
    title: str
    kind: str
    before_s: float
    after_s: float

    @property
    def seconds(self) -> float:
        """What it costs."""
        return self.before_s - self.after_s


class Simulated(NamedTuple):
    """What a simulation came to: its seconds, its passes, and the sum of what they computed."""

    seconds: float
    passes: float
    work: PassWork


@dataclass(frozen=True, slots=True)
class Scene:
    """A run as it is simulated.

    Attributes:
        items: its requests, in the order in which they were handed out.
        setup: what they ran on; the fastest replica's factor is 1.
        times: of its passes.
    """

    items: Sequence[Item]
    setup: Setup
    times: PassTime

    def simulated(self, copies: int = 1) -> Simulated:
        """Returns what the list of requests takes, so many times over."""
        items = [item._replace(uid=item.uid + 1_000_000_000 * copy) for copy in range(copies) for item in self.items]
        end, passes, sums = 0.0, 0, [0] * len(PassWork._fields)
        for event in replay(items, self.setup, self.times):
            if isinstance(event, Pass):
                end = max(end, event.started_s + event.seconds)
                passes += 1
                sums = [total + count for total, count in zip(sums, event.work, strict=True)]
        return Simulated(end, passes, PassWork(*sums))

    def seconds_a_token(self) -> list[float]:
        """Returns what a token takes each replica in its passes; 0 for one that has none."""
        seconds, tokens = [0.0] * self.setup.replicas, [0] * self.setup.replicas
        for event in replay(self.items, self.setup, self.times):
            if isinstance(event, Pass):
                seconds[event.replica] += event.seconds
                tokens[event.replica] += event.work.tokens
        return [took / count if count else 0.0 for took, count in zip(seconds, tokens, strict=True)]

    def steady(self) -> Simulated:
        """Returns what the list takes where others go before it and follow it, so that none is ever at its end."""
        at_once, count = self.setup.max_sequences * self.setup.replicas, max(1, len(self.items))
        lead, more = -(-LEAD * at_once // count), -(-MORE * at_once // count)
        short, long = self.simulated(lead), self.simulated(lead + more)
        work = [(end - begin) / more for end, begin in zip(long.work, short.work, strict=True)]
        return Simulated(
            (long.seconds - short.seconds) / more,
            (long.passes - short.passes) / more,
            PassWork(*work),  # type: ignore[arg-type]
        )

    def packed(self, work: PassWork, tokens: int) -> float:
        """Returns the seconds of ``work`` in equal passes of so many tokens on all replicas, all equally fast."""
        mean = PassWork(*(count * tokens / work.tokens for count in work))  # type: ignore[arg-type]
        passes = work.tokens / tokens / self.setup.replicas
        return passes * self.times.seconds(mean)


def waterfall(scene: Scene, elapsed_s: float, say: Callable[[str], None] = lambda line: None) -> list[Part]:
    """Returns the parts, from the measured rate to the limit.

    Args:
        elapsed_s: of the run, measured.
        say: told each cause that was taken away.
    """
    setup, times = scene.setup, scene.times
    parts: list[Part] = []
    now = elapsed_s

    def took(key: str, title: str, kind: str, after_s: float) -> None:
        nonlocal now
        parts.append(Part(key, title, kind, now, after_s))
        say(f"simulated without: {title}")
        now = after_s

    took("rest", "the rest, which the model does not explain", "model", scene.simulated().seconds)
    longest = max(item.prompt_tokens + item.max_new_tokens for item in scene.items)
    room = (setup.max_sequences + 1) * (-(-longest // setup.block_size) + 1)
    small = setup.blocks < room  # or the simulation would be the same again
    scene = replace(scene, setup=replace(setup, blocks=max(setup.blocks, room)))
    took(
        "kv_cache",
        "KV cache too small: sequences wait or are preempted",
        "settings",
        scene.simulated().seconds if small else now,
    )
    if setup.replicas > 1:
        scene = replace(scene, setup=replace(scene.setup, slow=()))
        took("imbalance", "replicas slower than the fastest", "settings", scene.simulated().seconds)
    scene = replace(scene, times=times.with_factors(**dict.fromkeys(HOST, 0.0)))
    took("host", "host between the passes", "settings", scene.simulated().seconds)
    steady = scene.steady()
    took("tail", "tail: the first and the last requests run by few", "settings", steady.seconds)
    budget = setup.token_budget
    fill = steady.work.tokens / steady.passes / budget
    title = f"passes not full: {fill:.0%} of {budget:,} tokens before the tail"
    took("unfilled", title, "settings", scene.packed(steady.work, budget))
    largest = max(LARGEST_PASS, budget)
    title = f"token budget: passes of {budget:,} tokens, not {largest:,}"
    took("token_budget", title, "settings", scene.packed(steady.work, largest))
    for key, title, changed in _kernels(scene.times):
        scene = replace(scene, times=scene.times.with_factors(**changed))
        took(key, title, "kernels", scene.packed(steady.work, largest))
    return parts


def _kernels(times: PassTime) -> list[tuple[str, str, dict[str, float]]]:
    """Returns what kernels cost beyond their products at the peak: key, title, and the factors without it."""
    found: list[tuple[str, str, dict[str, float]]] = [("kv", "reading keys and values", {"kv": 0.0})]
    if times.roofline.reduces:
        found.append(("all_reduce", "all-reduces", {"all_reduce": 0.0, "all_reduce_s": 0.0}))
    found.append(("others", "norms, launches, each sequence", {"pointwise": 0.0, "launch_s": 0.0, "sequence_s": 0.0}))
    found.append(("attention", "attention below the peak", {"attention": 1.0}))
    found.append(("matrices", "matrix products below the peak", {"matrices": 1.0, "head": 1.0, "weights": 0.0}))
    return found


class Change(NamedTuple):
    """A setting of the command line, and the seconds that a simulation with it takes."""

    setting: str
    seconds: float


def changes(
    scene: Scene,
    order: str,
    reordered: Callable[[], Sequence[Item]],
    kv_memory: object,
    say: Callable[[str], None] = lambda line: None,
) -> list[Change]:
    """Returns simulations of the run with one setting changed, the fastest first.

    Args:
        order: ``engine.order`` that the run has not.
        reordered: the requests in that order.
        kv_memory: ``engine.kv_memory`` of the run.
        say: told each setting that was tried.
    """
    setup, found = scene.setup, []

    def tried(setting: str, **changed: Any) -> None:
        found.append(Change(setting, replace(scene, setup=replace(setup, **changed)).simulated().seconds))
        say(f"simulated with {setting}")

    for budget in (2 * setup.token_budget, setup.token_budget // 2):
        if budget >= 1:
            tried(f"engine.token_budget={budget}", token_budget=budget)
    for most in (2 * setup.max_sequences, setup.max_sequences // 2):
        if 1 <= most <= setup.token_budget:
            tried(f"engine.max_sequences={most}", max_sequences=most)
    if isinstance(kv_memory, float):  # a share of the free memory
        share = min(2 * kv_memory, MOST_MEMORY)
        tried(f"engine.kv_memory={share:g}", blocks=int(setup.blocks * share / kv_memory))
    else:
        tried("engine.kv_memory doubled", blocks=2 * setup.blocks)
    found.append(Change(f"engine.order={order}", replace(scene, items=reordered()).simulated().seconds))
    return sorted(found, key=lambda change: change.seconds)


def plain(parts: Sequence[Part], tokens: int) -> list[dict[str, object]]:
    """Returns the parts as plain data, with the rates before and after them."""
    return [
        {
            **part._asdict(),
            "tokens_per_s": tokens / part.after_s - tokens / part.before_s,
            "from_tokens_per_s": tokens / part.before_s,
            "to_tokens_per_s": tokens / part.after_s,
        }
        for part in parts
    ]
