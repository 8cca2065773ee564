"""What cannot work, refused before anything heavy is imported: the checks that span fields."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from harness.basics.errors import UserError, quoted
from harness.config.schema import Config, GenerationConfig, HardwareConfig, Stop, SweepConfig

AUTO = "auto"  # a size of which harness.running.sizes makes a number, before a rank is started
MAX_SEED = 2**63 - 1
MAX_REPEAT = 10_000
MAX_STOPS = 64  # stop strings, or stop ids
MAX_STOP_STRING = 256  # characters
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


def parse_share(setting: str) -> float:
    """Returns a text such as ``2%`` or ``0.02`` as a number; raises ValueError."""
    text = setting.strip()
    return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)


def repeat_until(setting: object) -> float | None:
    """Returns how wide the interval of a median may be, as a part of it; None where nothing is said.

    Raises:
        UserError: it is no share.
    """
    if setting is None:
        return None
    try:
        share = parse_share(str(setting))
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise UserError("repeat_until", quoted(setting), "give a share such as 2% or 0.02, or null")
    return share


def check(config: Config) -> None:
    """Refuses what cannot work, whatever the engine.

    Raises:
        UserError: naming the field, its value and the way out.
    """
    _check_numbers(config)
    check_generation(config.generation)
    _check_architecture(config.model.architecture, "model.architecture")
    check_sweep(config.sweep)
    for name, text in (("model.name", config.model.name), ("hardware.name", config.hardware.name)):
        if not 0 < len(text.strip()) <= 200 or not text.isprintable():
            raise UserError(name, quoted(text), "give a name of 1 to 200 printable characters")
    if not config.results_dir.strip():
        raise UserError("results_dir", quoted(config.results_dir), "name a directory")


def check_generation(generation: GenerationConfig) -> None:
    """Raises UserError for what cannot end a request, and for what contradicts ``stop: length``."""
    strings, ids = generation.stop_strings, generation.stop_token_ids
    for key, found in (("generation.stop_strings", strings), ("generation.stop_token_ids", ids)):
        if found and generation.stop is Stop.length:
            remedy = "use generation.stop=eos, or leave them out"
            raise UserError(key, f"{quoted(found)} contradicts generation.stop=length", remedy)
        if len(found) > MAX_STOPS:
            raise UserError(key, f"{len(found)} of them", f"give at most {MAX_STOPS}")
    for string in strings:
        text = isinstance(string, str) and 0 < len(string) <= MAX_STOP_STRING
        if not text or any(0xD800 <= ord(sign) < 0xE000 for sign in string):
            remedy = f"give texts of 1 to {MAX_STOP_STRING} characters, without lone surrogates"
            raise UserError("generation.stop_strings", quoted(string), remedy)
    for token in ids:
        if not 0 <= token < 2**31:
            raise UserError("generation.stop_token_ids", str(token), "give ids of the model's tokens, from 0")


def check_sweep(sweep: SweepConfig) -> None:
    """Raises UserError for a search that could not end well."""
    if not 0 <= sweep.confirm <= 1000:
        raise UserError("sweep.confirm", str(sweep.confirm), "give a whole number from 0 to 1000")
    if sweep.confirm_samples is not None and sweep.confirm_samples < 1:
        raise UserError(
            "sweep.confirm_samples", str(sweep.confirm_samples), "give a whole number of at least 1, or null"
        )
    if not 1 <= sweep.confirm_rounds <= 1000:
        raise UserError("sweep.confirm_rounds", str(sweep.confirm_rounds), "give a whole number from 1 to 1000")
    if not 0 <= sweep.least_s <= TIMEOUTS_S[1]:
        raise UserError("sweep.least_s", str(sweep.least_s), "give seconds from 0 to 1e9")
    if sweep.save_as is not None and re.fullmatch(r"[A-Za-z0-9_-]{1,100}", sweep.save_as) is None:
        raise UserError("sweep.save_as", quoted(sweep.save_as), "give a name of letters, digits, _ and -")


def check_counts(found: Mapping[str, int | None]) -> None:
    """Raises UserError for what is no number of things, by key; None is not given."""
    for name, value in found.items():
        if value is not None and not 1 <= value <= 2**31:
            raise UserError(name, str(value), f"give a whole number from 1 to {2**31}")


def check_whole_or_auto(found: Mapping[str, object]) -> None:
    """Raises UserError for what is neither a whole number nor :data:`AUTO`, by key: Hydra cannot tell by the type."""
    for name, value in found.items():
        if value != AUTO and type(value) is not int:
            raise UserError(name, f"{quoted(value)} is no whole number", "give one, or auto")


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
            "generation.max_output_len": config.generation.max_output_len,
            "model.max_context": config.model.max_context,
            "repeat": config.repeat,
        }
    )
    if config.repeat > MAX_REPEAT:
        raise UserError("repeat", str(config.repeat), f"give a whole number from 1 to {MAX_REPEAT}")
    repeat_until(config.repeat_until)
    if not 0 <= config.verify <= 2**31:
        raise UserError("verify", str(config.verify), f"give a whole number from 0 to {2**31}")
    if not 0 <= config.dataset.seed <= MAX_SEED:  # the generator takes a negative one for its positive
        raise UserError("dataset.seed", str(config.dataset.seed), f"give a whole number from 0 to {MAX_SEED}")
    check_hardware(config.hardware)
    if config.power_limit_w is not None and not 0 < config.power_limit_w < math.inf:
        raise UserError("power_limit_w", str(config.power_limit_w), "give watts, such as 3000, or null for no limit")
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
    price = hardware.price_per_hour
    if price is not None and not 0 < price < math.inf:
        raise UserError("hardware.price_per_hour", str(price), "give what a device costs an hour, or null for unknown")


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
