"""What each engine makes of a tiny model, in the steps of a real run, against Hugging Face's ``generate``.

As a script, under DeepSpeed's launcher, it takes its ranks through the models that it is given, two columns each.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from harness.basics.clock import Clock
from harness.basics.errors import UserError, one_line
from harness.config.checks import check_kv_heads
from harness.config.schema import GenerationConfig, Stop
from harness.engines import catalogue
from harness.engines.base import EngineSettings
from harness.engines.ds_inference.config import DsInferenceConfig
from harness.engines.fastgen.config import FastGenConfig, Kernels
from harness.engines.fastgen.runners.native import checks as native_checks
from harness.engines.known_model import KnownModel
from harness.engines.proof import proof
from harness.engines.shared.attention_checks import refuse_by_its_file
from harness.engines.shared.auto_tp_families import check_auto_tp
from harness.models.architecture import context_length
from harness.models.directory import find
from harness.models.generation import greedy
from harness.models.judging import BOUNDS
from harness.models.source import Source
from harness.models.transformers_quiet import quiet
from harness.workload.records import Request
from support.families_sizes import PROMPT_IDS

if TYPE_CHECKING:
    from harness.ranks.tensor_parallel import TensorParallel

T = TypeVar("T")

LENGTHS = (1, 2, 7, 15, 29, 30, 61, 100)  # before, across and after the windows' end and the length of training
STRAYS = 1  # requests in bfloat16 that may be further off than rounding moves logits
PATIENCE_S = 60.0  # for a model on two ranks, of which one may wait for the other forever


@dataclass(frozen=True, slots=True)
class Column:
    """One way to run a model."""

    engine: str
    kernels: Kernels = Kernels.torch
    dtype: str = "float32"
    tp: int = 1

    @property
    def title(self) -> str:
        kernels = f" {self.kernels.value}" if self.engine == "fastgen" else ""
        return f"{self.engine}{kernels}{' bf16' * (self.dtype != 'float32')}{f' tp={self.tp}' * (self.tp > 1)}"

    @property
    def config(self) -> FastGenConfig | DsInferenceConfig:
        """Small budgets, so that prompts are split and requests share passes and batches."""
        if self.engine == "ds_inference":
            return DsInferenceConfig(batch_size=4)
        return FastGenConfig(kernels=self.kernels, token_budget=24, max_sequences=6, kv_block_size=8, kv_memory="64MiB")


FASTGEN, NATIVE, DS_INFERENCE = Column("fastgen"), Column("fastgen", Kernels.native), Column("ds_inference")
SINGLE = (FASTGEN, NATIVE, DS_INFERENCE)
BFLOAT16 = (Column("fastgen", dtype="bfloat16"), Column("ds_inference", dtype="bfloat16"))
PARALLEL = (Column("fastgen", tp=2), Column("ds_inference", tp=2))
COLUMNS = (*SINGLE, *PARALLEL, *BFLOAT16)


def requests() -> list[Request]:
    """Returns eight requests of unlike lengths."""
    rng = random.Random(5)
    prompts = [tuple(rng.choice(PROMPT_IDS) for _ in range(length)) for length in LENGTHS]
    return [Request(index, "", rng.randint(6, 12), prompt_ids=ids) for index, ids in enumerate(prompts)]


class Reference:
    """The checkpoint as transformers loads it by default: its answers, and how it sees those of others.

    Args:
        dtype: of the model.
        rounded: give a float32 model the weights that one in bfloat16 has.
    """

    def __init__(self, directory: Path, dtype: str = "float32", rounded: bool = False) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers import GenerationConfig as Generation

        with quiet():
            self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
        self.model.generation_config = Generation()  # as greedy() does: nothing else may fill in what we leave open
        if rounded:
            for weight in self.model.parameters():
                weight.data = weight.data.bfloat16().float()

    def answers(self) -> list[list[int]]:
        """Returns the ids for each of :func:`requests`, alone."""
        import torch

        found = []
        for job in requests():
            prompt = torch.tensor([job.prompt_ids])
            with quiet():
                ids = greedy(self.model, prompt, job.output_len or 0, frozenset())
            found.append(ids.tolist()[prompt.shape[1] :])
        return found

    def largest_gap(self, job: Request, ids: list[int]) -> float:
        """Returns how far, in standard deviations, the worst of ``ids`` is below the best id of its position.

        ``generate`` is made to continue with them, since some models compute other logits in one pass over it all.
        """
        import torch
        from transformers import GenerationConfig as Generation
        from transformers import LogitsProcessorList

        gaps: list[float] = []

        def follow(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            token, row = ids[len(gaps)], scores[0].float()
            spread = row[row.isfinite()].std()
            gaps.append(float((row.max() - row[token]) / spread) if token < len(row) else float("inf"))
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token]), 0.0)

        prompt = torch.tensor([job.prompt_ids])
        config = Generation(do_sample=False, max_new_tokens=len(ids), pad_token_id=0)
        with quiet(), torch.inference_mode():
            self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=config,
                logits_processor=LogitsProcessorList([follow]),
            )
        return max(gaps, key=lambda gap: (gap != gap, gap), default=0.0)  # what is not a number is the worst


def refuse_early(source: Source, column: Column) -> int | None:
    """Refuses from config.json what ``harness.running.job.prepare`` refuses; returns the longest sequence."""
    architecture = source.architecture
    check_kv_heads(column.tp, architecture.get("num_key_value_heads"))
    max_context = context_length(architecture, None)
    refuse_by_its_file(architecture, max_context, column.engine)
    check_auto_tp(column.tp, architecture.get("model_type"))
    if column.kernels is Kernels.native:
        reason = native_checks.unsupported(KnownModel(architecture, column.dtype, column.tp))
        if reason is not None:
            raise UserError("engine.kernels", f"native: {reason}", "use engine.kernels=torch or auto")
    return max_context


def run(directory: Path, column: Column, tensor: TensorParallel | None = None) -> list[list[int]]:
    """Returns an engine's ids for each of :func:`requests`, by the steps of a run; [] on a rank that follows."""
    source = find(str(directory), False, need_weights=True)
    settings = EngineSettings(
        engine=column.config,
        generation=GenerationConfig(stop=Stop.length),
        source=source,
        dtype=column.dtype,
        device="cpu",
        max_context=refuse_early(source, column),
        tensor=tensor,
        host_ranks=column.tp,
    )
    engine = proof.load(catalogue.create(settings))
    engine.warm_up()
    if not settings.leads:
        engine.follow()
        return []
    jobs = requests()
    found = {each.index: each for each in engine.generate(iter(engine.arrange(jobs)), Clock())}
    for each in found.values():
        beyond = each.finish_reason == "rejected" and "exceeds the model's context" in (each.error or "")
        assert beyond or each.finish_reason == "length", each.error
    return [found[job.index].token_ids for job in jobs]  # none of a request that the model has no room for


