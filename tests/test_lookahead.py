"""The loop of passes with a device that computes them later: what comes out is what comes of computing at once."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.engines import settings
from support.late_device import VOCABULARY, Broken, LateDevice, alone, piece
from support.models import save_small_demo
from support.runs import deepspeed, ran

from harness.basics.clock import Clock
from harness.engines.base import Progress
from harness.engines.fastgen.batch import Sequence
from harness.engines.fastgen.engine import FastGenEngine
from harness.engines.fastgen.scheduler import Scheduler
from harness.engines.shared.kv_blocks import KvBlocks
from harness.engines.shared.order import Order
from harness.models.ends import Ends, StopStrings
from harness.models.tokenizer import ByteTokenizer
from harness.verify import __main__ as verify
from harness.workload.records import Completion, PassRecord, Request

COUNTS = ("completed", "rejected", "prompt_tokens", "output_tokens", "requests")
TIMES = ("started_s", "seconds")


@dataclass(frozen=True)
class Load:
    """A workload and what it runs on; ``eos_at`` as of :class:`LateDevice`, ``strings`` are stop strings."""

    requests: list[Request]
    eos_at: dict[int, int]
    max_sequences: int
    token_budget: int
    block_size: int
    blocks: int
    lookahead: int
    strings: tuple[str, ...] = ()

    def engine(self, depth: int, **how: Any) -> tuple[FastGenEngine, LateDevice]:
        chosen = settings(token_budget=self.token_budget, max_sequences=self.max_sequences, order=Order.dataset)
        engine = FastGenEngine(dataclasses.replace(chosen, lookahead=self.lookahead))
        device = LateDevice(depth, self.block_size, self.blocks, self.max_sequences, eos_at=self.eos_at, **how)
        engine.runner, engine.tokenizer, engine.total_blocks = device, ByteTokenizer(), self.blocks
        pieces = {token: piece(token).encode() for token in range(VOCABULARY)}
        strings = StopStrings(self.strings, pieces, max(map(len, self.strings))) if self.strings else None
        engine.ends = Ends(device.stop_ids(), strings=strings)
        return engine, device


@dataclass
class Outcome:
    """What came of a workload; ``order`` is that of the requests that ran."""

    completions: list[Completion]
    passes: list[PassRecord]
    engine: FastGenEngine
    device: LateDevice

    @property
    def order(self) -> list[int]:
        return [one.index for one in self.completions if one.finish_reason != "rejected"]

    @property
    def answers(self) -> dict[int, tuple[Any, ...]]:
        assert len({one.index for one in self.completions}) == len(self.completions)
        return {
            one.index: (one.finish_reason, one.token_ids, one.prompt_tokens, one.output_tokens, one.text, one.error)
            for one in self.completions
        }


def run(load: Load, depth: int, requests: Iterable[Request] | None = None, **how: Any) -> Outcome:
    """Runs a workload to its end, and checks what must hold at any depth."""
    engine, device = load.engine(depth, **how)
    passes: list[PassRecord] = []
    told: list[Progress] = []
    engine.on_pass, engine.on_progress = passes.append, told.append
    try:
        clock = Clock()
        found = list(engine.generate(load.requests if requests is None else requests, clock))
        ended = clock()
    finally:
        device.close()
    assert device.launched == device.waited == len(passes)
    assert beside() == []
    statistics = engine.statistics
    done = [one for one in found if one.finish_reason != "rejected"]
    fed = sum(one.prompt_tokens + one.output_tokens - 1 for one in done)
    assert statistics.recomputed_tokens is not None and statistics.dropped_tokens is not None
    assert sum(record.tokens for record in passes) == fed + statistics.recomputed_tokens + statistics.dropped_tokens
    counted = (sum(one.prompt_tokens for one in done), sum(one.output_tokens for one in done))
    assert ((told[-1].prompt_tokens, told[-1].output_tokens) if told else (0, 0)) == counted
    before = 0.0
    for record in passes:
        assert record.started_s >= before and record.seconds >= 0
        before = record.started_s + record.seconds
    assert statistics.prefill_s + statistics.decode_s == pytest.approx(sum(record.seconds for record in passes))
    spent = statistics.prefill_s + statistics.decode_s + statistics.tokenize_s + statistics.detokenize_s
    assert spent <= ended + 1e-9
    for one in done:
        assert one.first_token_s is not None and 0 < one.first_token_s <= one.finished_s <= ended
    return Outcome(found, passes, engine, device)


def beside() -> list[str]:
    """Returns the threads of engines that are still there."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("texts")]


