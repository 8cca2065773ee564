"""The options of ``conf/hardware``, and which of them describes a device, by what its driver calls it."""

from __future__ import annotations

from collections.abc import Iterator

from omegaconf import OmegaConf

from harness.basics.places import CONF
from harness.config.schema import HardwareConfig


def options() -> Iterator[HardwareConfig]:
    """Yields the options that describe a device, by name."""
    schema = OmegaConf.structured(HardwareConfig)
    for path in sorted((CONF / "hardware").glob("*.yaml")):
        if path.stem == "local":  # a fit, of whatever it was made on
            continue
        found = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.load(path)))
        assert isinstance(found, HardwareConfig)
        yield found


def option_of(device_name: str) -> HardwareConfig | None:
    """Returns the option whose ``device_names`` has exactly this name; None where none has.

    Part of a name says too little: other cards of the same chip have other figures, and so has a part of a card.
    """
    return next((found for found in options() if device_name and device_name in found.device_names), None)
