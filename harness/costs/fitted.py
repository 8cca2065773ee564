"""The section ``fit`` of a file in ``conf/hardware``: the factors that ``harness.plan --fit`` has found, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.basics.errors import UserError, quoted
from harness.config.schema import HardwareConfig
from harness.costs.roofline import NAMES, Factors, Host
from harness.costs.shape import ModelShape

SIZES = ("layers", "hidden", "heads", "kv_heads", "head_dim", "vocab", "inner")  # that the factors hold for
RANGES = ("token_budget", "max_sequences", "tokens", "sequences", "kv_read_tokens", "tp")
REMEDY = "write the file anew: python -m harness.plan --fit RUN"


@dataclass(frozen=True, slots=True)
class Fitted:
    """What was found, and of which runs.

    Attributes:
        model, dtype, kernels: of the runs.
        host: of a CPU, None for GPUs.
        sizes: of the model, by :data:`SIZES`.
        factors: by the number of ranks on a host.
        ranges: the smallest and the largest of what the runs had, by :data:`RANGES`.
        error: of the time of a run, relative: the largest that the fit found, of runs left out of it where there were
            several; None where the section says none.
        eos_hazard: (first position, chance that an output token there is an end-of-sequence token), ascending.
    """

    model: str
    dtype: str
    kernels: str
    host: Host | None
    sizes: dict[str, int]
    factors: dict[int, Factors]
    ranges: dict[str, tuple[float, float]]
    eos_hazard: tuple[tuple[int, float], ...]
    error: float | None = None

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> Fitted | None:
        """Returns the section of a hardware's config; None where it is empty.

        Raises:
            UserError: a key is missing, or its value cannot be.
        """
        if not section:
            return None
        sizes = _mapping(section, "sizes")
        ranges = _mapping(section, "range")
        found = section.get("factors")
        if not isinstance(found, list) or not found or not all(isinstance(entry, Mapping) for entry in found):
            raise _nonsense("factors", found)
        factors = {}
        for number, entry in enumerate(found):
            where = f"factors[{number}]"
            ranks = int(_number(entry, "ranks", where, least=1))
            values = {name: _number(entry, name, where, least=1 if name == "norm" else 0) for name in NAMES}
            factors[ranks] = Factors(**values)
        return cls(
            model=_text(section, "model"),
            dtype=_text(section, "dtype"),
            kernels=_text(section, "kernels"),
            host=_host(section.get("host")),
            sizes={name: int(_number(sizes, name, "sizes", least=1)) for name in SIZES},
            factors=factors,
            ranges={name: _pair(ranges, name) for name in RANGES},
            eos_hazard=_hazard(section.get("eos_hazard", [])),
            error=_error(section.get("errors", {})),
        )

    def is_of(self, shape: ModelShape) -> bool:
        """Returns whether a model has the sizes of the one that was fitted."""
        return all(getattr(shape, name) == self.sizes[name] for name in SIZES)

    def beyond(self, shape: ModelShape, dtype: str, ranks: int, **settings: float | None) -> list[str]:
        """Returns why a run lies outside of what the factors were found on; empty where it does not.

        Args:
            ranks: on a host.
            **settings: by :data:`RANGES`; None for what is not known.
        """
        found = []
        if not self.is_of(shape):
            found.append(f"the factors are those of {self.model}, a model of other sizes")
        if dtype != self.dtype:
            found.append(f"{dtype}, fitted on {self.dtype}")
        if ranks not in self.factors:
            found.append(f"{ranks} ranks on a host, fitted on {_listed(self.factors)}")
        for name, value in settings.items():
            low, high = self.ranges[name]
            if value is not None and not low <= value <= high:
                between = f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
                found.append(f"{name} {value:,.0f}, fitted on {between}")
        return found


def rank_peak(hardware: HardwareConfig, dtype: str, ranks: int) -> float | None:
    """Returns the peak (FLOP/s) of a rank with so many on its host; None where the config has none.

    A config's figures are those of a rank; where runs on a CPU were fitted, of one with as few beside it as they had.
    """
    peak, fitted = hardware.peak_flops.get(dtype), Fitted.of(hardware.fit)
    if peak is None or fitted is None or fitted.host is None:
        return peak
    return peak * fitted.host.busy(ranks) / fitted.host.busy(min(fitted.factors))


def _listed(numbers: Mapping[int, Any]) -> str:
    return " and ".join(str(number) for number in sorted(numbers))


def _nonsense(key: str, value: Any) -> UserError:
    return UserError(f"hardware.fit.{key}", f"{'missing' if value is None else quoted(value)}", REMEDY)


def _mapping(section: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = section.get(key)
    if not isinstance(value, Mapping):
        raise _nonsense(key, value)
    return value


def _text(section: Mapping[str, Any], key: str) -> str:
    value = section.get(key)
    if not isinstance(value, str) or not value:
        raise _nonsense(key, value)
    return value


def _is_number(value: Any, least: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= least


def _number(section: Mapping[str, Any], key: str, where: str, least: float) -> float:
    value = section.get(key)
    if not _is_number(value, least):
        raise _nonsense(f"{where}.{key}", value)
    return float(value)  # type: ignore[arg-type]


def _pair(section: Mapping[str, Any], key: str) -> tuple[float, float]:
    value = section.get(key)
    if not isinstance(value, list) or len(value) != 2 or not all(_is_number(end, 0) for end in value):
        raise _nonsense(f"range.{key}", value)
    if value[0] > value[1]:
        raise _nonsense(f"range.{key}", value)
    return float(value[0]), float(value[1])


def _error(section: Any) -> float | None:
    if not isinstance(section, Mapping):
        raise _nonsense("errors", section)
    found = section.get("left_out") or section.get("runs") or {}
    if not isinstance(found, Mapping) or not all(_is_number(error, -math.inf) for error in found.values()):
        raise _nonsense("errors", found)
    return max((abs(float(error)) for error in found.values()), default=None)


def _host(value: Any) -> Host | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise _nonsense("host", value)
    threads = None if value.get("threads") is None else int(_number(value, "threads", "host", least=1))
    return Host(int(_number(value, "cores", "host", least=1)), threads)


def _hazard(value: Any) -> tuple[tuple[int, float], ...]:
    whole = isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
    if not whole or not all(_is_number(n, 1) and _is_number(rate, 0) and rate <= 1 for n, rate in value):
        raise _nonsense("eos_hazard", value)
    positions = [int(pair[0]) for pair in value]
    if positions != sorted(set(positions)):
        raise _nonsense("eos_hazard", value)
    return tuple((int(first), float(rate)) for first, rate in value)
