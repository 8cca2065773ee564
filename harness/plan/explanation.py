"""What kept a real run from the limit: its waterfall, the settings that promise most, and how that is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from harness.basics.errors import UserError
from harness.config.schema import HardwareConfig
from harness.costs import fitting
from harness.costs.fitting import Observed
from harness.costs.pass_time import PassTime
from harness.costs.roofline import Factors, defaults, on_other_ranks
from harness.engines.shared.order import Order, arranged, lookahead
from harness.engines.simulate.replay import Item, Setup
from harness.plan import waterfall
from harness.plan.fit import REACHED, figures
from harness.plan.measured import Measured
from harness.plan.waterfall import Change, Part, Scene
from harness.workload import reading
from harness.workload.records import Request

WORTH = 0.02  # of the time, for a change to be named
NAMED = 2
ROUNDS = 3  # of simulations that find how fast each replica was


@dataclass(frozen=True, slots=True)
class Explanation:
    """What is said of a run.

    Attributes:
        parts: from the measured rate to the limit.
        changes: that promise something, the best first; ``simulated_s`` is what they are compared with.
        notes: on what it rests on.
    """

    run: Measured
    parts: list[Part]
    changes: list[Change]
    simulated_s: float
    notes: list[str]

    @property
    def tokens(self) -> int:
        """Of the completed requests, prompt and output."""
        return int(self.run.record["total_tokens"])

    @property
    def first(self) -> Part:
        """What costs the most of what the run's settings decide."""
        return max((part for part in self.parts if part.kind == "settings"), key=lambda part: part.seconds)

    @property
    def plain(self) -> dict[str, Any]:
        """It as plain data."""
        elapsed = self.parts[0].before_s
        return {
            "run_id": self.run.name,
            "total_tokens": self.tokens,
            "measured_tokens_per_s": self.tokens / elapsed,
            "limit_tokens_per_s": self.tokens / self.parts[-1].after_s,
            "first": self.first.key,
            "parts": waterfall.plain(self.parts, self.tokens),
            "changes": [
                {"setting": change.setting, "gain": self.simulated_s / change.seconds - 1} for change in self.changes
            ],
            "notes": self.notes,
        }


def explained(run: Measured, given: HardwareConfig, say: Callable[[str], None] = lambda line: None) -> Explanation:
    """Returns the explanation of a run.

    Args:
        given: hardware of the command line: its figures, and its fit where the run's own passes tell too little.
        say: told what was simulated, where that takes long.

    Raises:
        UserError: they tell too little, and there is no fit.
    """
    if shared := (run.record.get("engine_statistics") or {}).get("shared_prompt_tokens"):
        found = f"{run.name} did not compute {shared:,} prompt tokens that others shared, and a simulation of it would"
        raise UserError("--explain", found, "explain a run with engine.prefix_sharing=false")
    hardware, reached = figures([run], given)
    observed = run.observed(hardware)
    factors, notes = _factors(run, observed, given, hardware)
    if reached:
        notes.append(f"no hardware= gives the peak and the bandwidth: taken is {REACHED}")
    elif factors.matrices < 1:
        measure = "python launch/matrix_rate.py measures a CPU's anew"
        notes.append(f"products are faster than the peak of hardware={hardware.name}, so the limit is none: {measure}")
    times = PassTime(run.shape, hardware, str(run.record["dtype"]), run.tp, run.host_ranks)
    requests = _requests(run)
    engine: Any = run.config.engine
    order = engine.order
    scene = Scene(_items(run, arranged(requests, order)), _setup(run), times.with_factors(**asdict(factors)))
    if run.dp > 1:
        scene = _with_speeds(scene, run, factors)
    parts = waterfall.waterfall(scene, float(run.record["elapsed_s"]), say)
    simulated = parts[0].after_s
    other = Order.dataset if order is Order.longest_first else Order.longest_first
    tried = waterfall.changes(scene, other.value, lambda: _items(run, arranged(requests, other)), engine.kv_memory, say)
    changes = [change for change in tried if change.seconds < (1 - WORTH) * simulated][:NAMED]
    return Explanation(run, parts, changes, simulated, notes)


def _factors(
    run: Measured, observed: Observed, given: HardwareConfig, hardware: HardwareConfig
) -> tuple[Factors, list[str]]:
    """Returns the factors of the run's own passes, or of the fit that is given; raises UserError if neither tells."""
    assumed = defaults(hardware.accelerator)
    fitted = None
    if given.fit and hardware == replace(given, fit={}):  # factors are relative to the figures they came with
        fitted = PassTime(run.shape, given, str(run.record["dtype"]), run.tp, run.host_ranks)
        assumed = on_other_ranks(fitted.factors, run.host_ranks, 1, run.host)
    if len(fitting.kinds_seen([observed])) >= 2:
        found = fitting.fit([observed], assumed, run.host)
        return found.factors[run.host_ranks], []
    if fitted is None:
        remedy = "fit other runs of this model, python -m harness.plan --fit RUN, and add hardware=local"
        raise UserError("--explain", f"{run.name} has passes of one kind only", remedy)
    outside = [f"outside of the fit: {reason}" for reason in fitted.outside]
    return fitted.factors, [f"pass times are those of hardware={given.name}", *outside]


