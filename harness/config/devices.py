"""Which option of ``conf/hardware`` describes a device, by what its driver calls it."""

from __future__ import annotations

from omegaconf import OmegaConf

from harness.config.compose import ROOT
from harness.config.schema import HardwareConfig


def option_of(device_name: str) -> HardwareConfig | None:
    """Returns the option whose ``device_names`` has exactly this name; None where none has.

    Part of a name says too little: other cards of the same chip have other figures, and so has a part of a card.
    """
    schema = OmegaConf.structured(HardwareConfig)
    for path in sorted((ROOT / "conf" / "hardware").glob("*.yaml")):
        if path.stem == "local":  # a fit, of whatever it was made on
            continue
        found = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.load(path)))
        assert isinstance(found, HardwareConfig)
        if device_name and device_name in found.device_names:
            return found
    return None