@st.composite
def loads(draw: st.DrawFn, ends: bool | None = None) -> Load:
    """Draws a workload; ``ends`` says whether tokens end sequences early."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    early = draw(st.booleans()) if ends is None else ends
    strings: tuple[str, ...] = draw(st.sampled_from([(), (), ("abc",), ("bb", "cacc")])) if ends is None else ()
    block_size, max_sequences = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    requests, eos_at = [], {}
    for index in range(draw(st.integers(1, 18))):
        prompt = tuple(rng.randrange(3, 50) for _ in range(rng.choice([0, 1, 2, 5, 9, 30]) if index else 3))
        output_len = rng.choice([1, 2, 3, 8, 15])
        requests.append(Request(index, "", output_len, prompt_ids=prompt))
        if early and rng.random() < 0.7:
            eos_at[index] = rng.randrange(output_len)
    return Load(
        requests,
        eos_at,
        max_sequences,
        max_sequences + draw(st.sampled_from([0, 1, 4, 20])),
        block_size,
        draw(st.integers(1, 24)),
        draw(st.integers(1, 5)),
        strings,
    )


def check_equal(load: Load) -> Outcome:
    """Compares a workload's outcomes at both depths, and what was not rejected with each request by itself."""
    at_once, ahead = run(load, 0), run(load, 1)
    assert ahead.answers == at_once.answers
    assert ahead.answers.keys() == {request.index for request in load.requests}
    for request in load.requests:
        reason, ids, prompt_tokens, *_ = ahead.answers[request.index]
        if reason != "rejected":
            assert prompt_tokens == len(request.prompt_ids or ())
            eos_at, prompt = load.eos_at.get(request.index), request.prompt_ids or ()
            assert (ids, reason) == alone(prompt, request.output_len or 0, eos_at, load.strings)
    if not load.eos_at and not load.strings:
        assert ahead.order == at_once.order
        assert ahead.device.shapes == at_once.device.shapes
        same = [[{**dataclasses.asdict(one), **dict.fromkeys(TIMES)} for one in two.passes] for two in (at_once, ahead)]
        assert same[0] == same[1]
        for name in ("steps", "preemptions", "recomputed_tokens", "dropped_tokens", "kv_peak_utilisation"):
            assert getattr(ahead.engine.statistics, name) == getattr(at_once.engine.statistics, name)
    assert at_once.engine.statistics.dropped_tokens == 0
    return ahead


def test_a_pass_ahead_changes_no_answer(scale: Callable[..., int]) -> None:
    seen = {"preemptions": 0, "dropped": 0, "rejected": 0, "eos": 0, "stop": 0}

    @hypothesis_settings(max_examples=scale(300, 3000, 150), deadline=None)
    @given(load=loads())
    def check(load: Load) -> None:
        ahead = check_equal(load)
        reasons = [reason for reason, *_ in ahead.answers.values()]
        seen["preemptions"] += ahead.engine.statistics.preemptions or 0
        seen["dropped"] += ahead.engine.statistics.dropped_tokens or 0
        seen["rejected"] += reasons.count("rejected")
        seen["eos"] += reasons.count("eos")
        seen["stop"] += reasons.count("stop")

    check()
    assert all(seen.values()), seen


