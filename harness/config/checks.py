"""What cannot work, refused before anything heavy is imported: the checks that span fields."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from harness.basics.errors import UserError, quoted
from harness.config.schema import Config, HardwareConfig, SweepConfig

MAX_SEED = 2**63 - 1
MAX_REPEAT = 10_000
# What devices multiply matrices in; those that no run computes in are for plans.
PEAK_DTYPES = ("float32", "bfloat16", "float16", "float8", "int8", "float4", "int4")
TIMEOUTS_S = (1e-3, 1e9)  # what the system's timers take: below a microsecond they mean none
BYTE_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(setting: float | int | str) -> float:
    """Returns a number, or a text such as ``2GiB``, as a number of bytes; raises ValueError."""
    if not isinstance(setting, str):
        return setting
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", setting)
    if match is None or match[2].upper() not in BYTE_UNITS:
        raise ValueError(f"{setting!r} is not a size")
    return float(match[1]) * BYTE_UNITS[match[2].upper()]


def check(config: Config) -> None:
    """Refuses what cannot work, whatever the engine.

    Raises:
        UserError: naming the field, its value and the way out.
    """
    _check_numbers(config)
    _check_architecture(config.model.architecture, "model.architecture")
    check_sweep(config.sweep)
    for name, text in (("model.name", config.model.name), ("hardware.name", config.hardware.name)):
        if not 0 < len(text.strip()) <= 200 or not text.isprintable():
            raise UserError(name, quoted(text), "give a name of 1 to 200 printable characters")
    if not config.results_dir.strip():
        raise UserError("results_dir", quoted(config.results_dir), "name a directory")


def check_sweep(sweep: SweepConfig) -> None:
    """Raises UserError for a search that could not end well."""
    if not 0 <= sweep.confirm <= 1000:
        raise UserError("sweep.confirm", str(sweep.confirm), "give a whole number from 0 to 1000")
    if sweep.confirm_samples is not None and sweep.confirm_samples < 1:
        raise UserError(
            "sweep.confirm_samples", str(sweep.confirm_samples), "give a whole number of at least 1, or null"
        )
    if sweep.save_as is not None and re.fullmatch(r"[A-Za-z0-9_-]{1,100}", sweep.save_as) is None:
        raise UserError("sweep.save_as", quoted(sweep.save_as), "give a name of letters, digits, _ and -")


def check_counts(found: Mapping[str, int | None]) -> None:
    """Raises UserError for what is no number of things, by key; None is not given."""
    for name, value in found.items():
        if value is not None and not 1 <= value <= 2**31:
            raise UserError(name, str(value), f"give a whole number from 1 to {2**31}")


def check_size(name: str, setting: float | int | str) -> None:
    """Raises UserError for what is neither a part of the memory nor a size."""
    try:
        memory = parse_bytes(setting)
    except ValueError:
        memory = math.nan
    if not 0 < memory < 2**60:
        raise UserError(
            name,
            quoted(setting),
            "give a fraction of the free memory up to 1, a number of bytes, or a size such as 2GiB",
        )


def _check_numbers(config: Config) -> None:
    check_counts(
        {
            "parallel.tp": config.parallel.tp,
            "parallel.dp": config.parallel.dp,
            "dataset.num_samples": config.dataset.num_samples,
            "dataset.input_len": config.dataset.input_len,
            "dataset.output_len": config.dataset.output_len,
            "generation.max_output_len": config.generation.max_output_len,
            "model.max_context": config.model.max_context,
            "repeat": config.repeat,
        }
    )
    if config.repeat > MAX_REPEAT:
        raise UserError("repeat", str(config.repeat), f"give a whole number from 1 to {MAX_REPEAT}")
    if not 0 <= config.verify <= 2**31:
        raise UserError("verify", str(config.verify), f"give a whole number from 0 to {2**31}")
    if not 0 <= config.dataset.seed <= MAX_SEED:  # the generator takes a negative one for its positive
        raise UserError("dataset.seed", str(config.dataset.seed), f"give a whole number from 0 to {MAX_SEED}")
    check_hardware(config.hardware)
    if config.timeout_s is not None and not TIMEOUTS_S[0] <= config.timeout_s <= TIMEOUTS_S[1]:
        raise UserError("timeout_s", str(config.timeout_s), "give seconds from 0.001 to 1e9, or null for none")


def check_hardware(hardware: HardwareConfig) -> None:
    """Raises UserError for a type that no device computes in, and for what is no figure of a device."""
    for dtype in sorted(hardware.peak_flops.keys() - set(PEAK_DTYPES)):
        raise UserError(f"hardware.peak_flops.{dtype}", "no such type", f"choose one of {', '.join(PEAK_DTYPES)}")
    figures: dict[str, float | None] = {
        **{f"hardware.peak_flops.{dtype}": peak for dtype, peak in hardware.peak_flops.items()},
        "hardware.memory_bytes": hardware.memory_bytes,
        "hardware.memory_bandwidth": hardware.memory_bandwidth,
        "hardware.interconnect_bandwidth": hardware.interconnect_bandwidth,
        "hardware.node_bandwidth": hardware.node_bandwidth,
    }
    for name, figure in figures.items():
        if figure is not None and not 0 < figure < math.inf:
            raise UserError(name, str(figure), "give the data sheet's figure, or null where it is not known")
    check_counts({"hardware.devices_per_node": hardware.devices_per_node})


def _check_architecture(value: object, where: str) -> None:
    """Raises UserError for a NaN, which no comparison would notice, however deep."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        _check_architecture(item, f"{where}.{key}")
    if isinstance(value, float) and math.isnan(value):
        raise UserError(where, "nan", "give a number, or null to leave it out")


def check_kv_heads(tp: int, kv_heads: object) -> None:
    """Raises UserError when tensor parallelism leaves a rank without a key/value head."""
    if isinstance(kv_heads, int) and tp > kv_heads:
        raise UserError(
            "parallel.tp",
            f"{tp} ranks share {kv_heads} key/value heads: some would have none",
            f"use parallel.tp of at most {kv_heads}",
        )
