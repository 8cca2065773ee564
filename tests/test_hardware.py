"""Figures of devices: those of data sheets in conf/hardware, and those that a run on a CPU measures by itself."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from support.documents import tables
from support.runs import RANDOM, TINY, Run, variables

from harness.basics.errors import UserError
from harness.config.checks import PEAK_DTYPES, check_hardware
from harness.config.devices import option_of
from harness.config.schema import HardwareConfig
from harness.costs.hardware import complete
from harness.machine import device, probe
from harness.ranks.rank import Rank
from harness.running import setup

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = ROOT / "conf" / "hardware"
GPUS = sorted(path.stem for path in OPTIONS.glob("*.yaml") if path.stem != "cpu" and "fit:" not in path.read_text())

# Dense TFLOP/s in float32, bfloat16 and float8, memory in GB, its bandwidth and that between devices in GB/s.
SHEETS = {
    "a100_40g": (19.5, 312, None, 40, 1555, 300),
    "a100_80g": (19.5, 312, None, 80, 2039, 300),
    "h100_80g": (67, 989, 1979, 80, 3350, 450),
    "h200_141g": (67, 989, 1979, 141, 4800, 450),
    "h20_96g": (44, 148, 296, 96, 4000, 450),
    "l40s_48g": (91.6, 362.05, 733, 48, 864, 32),
    "rtx_pro_6000_96g": (120, 480, 960, 96, 1597, 64),
    "b200_180g": (75, 2250, 4500, 180, 7700, 900),
    "mi300x_192g": (163.4, 1307.4, 2614.9, 192, 5300, 448),
}


def read(name: str) -> tuple[dict[str, Any], HardwareConfig]:
    """Returns an option as any YAML reader has it, and as the schema has it."""
    text = (OPTIONS / f"{name}.yaml").read_text(encoding="utf-8")
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(HardwareConfig), OmegaConf.create(text)))
    assert isinstance(config, HardwareConfig)
    return yaml.safe_load(text), config


# --- data sheets ---


@pytest.mark.parametrize("name", ["cpu", *GPUS])
def test_an_option_fits_the_schema(name: str) -> None:
    plain, config = read(name)
    check_hardware(config)
    assert config.name == name
    assert {"float32", "bfloat16", "float16"} <= set(config.peak_flops) <= set(PEAK_DTYPES)
    figures = [*config.peak_flops.values(), config.memory_bandwidth, config.interconnect_bandwidth]
    # Any YAML reader must see numbers: a float without a dot is text to YAML 1.1.
    assert [*plain["peak_flops"].values(), plain["memory_bandwidth"], plain["interconnect_bandwidth"]] == figures
    if name == "cpu":
        assert [*figures, config.memory_bytes, config.devices_per_node, config.node_bandwidth] == [None] * 8
    else:
        assert config.accelerator.value == "cuda" and config.devices_per_node == 8
        assert all(isinstance(figure, float) and figure > 1e10 for figure in [*figures, config.node_bandwidth])


def test_figures_are_those_of_the_data_sheets() -> None:
    assert set(GPUS) == set(SHEETS)
    for name, (float32, bfloat16, float8, memory, bandwidth, between) in SHEETS.items():
        _, config = read(name)
        peaks = config.peak_flops
        found = [None if peaks.get(key) is None else peaks[key] / 1e12 for key in ("float32", "bfloat16", "float8")]
        assert found == pytest.approx([float32, bfloat16, float8]), name
        assert peaks["float16"] == peaks["bfloat16"]
        assert config.memory_bytes == memory * 10**9
        bandwidths = [config.memory_bandwidth, config.interconnect_bandwidth]
        assert bandwidths == pytest.approx([bandwidth * 1e9, between * 1e9]), name
        # Each halving of the width doubles the rate of matrix products, or there is no such rate.
        assert peaks.get("int8") == pytest.approx(2 * peaks["bfloat16"], rel=0.02)
        for key in ("float4", "int4"):
            assert peaks.get(key) in (None, pytest.approx(4 * peaks["bfloat16"]))


def test_the_table_of_options_is_that_of_the_files() -> None:
    everything = tables(ROOT / "conf" / "README.md")
    (rows,) = [rows for heading, rows in everything if (heading, rows[0][0]) == ("hardware", "option")]
    assert [row[0].strip("`") for row in rows[1:]] == list(SHEETS)
    for option, *cells in rows[1:]:
        _, config = read(option.strip("`"))
        float32, half, float8, int8, float4, memory, bandwidth, between = (
            float(found[0].replace(",", "")) if (found := re.findall(r"\d[\d,.]*", cell)) else None for cell in cells
        )
        peaks = config.peak_flops
        assert [float32, half] == pytest.approx([peaks["float32"] / 1e12, peaks["bfloat16"] / 1e12])
        for key, shown in (("float8", float8), ("int8", int8), ("float4", float4)):
            assert shown == (pytest.approx(peaks[key] / 1e12) if key in peaks else None), key
        figures = [config.memory_bytes / 1e9, config.memory_bandwidth / 1e12, config.interconnect_bandwidth / 1e9]
        assert [memory, bandwidth, between] == pytest.approx(figures)


def test_no_two_options_claim_the_same_device() -> None:
    names = [name for option in GPUS for name in read(option)[1].device_names]
    assert len(names) == len(set(names)) > 7


@pytest.mark.parametrize(
    ("device_name", "option"),
    [
        ("NVIDIA H100 80GB HBM3", "h100_80g"),
        ("NVIDIA A100-SXM4-40GB", "a100_40g"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx_pro_6000_96g"),
        ("NVIDIA H100 PCIe", None),  # another card of the same chip
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),  # a part of one
        ("", None),
    ],
)
def test_a_device_is_known_by_its_whole_name(device_name: str, option: str | None) -> None:
    found = option_of(device_name)
    assert (found and found.name) == option


# --- a CPU ---


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns where figures are kept in this test: nothing is known yet."""
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path / "hardware"