EXAMPLE = Load(
    [Request(index, "", 12, prompt_ids=tuple(range(3, 3 + 5 * (index % 4 + 1)))) for index in range(20)],
    {index: index % 9 for index in range(0, 20, 2)},
    max_sequences=4,
    token_budget=16,
    block_size=4,
    blocks=20,
    lookahead=3,
)


def test_what_is_already_done_is_not_done_again(scale: Callable[..., int]) -> None:
    @hypothesis_settings(max_examples=scale(60, 600, 20), deadline=None)
    @given(load=loads(), share=st.floats(0, 1))
    def check(load: Load, share: float) -> None:
        whole = run(load, 0).answers
        engine, device = load.engine(1)
        cut = engine.generate(load.requests, Clock())
        first = [next(cut) for _ in range(round(share * len(load.requests)))]
        cut.close()
        device.close()
        assert beside() == []
        done = {completion.index for completion in first}
        rest = run(load, 1, [request for request in load.requests if request.index not in done])
        assert sorted([*done, *rest.answers]) == sorted(whole)
        assert {one.index: one.token_ids for one in [*first, *rest.completions]} == {
            index: ids for index, (_, ids, *_) in whole.items()
        }

    check()


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(("what", "number"), [("launch", 0), ("launch", 1), ("launch", 9), ("wait", 0), ("wait", 9)])
def test_a_pass_that_fails_ends_the_run_and_leaves_nothing_behind(depth: int, what: str, number: int) -> None:
    engine, device = EXAMPLE.engine(depth, fails=(what, number))
    found = []
    with pytest.raises(Broken):
        found.extend(engine.generate(EXAMPLE.requests, Clock()))
    assert beside() == []
    device.close()
    fresh = LateDevice(depth, EXAMPLE.block_size, EXAMPLE.blocks, EXAMPLE.max_sequences, eos_at=EXAMPLE.eos_at)
    engine.runner = fresh
    answers = {one.index: one.token_ids for one in engine.generate(EXAMPLE.requests, Clock())}
    fresh.close()
    assert answers == {index: ids for index, (_, ids, *_) in run(EXAMPLE, 0).answers.items()}
    assert all(answers[one.index] == one.token_ids for one in found)


def test_an_interrupt_in_a_pass_or_in_the_tokenizer_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, device = EXAMPLE.engine(1)
    passes = 0

    def interrupt(record: PassRecord) -> None:
        nonlocal passes
        passes += 1
        if passes == 5:
            raise KeyboardInterrupt

    engine.on_pass = interrupt
    with pytest.raises(KeyboardInterrupt):
        list(engine.generate(EXAMPLE.requests, Clock()))
    assert beside() == []

    def broken(requests: list[Request]) -> list[list[int]]:
        raise ValueError("no such text")

    monkeypatch.setattr(engine, "encode", broken)
    with pytest.raises(ValueError, match="no such text"):
        list(engine.generate(EXAMPLE.requests, Clock()))
    assert beside() == []
    device.close()


def test_requests_are_pulled_by_the_thread_that_asks_for_completions() -> None:
    threads = set()

    def shared() -> Iterable[Request]:
        for request in EXAMPLE.requests:
            threads.add(threading.get_ident())
            yield request

    assert run(EXAMPLE, 1, shared()).answers == run(EXAMPLE, 0).answers
    assert threads == {threading.get_ident()}


def test_texts_are_made_beside_passes_and_before_the_run_ends() -> None:
    load = dataclasses.replace(EXAMPLE, requests=[Request(i, f"text {i}", 6) for i in range(12)], eos_at={}, blocks=60)
    writers, readers = set(), set()

    class Tokenizer(ByteTokenizer):
        def __call__(self, text: Any, add_special_tokens: bool = True) -> Any:
            readers.add(threading.get_ident())
            return super().__call__(text, add_special_tokens)

        def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
            writers.add(threading.get_ident())
            time.sleep(0.002)
            return super().decode(ids, skip_special_tokens)

    for depth in (0, 1):
        engine, device = load.engine(depth)
        engine.tokenizer = Tokenizer()
        writers.clear(), readers.clear()
        clock = Clock()
        found = list(engine.generate(load.requests, clock))
        ended = clock()
        device.close()
        assert len(writers | readers) == 1, "a tokenizer has one user at a time"
        assert (threading.get_ident() in writers) == (depth == 0)
        assert [one.finished_s for one in found] == sorted(one.finished_s for one in found)
        assert found[-1].finished_s <= ended
        assert all(one.text == ByteTokenizer().decode(one.token_ids, True) for one in found)