def outcome(work: Callable[[], T]) -> str | T:
    """Returns what ``work`` comes to, or says what has kept it from that."""
    try:
        with quiet():
            return work()
    except UserError as error:
        text = str(error)
        return f"refused: {text}" if "\n" not in text else f"TRACEBACK UserError of several lines: {one_line(text)}"
    except Exception as error:
        return f"TRACEBACK {type(error).__name__}: {one_line(str(error) or 'no message', 160)}"


def wrong(answers: list[list[int]], reference: Reference, bound: float) -> tuple[int, float]:
    """Returns how many of the answers have a token worse than a near-tie, and the largest gap of all.

    An empty one is of a request that the model has no room for.
    """
    gaps = [
        reference.largest_gap(job, ids) if len(ids) == job.output_len else float("inf")
        for job, ids in zip(requests(), answers, strict=True)
        if ids
    ]
    assert len(gaps) >= len(answers) // 2
    return sum(not gap <= bound for gap in gaps), max(gaps, key=lambda gap: (gap != gap, gap))


def judged(answers: list[list[int]], directory: Path, dtype: str, expected: list[list[int]] | None = None) -> str:
    """Returns ``right`` or ``WRONG n/8``.

    Args:
        expected: ids that need no further judgement.
    """
    if answers == expected:
        return "right"
    reference, bound = Reference(directory, rounded=dtype != "float32"), BOUNDS[dtype]
    number, worst = wrong(answers, reference, bound)
    if not number:
        return "right"
    found = f"{number}/{len(answers)} (gap {worst:.2g})"
    if dtype == "float32":
        return f"WRONG {found}"
    # A tiny model may be more sensitive than those that the bound was measured on: what are transformers' own?
    _, own = wrong(Reference(directory, dtype).answers(), reference, bound)
    number, _ = wrong(answers, reference, max(bound, 2 * own))
    found += f", Hugging Face's own in {dtype} {own:.2g}"
    # Where rounding sends a token to another expert, its gap has no bound; a wrong cast would show in most requests.
    return f"WRONG {found}" if number > STRAYS else f"right but for {found}"