@pytest.mark.usefixtures("one_thread")
def test_a_cpu_is_measured_once_and_read_without_torch(cache: Path) -> None:
    told: list[str] = []
    assert probe.measured("float32") is None
    found = probe.figures("float32", say=told.append)
    assert 1e8 < found.peak_flops < 1e15 and 1e8 < found.memory_bandwidth < 1e13
    assert found.machine["threads"] == 1 and found.machine["cores"] == device.cores()
    assert probe.figures("float32", say=told.append) == found
    how = f"cores: {device.cores()}, threads: 1; once, about a second"
    assert told == [f"measuring float32 products and memory ({how})"]
    script = "import sys; from harness.machine import probe; print(probe.measured('float32').peak_flops)"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}; assert not {{'torch', 'numpy'}} & sys.modules.keys()"],
        env=variables(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) == found.peak_flops
    assert probe.measured("bfloat16") is None


@pytest.mark.parametrize("kernels", [True, False])
def test_bfloat16_without_kernels_of_its_own_is_measured_in_float32(
    kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the limit of a run would be a tenth of what it reaches."""
    import torch

    if kernels and not device.has_bfloat16_kernels():
        pytest.skip("oneDNN has no bfloat16 kernels here")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: kernels)
    rows = torch.ones(4, 16, dtype=torch.bfloat16)
    kinds = [way.args[0].dtype for way in probe._ways(rows, torch.ones(32, 16, dtype=torch.bfloat16))]
    assert kinds == ([torch.bfloat16] * 2 if kernels else [torch.float32])


def known(cache: Path, **changes: Any) -> probe.Figures:
    """Keeps figures as if this machine had been measured, and returns them."""
    machine = probe._machine(device.cores(), 1)
    found = probe.Figures("float32", 5e10, 8e9, "2026-01-01T00:00:00Z", 0.0, machine)
    found = dataclasses.replace(found, **changes)
    cache.mkdir(exist_ok=True)
    probe._path("float32", machine).write_text(json.dumps(dataclasses.asdict(found)))
    return found


@pytest.mark.usefixtures("one_thread")
def test_figures_of_a_busy_machine_are_taken_anew_when_it_is_idle(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = known(cache, load=3.0, peak_flops=1.0, memory_bandwidth=1e15)
    monkeypatch.setattr(probe, "_load", lambda: 3.0)
    assert probe.figures("float32") == busy
    monkeypatch.setattr(probe, "_load", lambda: 0.1)
    found = probe.figures("float32")
    assert found.peak_flops > 1e8 and found.memory_bandwidth == 1e15  # the better of both
    assert probe.figures("float32") == found == probe.measured("float32")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"dtype": "float32", "speed": 1}', "\xff"])
def test_a_damaged_file_of_figures_is_none(cache: Path, content: str) -> None:
    found = known(cache)
    assert probe.measured("float32") == found
    (file,) = cache.iterdir()
    file.write_text(content, encoding="latin-1")
    assert probe.measured("float32") is None


def test_figures_of_other_cores_or_threads_are_not_taken(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = known(cache, peak_flops=7e10)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert probe.measured("float32") is None
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(device, "cores", lambda: found.machine["cores"] * 4)
    assert probe.measured("float32") is None
    assert probe.measured("float32", ranks=4) == found


def test_a_plan_has_the_figures_that_were_measured(cache: Path) -> None:
    _, cpu = read("cpu")
    with pytest.raises(UserError) as refused:
        complete(cpu, "float32")
    assert str(refused.value) == (
        "hardware.peak_flops.float32: not known for hardware=cpu; give it, or have it measured with as many cores and "
        "OMP_NUM_THREADS as a rank has: python launch/matrix_rate.py float32"
    )
    known(cache)
    found = complete(cpu, "float32")
    assert (found.peak_flops["float32"], found.memory_bandwidth) == (5e10, 8e9)
    assert cpu.memory_bandwidth is None
    given = dataclasses.replace(cpu, peak_flops={"float32": 9e11})
    assert complete(given, "float32").peak_flops["float32"] == 9e11  # what is given wins
    assert complete(given, "float32").memory_bandwidth == 8e9
    _, card = read("h100_80g")
    assert complete(card, "float8") == card
    with pytest.raises(UserError, match=r"^hardware.peak_flops.float4: not known for hardware=h100_80g; give it, or"):
        complete(card, "float4")


def test_ranks_with_several_cores_each_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    cores, before = set(range(8)), torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, chosen: (cores.clear(), cores.update(chosen)))
    job: Any = SimpleNamespace(accelerator="cpu")
    try:
        assert not setup.use_cores(job, Rank(rank=1, world=4, local_rank=1, local_world=4))[0]
        assert (cores, torch.get_num_threads()) == ({2, 3}, 2)
        assert setup.use_cores(job, Rank(rank=1, world=4, local_rank=1, local_world=4))[0]  # two cores, four ranks
        assert (cores, torch.get_num_threads()) == ({2, 3}, 1)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_a_run_measures_its_processor_the_first_time(harness: Callable[..., Run], tmp_path: Path) -> None:
    words = [*TINY, *RANDOM, "dataset.num_samples=2", "dataset.input_len=8", "dataset.output_len=2"]
    first = harness(*words, results=tmp_path / "first", HARNESS_CACHE=str(tmp_path))
    second = harness(*words, results=tmp_path / "second", HARNESS_CACHE=str(tmp_path))
    assert first.status == second.status == 0, first.stderr + second.stderr
    assert first.stdout.count("measuring float32 products") == 1 and "measuring" not in second.stdout
    assert "measuring float32 products" in (first.directory / "run.log").read_text()
    one, two = (run.record["hardware_measured"] for run in (first, second))
    assert not one.pop("earlier") and two.pop("earlier")
    assert one == two and one["dtype"] == "float32" and one["how"]
    (kept,) = (tmp_path / "hardware").iterdir()
    assert json.loads(kept.read_text())["peak_flops"] == one["peak_flops"]
    used = second.record["model_flops"] / (float(second.row["elapsed_s"]) * two["peak_flops"])
    assert float(second.row["model_flops_utilisation"]) == pytest.approx(used, rel=1e-4)
    assert first.record["config"] == second.record["config"] | {"results_dir": str(tmp_path / "first")}


def test_a_type_that_is_none_is_one_line() -> None:
    command = [sys.executable, "launch/matrix_rate.py", "int3"]
    done = subprocess.run(command, cwd=ROOT, env=variables(), capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: DTYPE: 'int3'; give one of float32, bfloat16, float16\n"
