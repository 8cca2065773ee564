"""costs.roofline, costs.fitted, costs.pass_time: what a pass takes, and which fits are none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.passes import KNOWN, MACHINE, SECTION, SMALL, fitted

from harness.basics.errors import UserError
from harness.config.schema import Accelerator, HardwareConfig
from harness.costs.fitted import rank_peak
from harness.costs.pass_time import PassTime
from harness.costs.roofline import CPU, GPU, Host, Roofline, on_other_ranks
from harness.costs.work import PassWork

A100 = HardwareConfig(
    name="a100",
    accelerator=Accelerator.cuda,
    peak_flops={"float16": 312e12},
    memory_bandwidth=2.039e12,
    interconnect_bandwidth=3e11,
    devices_per_node=8,
    node_bandwidth=2.5e10,
)
PREFILL = PassWork(512, 512, 0, 2, 1, 600, 140_000)
DECODE = PassWork(40, 0, 40, 40, 40, 20_000, 20_000)


@pytest.mark.parametrize(("hardware", "dtype", "tp"), [(MACHINE, "float32", 1), (A100, "float16", 3)])
@pytest.mark.parametrize("work", [PREFILL, DECODE, PassWork(64, 64, 0, 1, 0, 64, 2080)])
def test_a_pass_is_the_sum_of_its_parts(hardware: HardwareConfig, dtype: str, tp: int, work: PassWork) -> None:
    times = PassTime(SMALL, hardware, dtype, tp, tp)
    parts = times.parts(work)
    assert times.seconds(work) == pytest.approx(sum(parts.values()), rel=1e-12)
    assert all(seconds >= 0 for seconds in parts.values())
    assert (parts["all_reduce"] > 0) == (tp > 1)
    assert (parts["head"] > 0) == (work.logit_rows > 0)


def test_the_roofline_is_flops_over_the_peak_and_bytes_over_the_bandwidth() -> None:
    roofline = Roofline.of(SMALL, MACHINE, "float32", 1)
    assert roofline.matrix == pytest.approx(2 * 106_168_320 / 1e11)
    assert roofline.weights == pytest.approx(4 * 106_168_320 / 2e10)
    assert roofline.key == pytest.approx(2 * 30 * 3 * 64 * 4 / 2e10)
    assert roofline.pair == pytest.approx(4 * 30 * 9 * 64 / 1e11)
    ideal = replace(CPU, matrices=1, weights=1, norm=1)
    assert roofline.parts(ideal, PREFILL)["weights"] == pytest.approx(roofline.weights)
    # With a large norm the shorter of the two is hidden.
    hidden = replace(ideal, norm=50.0)
    assert roofline.parts(hidden, PREFILL)["weights"] < 1e-6 * roofline.weights


def test_a_rank_of_several_has_its_share_and_an_exchange() -> None:
    one, eight = Roofline.of(SMALL, A100, "float16", 1), Roofline.of(SMALL, A100, "float16", 8)
    assert eight.matrix == pytest.approx(one.matrix / 8)
    assert eight.key == pytest.approx(one.key / 3)  # of three key/value heads a rank has at least one whole
    assert eight.exchange == pytest.approx(2 * 30 * 576 * 4 * 2 * 7 / 8 / 3e11)
    across = Roofline.of(SMALL, replace(A100, devices_per_node=4), "float16", 8)
    assert across.exchange == pytest.approx(eight.exchange * 3e11 / 2.5e10)


@pytest.mark.parametrize(
    ("host", "seen", "ranks", "scale"),
    [(Host(2), 1, 2, 2), (Host(8), 4, 1, 1 / 4), (Host(2, 1), 1, 2, 1), (Host(2), 2, 4, 2), (None, 1, 8, 1)],
)
def test_ranks_of_a_cpu_share_its_cores(host: Host | None, seen: int, ranks: int, scale: float) -> None:
    there = on_other_ranks(KNOWN, seen, ranks, host)
    assert (there.matrices, there.kv) == (pytest.approx(KNOWN.matrices * scale), pytest.approx(KNOWN.kv * scale))
    assert there.host_pass_s == KNOWN.host_pass_s


def test_figures_that_are_not_known_are_named() -> None:
    with pytest.raises(UserError, match=r"hardware\.peak_flops\.float32: not known of bench"):
        PassTime(SMALL, replace(MACHINE, peak_flops={}), "float32", 1, 1)
    with pytest.raises(UserError, match=r"hardware\.memory_bandwidth"):
        PassTime(SMALL, replace(MACHINE, memory_bandwidth=None), "float32", 1, 1)
    with pytest.raises(UserError, match=r"hardware\.interconnect_bandwidth"):
        PassTime(SMALL, replace(A100, interconnect_bandwidth=None), "float16", 2, 2)
    assert PassTime(SMALL, A100, "float16", 1, 1).factors == GPU


def test_a_fit_is_used_and_says_where_it_ends() -> None:
    inside = PassTime(SMALL, fitted(), "float32", 1, 1, token_budget=256, max_sequences=64)
    assert (inside.factors, inside.outside) == (KNOWN, [])
    assert inside.host_seconds(DECODE, 2, 0) == pytest.approx(2e-3 + 40 * 20e-6 + 2 * 5e-3)
    outside = PassTime(replace(SMALL, layers=31), fitted(), "float32", 3, 6, 1024, 16).outside
    assert outside == [
        "the factors are those of small, a model of other sizes",
        "6 ranks on a host, fitted on 1",
        "tp 3, fitted on 1",
        "token_budget 1,024, fitted on 128 to 512",
        "max_sequences 16, fitted on 64",
    ]
    slower = inside.with_factors(kv=2 * KNOWN.kv)
    assert slower.parts(DECODE)["kv"] == pytest.approx(2 * inside.parts(DECODE)["kv"])
    assert slower.seconds(DECODE) > inside.seconds(DECODE)


def test_a_fitted_peak_is_a_rank_s_share_of_the_cores() -> None:
    assert rank_peak(MACHINE, "float32", 2) == 1e11  # as the config has it
    assert [rank_peak(fitted(), "float32", ranks) for ranks in (1, 2, 4)] == [1e11, 5e10, 2.5e10]
    assert rank_peak(fitted(host={"cores": 2, "threads": 1}), "float32", 2) == 1e11
    assert rank_peak(fitted(), "bfloat16", 1) is None


def without(name: str) -> dict[str, Any]:
    (factors,) = SECTION["factors"]
    return {"factors": [{key: value for key, value in factors.items() if key != name}]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factors": []}, "hardware.fit.factors: []"),
        ({"factors": "fast"}, "hardware.fit.factors: 'fast'"),
        (without("kv"), "hardware.fit.factors[0].kv: missing"),
        ({"factors": [{**SECTION["factors"][0], "kv": -1}]}, "hardware.fit.factors[0].kv: -1"),
        ({"factors": [{**SECTION["factors"][0], "kv": float("nan")}]}, "hardware.fit.factors[0].kv: nan"),
        ({"factors": [{**SECTION["factors"][0], "norm": 0.5}]}, "hardware.fit.factors[0].norm: 0.5"),
        ({"factors": [{**SECTION["factors"][0], "ranks": 0}]}, "hardware.fit.factors[0].ranks: 0"),
        ({"model": None}, "hardware.fit.model: missing"),
        ({"sizes": 3}, "hardware.fit.sizes: 3"),
        ({"range": {}}, "hardware.fit.range.token_budget: missing"),
        ({"range": {**SECTION["range"], "tokens": [9, 1]}}, "hardware.fit.range.tokens: "),
        ({"host": {"cores": 0}}, "hardware.fit.host.cores: 0"),
        ({"eos_hazard": [[2, 0.1], [1, 0.1]]}, "hardware.fit.eos_hazard: "),
        ({"eos_hazard": [[1, 1.5]]}, "hardware.fit.eos_hazard: "),
    ],
)
def test_nonsense_in_a_fit_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        PassTime(SMALL, fitted(**changes), "float32", 1, 1)
    assert str(refused.value).startswith(message)
    assert "harness.plan --fit" in str(refused.value)