def test_the_device_has_the_next_pass_before_one_ends() -> None:
    """With a pass of 10 ms: a host that waited for ids would launch each pass after the end of the one before."""
    load = dataclasses.replace(EXAMPLE, eos_at={}, blocks=60)
    engine, device = load.engine(1, pass_s=0.01)
    launched: list[float] = []
    launch = device.launch

    def timed(batch: Any) -> Any:
        launched.append(time.perf_counter())
        return launch(batch)

    device.launch = timed  # type: ignore[method-assign]
    answers = {one.index: one.token_ids for one in engine.generate(load.requests, Clock())}
    device.close()
    assert answers == {index: ids for index, (_, ids, *_) in run(load, 0).answers.items()}
    late = [number for number in range(1, len(launched)) if launched[number] > device.ended[number - 1]]
    assert len(late) < len(launched) / 2  # on a busy machine a thread may come late now and then


def test_a_replica_takes_enough_for_two_passes_and_no_more() -> None:
    scheduler = Scheduler(4096, 512, KvBlocks(10_000, 64))
    taken = 0
    while scheduler.hungry(4):
        for _ in range(4):
            scheduler.submit(Sequence(taken, [5] * 100, 100, 50))
            taken += 1
    assert taken == 84  # 8,192 tokens are 82 prompts
    batch = scheduler.schedule()
    assert batch.tokens == 4096
    assert scheduler.hungry(4)
    assert scheduler.hungry(256)


@pytest.mark.parametrize("depth", [0, 1])
def test_no_pass_of_a_replica_starves_while_prompts_are_left(depth: int) -> None:
    requests = [Request(index, "", 1, prompt_ids=(7,) * 10) for index in range(300)]
    load = Load(requests, {}, 64, 640, 16, 500, lookahead=4)
    passes = run(load, depth).passes
    assert [record.tokens for record in passes[:-1]] == [640] * (len(passes) - 1)


@pytest.fixture(scope="module")
def ending(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that ends a sequence with any of 5,000 ids."""
    directory = save_small_demo(tmp_path_factory.mktemp("ending"), demo_model)
    for name in ("config.json", "generation_config.json"):
        said = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({**said, "eos_token_id": [*range(2, 49152, 10)]}))
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_with_a_late_device_has_the_same_ids_and_adds_up(
    ending: Path, tmp_path: Path, ranks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"model.path={ending}", "model.dtype=float32", "engine.kernels=torch", "dataset.num_samples=24"]
    words += ["engine.token_budget=64", "engine.max_sequences=8", "engine.kv_block_size=8", "engine.kv_memory=250KiB"]
    words += ["generation.max_output_len=40", f"parallel.tp={ranks}"]
    launcher = (sys.executable,) if ranks == 1 else deepspeed(ranks)
    at_once = ran(tmp_path / "at once", *words, launcher=launcher)
    late = ran(tmp_path / "late", *words, launcher=(*launcher, "tests/support/late_main.py"))
    assert (at_once.status, late.status) == (0, 0), late.stderr
    assert late.token_ids == at_once.token_ids
    assert {name: late.row[name] for name in COUNTS} == {name: at_once.row[name] for name in COUNTS}
    assert late.record["engine_statistics"]["dropped_tokens"] > 0
    assert at_once.record["engine_statistics"]["dropped_tokens"] == 0
    for run in (at_once, late):
        assert verify.main([run.row["run_id"], "--results", str(run.results)]) == 0, capsys.readouterr().out