def _setup(run: Measured) -> Setup:
    """Returns what the run's requests ran on; raises UserError where the record does not say."""
    engine: Any = run.config.engine
    blocks = (run.record.get("engine_statistics") or {}).get("kv_blocks")
    if not blocks:
        raise UserError("--explain", f"{run.name} does not say how many blocks its KV cache had", "run it again")
    budget = int(run.record["token_budget"])
    return Setup(
        token_budget=budget,
        max_sequences=min(int(run.record["max_sequences"]), budget),
        block_size=int(engine.kv_block_size),
        blocks=int(blocks) // run.dp,
        replicas=run.dp,
        lookahead=lookahead(run.dp),
    )


def _with_speeds(scene: Scene, run: Measured, factors: Factors) -> Scene:
    """Returns the scene with each replica as fast as it was: its seconds a token, by the record, come out.

    The factors are those of rank 0's passes. Of the others the record has tokens and seconds alone, and what a token
    takes depends on what is in the passes beside it: so the replicas are simulated, and slowed until both agree. The
    fastest replica's time is then the model's, and what the others take beyond it is theirs.
    """
    rates = {one["rank"]: one["forward_s"] / one["tokens"] for one in run.record.get("replicas") or [] if one["tokens"]}
    ranks = sorted(rates)
    if len(ranks) < run.dp:
        return scene
    slow = [rates[rank] / rates[ranks[0]] for rank in ranks]
    for _ in range(ROUNDS):
        tried = replace(scene, setup=replace(scene.setup, slow=tuple(slow))).seconds_a_token()
        slow = [now * rates[rank] / took if took else now for now, rank, took in zip(slow, ranks, tried, strict=True)]
    fastest = min(slow)
    quicker = {name: value * fastest for name, value in asdict(factors).items() if name != "norm"}
    setup = replace(scene.setup, slow=tuple(factor / fastest for factor in slow))
    return replace(scene, setup=setup, times=scene.times.with_factors(**quicker))


def _requests(run: Measured) -> list[Request]:
    """Returns the requests that were not rejected, as the dataset has them; from the completions where it is gone."""
    done = {line["index"]: line for line in run.completions}
    cap = run.config.generation.max_output_len
    try:
        found = [one for one in reading.read(run.config.dataset).requests if one.index in done]
    except UserError:
        found = []
    if len(found) < len(done) or any(one.output_len is None for one in found):
        found = [Request(index, "", line["output_tokens"]) for index, line in sorted(done.items())]
    return [replace(one, output_len=min(one.output_len or 1, cap or one.output_len or 1)) for one in found]


def _items(run: Measured, requests: Sequence[Request]) -> list[Item]:
    """Returns the requests with the lengths that they really had."""
    done = {line["index"]: line for line in run.completions}
    lengths = [(one.index, done[one.index]["prompt_tokens"], done[one.index]["output_tokens"]) for one in requests]
    return [Item(index, prompt, output, output) for index, prompt, output in lengths]


def text(found: Explanation) -> list[str]:
    """Returns what is printed, line by line."""
    run, tokens, elapsed = found.run, found.tokens, found.parts[0].before_s
    measured, limit = tokens / elapsed, tokens / found.parts[-1].after_s
    record = run.record
    what = f"{record['model']} {record['dtype']}, {record['kernels']} kernels, tp={run.tp} dp={run.dp}"
    width = max(len(part.title) for part in found.parts) + 2
    lines = [f"{run.name}: {what}, {tokens:,} tokens in {elapsed:,.1f} s", ""]
    lines.append(f"{'':<{width}}  {'total tok/s':>12}  {'seconds':>9}  {'of the run':>10}")
    lines.append(f"{'limit: all products at the peak':<{width}}  {limit:>12,.1f}  {found.parts[-1].after_s:>9,.2f}")
    for part in reversed(found.parts):
        rate = tokens / part.before_s - tokens / part.after_s
        lines.append(
            f"  {part.title:<{width - 2}}  {rate:>+12,.1f}  {part.seconds:>+9,.2f}  {part.seconds / elapsed:>+10.1%}"
        )
    lines.append(f"{'measured':<{width}}  {measured:>12,.1f}  {elapsed:>9,.2f}  {measured / limit:>10.1%} of the limit")
    first = found.first
    lines += ["", f"Costs most of what settings decide: {first.title} ({first.seconds / elapsed:.1%} of the time)"]
    kernels = max((part for part in found.parts if part.kind == "kernels"), key=lambda part: part.seconds)
    lines.append(f"Costs most of what kernels decide:  {kernels.title} ({kernels.seconds / elapsed:.1%} of the time)")
    promises = [f"{one.setting} ({found.simulated_s / one.seconds - 1:+.0%})" for one in found.changes]
    promised = ", ".join(promises) or f"no setting alone more than {WORTH:.0%}"
    lines.append(f"Promises most, simulated:           {promised}")
    return lines + [f"Note: {note}" for note in found.notes]
