"""Every runner's logits beside Hugging Face's in float32, for a ragged batch of whatever model: on a GPU a wide one.

All are fed the same tokens, and so may differ in rounding alone. Hugging Face's own model in the same type is the
yardstick: a runner may be a little further from float32 than that, not more.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.config.schema import GenerationConfig, Stop
from harness.engines.base import EngineSettings
from harness.engines.fastgen.batch import Sequence
from harness.engines.fastgen.config import FastGenConfig, Kernels
from harness.engines.fastgen.runners import choice
from harness.engines.fastgen.runners.base import Runner
from harness.engines.fastgen.scheduler import Scheduler
from harness.engines.shared.order import Order
from harness.models.directory import find
from support.attention import LOUD
from support.triton_passes import Shuffled, prompts

FURTHER = 1.25  # times Hugging Face's own distance
GAP = {"float16": 0.02, "bfloat16": 0.15}  # of the logits' deviation; a wrong token is off by 1 to 3


@dataclass(frozen=True)
class Work:
    """A ragged batch: prompts and outputs of so many tokens, in passes of a budget that cuts the longer ones."""

    prompts: tuple[int, ...]
    outputs: tuple[int, ...]
    budget: int
    block_size: int = 64

    @property
    def ends(self) -> list[int]:
        """Tokens of each sequence that are fed: the last output is not."""
        return [prompt + output - 1 for prompt, output in zip(self.prompts, self.outputs, strict=True)]

    def texts(self, vocab: int) -> list[list[int]]:
        """Returns each sequence's tokens, the last output's too."""
        return prompts([end + 1 for end in self.ends], vocab)


@dataclass
class Distance:
    """How far a runner is from Hugging Face in float32.

    Attributes:
        ours, theirs: mean Euclidean distance of a row of logits, the runner's and Hugging Face's in the same type.
        rows: compared.
        gap: by how much a chosen token's logit is below the best at most, in deviations of the logits; of passes of
            decodes, computed as a run computes them.
    """

    ours: float
    theirs: float
    rows: int
    gap: float

    @property
    def ratio(self) -> float:
        """The runner's distance over Hugging Face's."""
        return self.ours / self.theirs

    def check(self, dtype: str, further: float = FURTHER) -> None:
        """Raises AssertionError where it is too far, or is no distance."""
        assert 0 < self.ratio < further, f"{self.ratio:.3g} times as far from float32 as Hugging Face, not {further}"
        assert self.gap < GAP[dtype], f"a chosen token is {self.gap:.3g} deviations below the best, not {GAP[dtype]}"


@dataclass
class Model:
    """A checkpoint, and what Hugging Face's code makes of the work.

    Attributes:
        dtype: of the runners.
    """

    directory: Path
    dtype: str
    device: str
    work: Work
    vocab: int

    @cached_property
    def exact(self) -> list[Tensor]:
        """Logits of every fed token in float32, ``[tokens, vocab]`` of each sequence."""
        return self._hugging_face(torch.float32)

    @cached_property
    def rounded(self) -> list[Tensor]:
        """The same in the runners' type."""
        return self._hugging_face(getattr(torch, self.dtype))

    @torch.inference_mode()
    def _hugging_face(self, dtype: torch.dtype) -> list[Tensor]:
        from transformers import AutoModelForCausalLM

        assert not torch.backends.cuda.matmul.allow_tf32, "TF32 would be no float32"
        model = AutoModelForCausalLM.from_pretrained(self.directory, dtype=dtype).eval().to(self.device)
        texts = zip(self.work.texts(self.vocab), self.work.ends, strict=True)
        fed = [torch.tensor([text[:end]], device=self.device) for text, end in texts]
        return [model(ids, use_cache=False).logits[0].float() for ids in fed]

    def usual(self) -> dict[str, float]:
        """Returns how far Hugging Face's own logits in the type are off, and the logits' deviation."""
        exact, rounded = torch.cat(self.exact), torch.cat(self.rounded)
        return {
            "distance": float((rounded - exact).norm(dim=-1).mean()),
            "deviation": float(exact.std(-1).mean()),
            "largest_error": float((rounded - exact).abs().max()),
        }

    def settings(self, kernels: Kernels) -> EngineSettings[FastGenConfig]:
        """Returns an engine's settings for this model and work."""
        engine = FastGenConfig(
            kernels=kernels,
            order=Order.dataset,
            token_budget=self.work.budget,
            max_sequences=len(self.work.prompts),
            kv_block_size=self.work.block_size,
            kv_memory="1GiB",
        )
        return EngineSettings(
            engine=engine,
            generation=GenerationConfig(stop=Stop.length),
            source=find(str(self.directory), False, need_weights=True),
            dtype=self.dtype,
            device="cuda:0" if self.device == "cuda" else "cpu",
            max_context=2 * max(self.work.ends),
        )

    def distance(self, runner: Runner) -> Distance:
        """Returns how far a runner, loaded here, is off."""
        runner.load()
        rows, ids = computed(runner, self.work, self.work.texts(self.vocab))
        ours, theirs = [], []
        for uid, found in enumerate(rows):
            places = sorted(found)
            exact, rounded = self.exact[uid][places], self.rounded[uid][places]
            logits = torch.stack([found[place] for place in places]).to(exact.device).float()
            ours.append((logits - exact).norm(dim=-1))
            theirs.append((rounded - exact).norm(dim=-1))
        gaps = [0.0]
        for (uid, place), token in ids.items():
            row = self.exact[uid][place]
            gaps.append(float((row.amax() - row[token]) / row.std()))
        both = torch.cat(ours), torch.cat(theirs)
        return Distance(float(both[0].mean()), float(both[1].mean()), len(both[0]), max(gaps))


