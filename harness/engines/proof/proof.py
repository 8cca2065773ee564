"""An engine proves itself on its model before the clock: its own passes against Hugging Face's untouched model.

A few requests of made-up ids (lengths that fill and cross blocks, a split prompt, one across each position that is
special to the model, several together, some decode steps) are scored by the engine as it will run them, and one by one
by Hugging Face's ``generate``. What differs by more than rounding is refused, or the next kernels are taken.

What counts is the distance of the log-probability of a given token, in standard deviations of the logits at its
position. In float32 the largest must be below :data:`EXACT`. In 16 bits the bound follows from the model itself: how
far Hugging Face's own logits in that type are from its float32 ones, with the same weights.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import random
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from harness.basics.errors import UserError
from harness.engines.base import Engine, EngineSettings
from harness.engines.proof import cache, shortened
from harness.engines.scoring import Scored
from harness.engines.shared.plain_attention import computed
from harness.engines.shared.unusable import Unusable
from harness.machine.memory import forget_peak_memory
from harness.models.architecture import positive_integer, rotary_threshold
from harness.models.loading import load_model
from harness.models.reference import forced_logits
from harness.models.source import Source

LENGTHS = (1, 6, 19, 50, 83)  # of prompts: 32 and 64, where blocks and passes end, lie within the last two
TARGETS = 4  # tokens after each prompt, of which all but the last are fed one by one
SPECIAL_LIMIT = 16_384  # no prompt is made longer than this for a special position
EXACT = 1e-3  # float32: 25 times what Hugging Face's own logits of the demo model are from float64's
SLACK = 4.0  # 16 bits: an engine may be so many times as far from float32 as Hugging Face is
FLOORS = {"float16": 0.01, "bfloat16": 0.05}  # where Hugging Face happened to round well
UNMEASURED = 0.35  # 16 bits, where there is no float32 to tell how much Hugging Face rounds
QUANTIZED = 0.5  # weights of 6 bits are others; what is computed wrongly is at 0.9 or more
SPECIAL_KEYS = (
    *("sliding_window", "attention_chunk_size", "chunk_size", "window_size", "attention_window_size"),
    *("original_max_position_embeddings",),  # of phi3 and its kin, whose generate forgets its cache there
)


class Differs(UserError):
    """The engine does not compute what Hugging Face computes; ``reason`` says by how much."""

    def __init__(self, engine: Engine, reason: str) -> None:
        self.reason = reason
        field, found, remedy = engine.suspect
        super().__init__(field, f"{found}: {reason}", remedy)


@dataclass(frozen=True, slots=True)
class Expected:
    """What Hugging Face makes of the probes.

    Attributes:
        items: the probes.
        logprobs: by probe, of the target tokens, from float32 logits.
        spreads: standard deviations of the logits there.
        bound: the largest distance that is rounding.
    """

    items: list[Scored]
    logprobs: list[list[float]]
    spreads: list[list[float]]
    bound: float

    def distances(self, place: int, logprobs: Sequence[float]) -> list[float]:
        """Returns how far the log-probabilities of the probe at ``place`` are from these, token by token."""
        pairs = zip(self.logprobs[place], logprobs, self.spreads[place], strict=True)
        return [abs(one - other) / max(spread, 1e-30) for one, other, spread in pairs]


def load(engine: Engine, say: Callable[[str], None] = lambda line: None) -> Engine:
    """Loads an engine and has it prove itself; returns it, or the one with the next kernels that took its place.

    All ranks that share a model call it together. How it went is the engine's ``proof``.

    Args:
        say: is told what takes its time.

    Raises:
        Differs: its passes are not the model's, and there are no other kernels to take.
        UserError: the model cannot be loaded, or not be computed by this engine, or its kernels not be had here.
    """
    while True:
        try:
            _load(engine, say)
            return engine
        except (Differs, Unusable) as failure:
            other = engine.instead(failure.reason)
            if other is None:
                raise
            engine = other
            _free()


def _load(engine: Engine, say: Callable[[str], None]) -> None:
    settings = engine.settings
    if not engine.provable:
        _guarded_load(engine)
        return
    key = cache.key(settings, engine.kernels, engine.facts) if settings.leads else None
    kept = cache.read(key) if key else None
    plan = kept, None if kept else shortened.layers_that_fit(settings), secrets.token_hex(8)
    if settings.tensor is not None:
        plan = settings.tensor.share(plan)  # the leader's files and memory decide
    kept, layers, name = plan
    if kept:
        _guarded_load(engine)
        engine.proof = kept | {"cached": True, "seconds": 0.0}
        return
    family = _family(settings)
    for name in ("transformers.modeling_utils", f"transformers.models.{family}.modeling_{family}"):
        with contextlib.suppress(ImportError):  # seconds that loading takes in any case, and so no part of the proof's
            importlib.import_module(name)
    started = time.perf_counter()
    part = f"the first {layers} layers of " if layers else ""
    say(f"comparing {engine.kernels} kernels with {part}Hugging Face's model (once for these weights and settings)")
    with shortened.cut_to(settings, layers, name) as source:
        asked = _ask(settings, source) if settings.leads else None
        proving = engine if layers is None else type(engine)(replace(settings, source=source))
        loading = time.perf_counter()
        _guarded_load(proving)
        loading = time.perf_counter() - loading
        found = _compare(proving, asked)
    found |= {"seconds": time.perf_counter() - started - loading * (layers is None), "layers": layers}
    if layers is not None:
        del proving
        _free()
        _guarded_load(engine)
    engine.proof = found
    if key and asked is not None and found["requests"] == len(asked.items):
        cache.write(key, found)  # one of a cache too small for some of them says nothing of a larger one's


def _guarded_load(engine: Engine) -> None:
    settings = engine.settings
    with computed(settings.engine.name, _family(settings), settings.tensor is not None):
        engine.load()


def _family(settings: EngineSettings) -> str:
    return str(settings.source.architecture.get("model_type", "?"))


def probes(vocab_size: int, specials: Sequence[int], max_context: int | None) -> list[Scored]:
    """Returns the requests of a proof: prompts of random ids, each with :data:`TARGETS` ids to continue with."""
    rng = random.Random(0)

    def ids(count: int) -> list[int]:
        return [rng.randrange(min(3, vocab_size - 1), vocab_size) for _ in range(count)]

    room = (max_context or 1 << 30) - TARGETS
    around = [special + aside for special in specials for aside in (-2, 2)]  # decode steps cross it; the prompt does
    lengths = sorted({min(length, room) for length in (*LENGTHS, *around)})
    return [Scored(number, ids(length), ids(TARGETS)) for number, length in enumerate(lengths) if length > 0]


def special_positions(config: dict[str, Any], max_context: int | None) -> list[int]:
    """Returns where a model computes otherwise than before: at the end of its windows and of its rotary frequencies."""
    places = {positive_integer(place) for place in (*map(config.get, SPECIAL_KEYS), rotary_threshold(config))}
    limit = min(max_context or SPECIAL_LIMIT, SPECIAL_LIMIT) - TARGETS - 2
    return sorted(place for place in places if 0 < place <= limit)


@torch.inference_mode()
def _ask(settings: EngineSettings, source: Source) -> Expected:
    """Has Hugging Face's model score the probes, and frees it again."""
    sharded, dtype = settings.tensor is not None, getattr(torch, settings.dtype)
    with computed("baseline", _family(settings)):
        # Weights that are made up depend on where they are drawn: as in the engine, on the host for several ranks.
        model: Any = load_model(source, dtype=dtype, device="cpu" if sharded else settings.device)
        if sharded and settings.device != "cpu":
            model = model.to(settings.device)
        config = model.config.get_text_config(decoder=True)
        specials = special_positions(config.to_dict(), settings.max_context)
        items = probes(config.vocab_size, specials, settings.max_context)
        packed = getattr(model, "hf_quantizer", None) is not None  # weights that cannot be made float32
        rounded = [_logprobs(_whole(model, item), item) for item in items if dtype is not torch.float32]
        model = model if packed else model.float()
        exact = _by_generate(model, items, stepwise=bool(specials))
    if not all(logits.isfinite().all() for logits in exact):
        raise UserError("model", "its logits are not numbers", "check the weights, or use model.dtype=float32")
    logprobs = [_logprobs(logits, item) for logits, item in zip(exact, items, strict=True)]
    spreads = [logits.std(-1).tolist() for logits in exact]
    expected = Expected(items, logprobs, spreads, EXACT)
    if rounded:
        worst = max(median(expected.distances(place, own)) for place, own in enumerate(rounded))
        expected = replace(expected, bound=max(SLACK * worst, FLOORS[settings.dtype]))
    if packed and dtype is not torch.float32:
        expected = replace(expected, bound=UNMEASURED)
    if settings.quantization is not None:
        expected = replace(expected, bound=max(expected.bound, QUANTIZED))
    del model
    _free()
    forget_peak_memory(settings.device)  # of the run, not of its proof
    return expected


