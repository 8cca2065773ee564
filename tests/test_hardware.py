"""Figures of devices: those of data sheets in conf/hardware, and those that a run on a CPU measures by itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from support.documents import tables

from harness.config.checks import PEAK_DTYPES, check_hardware
from harness.config.schema import HardwareConfig

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