def runner_of(model: Model, kernels: Kernels, stand_ins: bool = False) -> Runner:
    """Returns these kernels' runner.

    Args:
        stand_ins: whether DeepSpeed's kernels are stood for, so that nothing need be installed.

    Raises:
        UserError: they cannot compute this model, or not here.
    """
    settings = model.settings(kernels)
    if stand_ins and kernels is Kernels.deepspeed:
        from harness.engines.fastgen.runners.deepspeed_runner import DeepSpeedRunner

        return DeepSpeedRunner(settings)
    return choice.choose(settings)[0]


def poison(runner: Any) -> None:
    """Fills a cache of nobody's with NaN, or with loud numbers where kernels multiply before they mask."""
    if runner.name == "triton":
        for layer in (*runner.decoder.cache.keys, *runner.decoder.cache.values):
            layer.fill_(float("nan"))
    elif runner.name == "torch":
        for cache in runner.caches:
            cache.keys.fill_(LOUD)
            cache.values.fill_(LOUD)
    elif runner.name == "deepspeed":
        for layer in runner.engine._state_manager._kv_cache._caches:
            layer.fill_(LOUD)


@torch.inference_mode()
def computed(
    runner: Runner, work: Work, texts: list[list[int]]
) -> tuple[list[dict[int, Tensor]], dict[tuple[int, int], int]]:
    """Feeds the texts through the scheduler's passes, over scattered blocks of a cache that is poisoned.

    Returns:
        Of each sequence logits by place, of all tokens or of those that a runner has them of; and the ids that passes
        of decodes alone chose, by sequence and place.
    """
    blocks = runner.allocate(sum(-(-len(text) // runner.block_size) for text in texts) + 3)
    poison(runner)
    scheduler = Scheduler(work.budget, len(texts), Shuffled(blocks, runner.block_size, 0))
    for uid, (text, prompt, output) in enumerate(zip(texts, work.prompts, work.outputs, strict=True)):
        scheduler.submit(Sequence(uid, text[:prompt], prompt, output))
    rows: list[dict[int, Tensor]] = [{} for _ in texts]
    ids: dict[tuple[int, int], int] = {}
    while scheduler.unfinished:
        batch = scheduler.schedule()
        logits = runner.logits(batch, list(range(batch.tokens)) if runner.every_token else None)
        row, forced, ends = 0, [], []
        for sequence, start, length, last in batch.chunks:
            if runner.every_token:
                rows[sequence.uid] |= {start + place: logits[row + place] for place in range(length)}
                row += length
            elif last:
                rows[sequence.uid][start + length - 1] = logits[row]
                row += 1
            if last:
                ends.append((sequence.uid, start + length - 1))
                forced.append(texts[sequence.uid][start + length])
        if batch.decode_tokens == batch.tokens:  # once more, as a run computes it: where there are graphs, by one
            ids |= dict(zip(ends, runner.launch(batch)(), strict=True))
        scheduler.complete(batch, forced)
    assert scheduler.preemptions == 0
    return rows, ids