def _by_generate(model: Any, items: list[Scored], stepwise: bool) -> list[torch.Tensor]:
    """Returns the logits of each probe's targets, as ``generate`` computes them for it alone.

    One pass over all of a probe is faster, and is taken where it gives the same for the longest.

    Args:
        stepwise: do without it: some models' ``generate`` is not their whole pass where it crosses a special position.
    """
    whole = [] if stepwise else [_whole(model, item) for item in items]
    if whole:
        alone = forced_logits(model, items[-1].context_ids, items[-1].target_ids)
        stepwise = not ((alone - whole[-1]).abs().amax(-1) <= EXACT * alone.std(-1)).all()
    return [forced_logits(model, item.context_ids, item.target_ids) for item in items] if stepwise else whole


def _whole(model: Any, item: Scored) -> torch.Tensor:
    ids = torch.tensor([[*item.context_ids, *item.target_ids[:-1]]], device=model.device)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0, -len(item.target_ids) :]
    return logits.float()


def _logprobs(logits: torch.Tensor, item: Scored) -> list[float]:
    targets = torch.tensor(item.target_ids, device=logits.device)
    found: list[float] = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0].tolist()
    return found


def _compare(engine: Engine, asked: Expected | None) -> dict[str, Any]:
    """Has the engine score the probes, and tells all ranks what came of it; raises Differs if it is not the model's."""
    settings = engine.settings
    if asked is None:
        engine.follow()
        reason, found = settings.tensor.share() if settings.tensor is not None else (None, {})
    else:
        reason, found = _score(engine, asked)
        if settings.tensor is not None:
            settings.tensor.share((reason, found))
    if reason is not None:
        raise Differs(engine, reason)
    return dict(found)


