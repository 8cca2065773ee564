"""The checks of arithmetic that the acceptance suite runs on a GPU: each of them fails where something is wrong."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.interpreter import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")

from support import attention, kernel_checks, op_batches, op_cases
from support.attention import Ragged, Shape
from support.deepspeed_kernels import Kernels
from support.models import save_wide
from support.rounding import near
from support.runs import ROOT
from support.wide import Distance, Model, Work, runner_of

from harness.basics.errors import UserError
from harness.engines.fastgen.config import Kernels as Names
from harness.engines.fastgen.runners import paged_attention, torch_runner
from harness.engines.shared import deepspeed_ops
from harness.engines.shared.unusable import Unusable

sys.path.insert(0, str(ROOT / "launch"))

from acceptance import built, on_kernels, on_wide
from acceptance.findings import Outcome
from acceptance.stage import Stage

pytestmark = [pytest.mark.usefixtures("one_thread"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]
HALF = torch.float16


def test_distances_are_told_in_bounds() -> None:
    one = torch.tensor([1.0, 2.0])
    assert near(one, torch.tensor([1.5, 2.0]), torch.tensor([1.0, 0.0])) == 0.5
    with pytest.raises(AssertionError, match=r"^1 of 2 are off, the worst by 2 of its bounds$"):
        near(one, torch.tensor([1.0, 4.0]), torch.ones(2))
    with pytest.raises(AssertionError, match="1 of 2 are off, the worst by inf"):
        near(torch.tensor([float("nan"), 2.0]), one, torch.ones(2))
    with pytest.raises(AssertionError, match="the worst by inf"):
        near(one, torch.tensor([1.0, 2.0 + 1e-6]), torch.zeros(2))


# --- attention ------------------------------------------------------------------------------------------------------


def ragged() -> Ragged:
    """Returns a decode and a chunk that goes on, of two blocks and more."""
    return Ragged(Shape(64, 2, 2, 16, HALF, DEVICE), [(40, 1), (20, 5)], 0)


def swapped(tensor: torch.Tensor, dim: int, one: int, other: int) -> torch.Tensor:
    order = list(range(tensor.shape[dim]))
    order[one], order[other] = order[other], order[one]
    return tensor.index_select(dim, torch.tensor(order, device=tensor.device)).contiguous()


def wrong_block(case: Ragged) -> None:
    row = int(case.chunks.row[0])
    case.chunks.table[row, 0], case.blocks[0][0] = case.blocks[1][0], case.blocks[1][0]


def last_block_first(case: Ragged) -> None:
    row, own = int(case.chunks.row[0]), case.blocks[0]
    own[0], own[2] = own[2], own[0]
    case.chunks.table[row, 0], case.chunks.table[row, 2] = own[0], own[2]


def heads_swapped(case: Ragged) -> None:
    case.qkv = swapped(case.qkv.view(6, -1, 64), 1, 0, 1).view(6, -1)


def key_heads_swapped(case: Ragged) -> None:
    case.keys, case.new = swapped(case.keys, 1, 0, 1), torch.stack([swapped(case.new[0], 0, 0, 1), case.new[1]])


def one_key_too_many(case: Ragged) -> None:
    case.chunks = dataclasses.replace(case.chunks, start=case.chunks.start + 1)
    case.spans = [(start + 1, length) for start, length in case.spans]


FAULTS = [wrong_block, last_block_first, heads_swapped, key_heads_swapped, one_key_too_many]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_wrong_attention_is_found(fault: Callable[[Ragged], None]) -> None:
    for check in (lambda case: case.check(), lambda case: case.check(2), Ragged.check_torch):
        case = ragged()
        check(case)
        fault(case)
        with pytest.raises(AssertionError, match="are off, the worst by"):
            check(case)


def test_scores_rounded_to_the_type_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = paged_attention.scores
    monkeypatch.setattr(paged_attention, "scores", lambda query, keys: exact(query, keys).to(query.dtype).float())
    with pytest.raises(AssertionError, match="are off"):
        Ragged(Shape(64, 2, 2, 16, torch.bfloat16, DEVICE), [(40, 1), (60, 1)], 0).check_torch()


def test_a_pass_that_is_not_the_same_every_time_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case, passes = ragged(), iter((1, 2))
    exact = attention.attend

    def changing(qkv: torch.Tensor, *more: Any) -> None:
        exact(qkv * next(passes), *more)

    case.spans, case.chunks = case.spans[:1], dataclasses.replace(case.chunks)
    monkeypatch.setattr(attention, "attend", changing)
    with pytest.raises(AssertionError, match="1 of 1 repetitions gave other bits"):
        case.check_repeats(1, 1)


# --- the kernels between --------------------------------------------------------------------------------------------


def norm_without_epsilon(real: Callable[..., None]) -> Callable[..., None]:
    return lambda added, residual, weight, epsilon, out: real(added, residual, weight, 0.2, out)


def norm_of_another_row(real: Callable[..., None]) -> Callable[..., None]:
    return lambda added, residual, weight, epsilon, out: (
        real(added, residual, weight, epsilon, out),
        out.copy_(out.roll(1, 0)),
    )


def turned_backward(real: Callable[..., None]) -> Callable[..., None]:
    return lambda qkv, cosines, sines, *more: real(qkv, cosines, -sines, *more)


def stored_one_further(real: Callable[..., None]) -> Callable[..., None]:
    return lambda qkv, cosines, sines, at, to, *more: real(qkv, cosines, sines, at, (to + 1) % 48, *more)


def gate_and_up_swapped(real: Callable[..., None]) -> Callable[..., None]:
    return lambda gate_up, out: real(gate_up.roll(gate_up.shape[1] // 2, 1), out)


def ids_one_further(real: Callable[..., None]) -> Callable[..., None]:
    return lambda sources, *more: real((sources + 1).clamp(max=49), *more)


def last_of_equals(real: Callable[..., None]) -> Callable[..., None]:
    def fault(logits: torch.Tensor, ids: torch.Tensor, values: torch.Tensor, first: int) -> None:
        real(logits, ids, values, first)
        ids.copy_(first + logits.shape[1] - 1 - logits.flip(1).nan_to_num(-1e4).argmax(1))

    return fault


def ranks_in_another_order(real: Callable[..., None]) -> Callable[..., None]:
    return lambda ids, values, chosen: real(ids.flip(0).contiguous(), values.flip(0).contiguous(), chosen)


@pytest.mark.parametrize(
    ("name", "fault", "check"),
    [
        ("add_rms_norm", norm_without_epsilon, lambda: kernel_checks.norm(100, True, HALF, DEVICE)),
        ("add_rms_norm", norm_of_another_row, lambda: kernel_checks.norm(100, False, HALF, DEVICE)),
        ("rotate_and_store", turned_backward, lambda: kernel_checks.rotary(4, 2, 64, False, HALF, DEVICE)),
        ("rotate_and_store", stored_one_further, lambda: kernel_checks.rotary(4, 2, 64, True, HALF, DEVICE)),
        ("silu_and_multiply", gate_and_up_swapped, lambda: kernel_checks.silu(100, HALF, DEVICE)),
        ("embed", ids_one_further, lambda: kernel_checks.embedding(64, 50, HALF, DEVICE)),
        ("argmax", last_of_equals, lambda: kernel_checks.best(500, HALF, DEVICE)),
        ("choose", ranks_in_another_order, lambda: kernel_checks.best_of_ranks(4, DEVICE)),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_a_wrong_kernel_is_found(
    name: str, fault: Callable[..., Any], check: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    check()
    monkeypatch.setattr(kernel_checks, name, fault(getattr(kernel_checks, name)))
    with pytest.raises(AssertionError):
        check()


# --- DeepSpeed's ops ------------------------------------------------------------------------------------------------


def rounded_frequencies(real: Callable[..., None]) -> Callable[..., None]:
    """What DeepSpeed does by itself."""
    return lambda cache, query, key, value, frequencies, *places: real(
        cache, query, key, value, frequencies.to(query.dtype).float(), *places
    )


def exact_frequencies(real: Callable[..., None]) -> Callable[..., None]:
    return lambda cache, query, key, value, dim, base, *places: Kernels.kv_trained_rotary_embeddings(
        cache, query, key, value, 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim), *places
    )


def alternating_columns_swapped(real: Callable[..., None]) -> Callable[..., None]:
    return lambda out, values, *more: real(out, values.view(len(values), -1, 2).flip(-1).flatten(1), *more)


def a_key_less(real: Callable[..., None]) -> Callable[..., None]:
    def fault(out: Any, query: Any, keys: Any, values: Any, atoms: torch.Tensor, *more: Any) -> None:
        atoms[:, 5] -= (atoms[:, 5] > 1).int()
        real(out, query, keys, values, atoms, *more)

    return fault


OP_FAULTS: list[tuple[str, str, Callable[..., Any]]] = [
    ("linear, down", "blas_linear", lambda real: lambda out, hidden, weight: real(out, hidden, weight.roll(1, 0))),
    ("rms_norm", "rms_norm", lambda real: lambda out, values, gamma, epsilon: real(out, values, gamma, 0.05)),
    ("rms_pre_norm", "rms_pre_norm", lambda real: lambda out, total, *more: real(out, total.clone(), *more)),
    ("gated_activation", "gated_activation", alternating_columns_swapped),
    ("bias_activation", "bias_activation", lambda real: lambda values, bias, kind: real(values, bias.roll(1), kind)),
    ("bias_activation of none", "bias_activation", lambda real: lambda values, bias, kind: values.mul_(2)),
    ("ragged_embed", "ragged_embed", lambda real: lambda out, ids, *more: real(out, ids.roll(1), *more)),
    ("gather_for_logits", "gather_for_logits", lambda real: lambda out, rows, *more: real(out, rows.roll(1, 0), *more)),
    ("build_atoms", "build_atoms", lambda real: lambda *given: real(*given[:-1], 2 * given[-1])),
    ("kv_trained_rotary_embeddings", "kv_trained_rotary_embeddings", rounded_frequencies),
    ("kv_rotary_embeddings", "kv_rotary_embeddings", exact_frequencies),
    ("flash_attn_by_atoms", "flash_attn_by_atoms", a_key_less),
    (
        "flash_attn_by_atoms",
        "flash_attn_by_atoms",
        lambda real: lambda out, query, keys, values, *more: real(out, query, keys, values.flip(2), *more),
    ),
]


@pytest.mark.parametrize(("op", "name", "fault"), OP_FAULTS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_wrong_op_of_deepspeeds_is_found(op: str, name: str, fault: Callable[..., Any]) -> None:
    case = op_cases.cases(op_batches.TINY, torch.bfloat16, "cpu")[op]()
    case.check(Kernels, "cpu")
    wrong = type("Wrong", (Kernels,), {name: staticmethod(fault(getattr(Kernels, name)))})
    with pytest.raises(AssertionError, match="kernel from exact: "):
        case.check(wrong, "cpu")


def test_every_stand_in_is_compared() -> None:
    """But for what checks nothing: a handle is made."""
    called = set()

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            called.add(name)
            return getattr(Kernels, name)

    for make in op_cases.cases(op_batches.TINY, HALF, "cpu", fp6=True).values():
        make().outputs(Recorder(), "cpu")
    assert called == {name for name in vars(Kernels) if not name.startswith("_")}


def test_the_fp6_stand_in_is_exact_of_what_fp6_holds() -> None:
    assert op_cases.fp6_linear(op_batches.TINY, HALF, "cpu").check(Kernels, "cpu")["same_bits"] == 1


# --- whole models ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    sizes = {"hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 1, "vocab_size": 320}
    directory = save_wide(
        tmp_path_factory.mktemp("wide"),
        torch.bfloat16,
        "cpu",
        num_attention_heads=4,
        num_key_value_heads=2,
        **sizes,
    )
    return Model(directory, "bfloat16", "cpu", Work((40, 1, 9), (3, 4, 6), budget=16, block_size=16), 320)


def test_logits_of_a_runner_are_near(model: Model) -> None:
    distance = model.distance(runner_of(model, Names.torch))
    assert distance.rows == sum(model.work.ends) and 0.5 < distance.ratio < 1.2
    distance.check("bfloat16")


def written_one_further(plan: Any) -> None:
    plan.write_offset = (plan.write_offset + 1) % 16


def seen_by_another(plan: Any) -> None:
    if plan.decodes is not None and len(plan.decodes.rows) > 1:
        plan.decodes.rows = plan.decodes.rows.flip(0)


def the_own_token_unseen(plan: Any) -> None:
    for prompt in plan.prompts:
        if prompt.mask is not None:
            prompt.mask[:, -1] = False


@pytest.mark.parametrize("fault", [written_one_further, seen_by_another, the_own_token_unseen])
def test_wrong_logits_of_a_runner_are_found(
    model: Model, fault: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = torch_runner.build_plan

    def wrong(*given: Any) -> Any:
        plan = exact(*given)
        fault(plan)
        return plan

    monkeypatch.setattr(torch_runner, "build_plan", wrong)
    with pytest.raises(AssertionError, match="times as far from float32 as Hugging Face"):
        model.distance(runner_of(model, Names.torch)).check("bfloat16")


def test_a_distance_that_is_none_or_another_token_is_found() -> None:
    Distance(1.2, 1.0, 5, 0.1).check("bfloat16")
    for wrong in (Distance(0.0, 1.0, 5, 0.0), Distance(float("nan"), 1.0, 5, 0.0), Distance(1.0, 1.0, 5, 0.2)):
        with pytest.raises(AssertionError):
            wrong.check("bfloat16")


# --- as stages ------------------------------------------------------------------------------------------------------


def outcomes(stage: Stage, *names: str) -> list[tuple[Outcome, str]]:
    """Returns how these findings ended, as they are on disk."""
    found = {finding.name: finding for finding in stage.other(stage.name)}
    return [(found[name].outcome, found[name].detail) for name in names]


def test_a_finding_says_at_which_sizes_it_is_wrong(tmp_path: Path) -> None:
    stage = Stage("kernels", tmp_path, rehearse=True)
    sizes = {"right": lambda: 0.25, "wrong": lambda: near(torch.ones(1), torch.zeros(1), torch.ones(1) / 8)}
    on_kernels._worst(stage, "some kernel", sizes)
    (finding,) = stage.other("kernels")
    assert (finding.outcome, finding.figures) == (Outcome.failed, {"right": 0.25})
    assert finding.detail == "wrong: 1 of 1 are off, the worst by 8 of its bounds"
    on_kernels._worst(stage, "some kernel", {})  # is not done twice
    assert stage.other("kernels") == [finding]


def test_kernels_that_cannot_be_had_are_refused_or_have_failed(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage("wide", tmp_path, rehearse=True)
    endings: list[Exception] = [
        UserError("engine.kernels", "not here", "use others"),
        Unusable("triton", "no compiler"),
    ]
    for number, error in enumerate(endings):

        def ended(*given: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr("support.wide.runner_of", ended)
        with stage.check(str(number)) as found:
            on_wide._compare(stage, model, Names.triton, found)
    refused, failed = outcomes(stage, "0", "1")
    assert refused == (Outcome.refused, "engine.kernels: not here; use others")
    assert failed[0] is Outcome.failed and "no compiler" in failed[1]


def test_ops_are_not_compiled_where_another_stage_compiles_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: set[str] = set()
    monkeypatch.setattr(deepspeed_ops, "built", there.__contains__)
    stage, builds = Stage("wide", tmp_path), Stage("builds", tmp_path)
    with pytest.raises(SystemExit) as ended:  # it has found out nothing yet: this one goes on at the next start
        built.missing(stage)
    assert ended.value.code == os.EX_TEMPFAIL
    builds.report("ragged_ops", Outcome.refused, "no nvcc")
    assert built.missing(stage) == "stage builds: ragged_ops: no nvcc"
    there |= set(deepspeed_ops.RAGGED)
    assert built.missing(stage) is None