def outcomes(directory: Path, mild: Path, parallel: dict[str, Any], columns: Sequence[Column]) -> dict[str, str]:
    """Returns what becomes of a saved model, by column, or why there is none to run.

    Args:
        mild: where the same model is with attention less sharp, for types that round.
        parallel: what became of it on two ranks, by column.
    """
    expected = outcome(lambda: Reference(directory).answers())
    if isinstance(expected, str):
        return {"not built": expected.removeprefix("TRACEBACK ")}
    found: dict[str, str] = {}
    for column in columns:
        exact = column.dtype == "float32"
        if not exact and found.get(Column(column.engine).title) != "right":
            continue  # said already
        place = directory if exact else mild
        answers = parallel[column.title] if column.tp > 1 else outcome(partial(run, place, column))
        if isinstance(answers, list):
            answers = outcome(partial(judged, answers, place, column.dtype, expected if exact else None))
        found[column.title] = answers
    return found


def on_ranks(directories: list[Path], place: Path) -> None:
    """Runs each saved model on the ranks of this launch, and appends to ``place`` what comes of it, line by line.

    A rank that fails alone leaves the other waiting: both end then, and whoever launched them goes on without it.
    """
    from harness.ranks.rank import current
    from harness.ranks.rendezvous import Rendezvous
    from harness.ranks.replicas import Replicas

    rank = current()
    assert rank is not None
    rendezvous = Rendezvous(rank, failed=lambda: None)
    rendezvous.open()
    rendezvous.meet({})
    replicas = Replicas(rank, "cpu", rendezvous, tp=rank.world)
    replicas.join()
    for directory in directories:
        for column in PARALLEL:
            note = {"name": directory.name, "column": column.title}
            guard = threading.Timer(PATIENCE_S, _give_up, (rank.first, place, note))
            guard.daemon = True
            guard.start()
            mine = outcome(partial(run, directory, column, replicas.tensor))
            everyone = replicas.gather(mine)
            guard.cancel()
            if rank.first:
                others = [each for each in everyone if isinstance(each, str)]
                _append(place, note | {"found": others[0] if others else mine})
    replicas.leave()


def _give_up(first: bool, place: Path, note: dict[str, Any]) -> None:
    if first:
        _append(place, note | {"found": "TRACEBACK hang: one rank failed alone, the other waits for it"})
    os._exit(3)


def _append(place: Path, entry: dict[str, Any]) -> None:
    with place.open("a") as file:
        print(json.dumps(entry), file=file)


def read_parallel(place: Path) -> Iterator[tuple[str, str, Any]]:
    """Yields name of the directory, column and what came of it."""
    if place.exists():
        for line in place.read_text().splitlines():
            entry = json.loads(line)
            yield entry["name"], entry["column"], entry["found"]


if __name__ == "__main__":
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    on_ranks([Path(line) for line in Path(sys.argv[-2]).read_text().splitlines()], Path(sys.argv[-1]))