def _score(engine: Engine, asked: Expected) -> tuple[str | None, dict[str, Any]]:
    """Returns in what the engine differs, if it does, and the record's section ``proof``."""
    settings = engine.settings
    try:
        with computed(settings.engine.name, _family(settings), settings.tensor is not None):
            scores = {score.index: score for score in engine.prove(asked.items)}
    except FloatingPointError:
        return "its logits are not numbers, Hugging Face's are", {}
    exact = settings.dtype == "float32" and settings.quantization is None
    largest, compared = 0.0, 0
    for place, item in enumerate(asked.items):
        score = scores[item.index]
        if score.error is not None:  # the KV cache, or a row of a batch, has no room for it
            continue
        compared += 1
        distances = asked.distances(place, score.logprobs)
        distance = max(distances) if exact else median(distances)
        largest = max(largest, distance)
        if not distance <= asked.bound:
            return (
                f"after a prompt of {len(item.context_ids)} tokens its logits are {distance:.2g} of their spread from "
                f"Hugging Face's (bound {asked.bound:.2g})"
            ), {}
    if not compared:
        engine.notes.append("the engine was not compared with Hugging Face's model: there is no room for a request")
    return None, {"requests": compared, "largest_distance": largest, "bound": asked.bound}


def _free() -> None:
    """Gives back the memory of models that are no longer referred to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps what is freed in small pieces
        ctypes.CDLL(None).malloc_trim(0)
