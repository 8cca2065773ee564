"""The engines a run can choose from, by the name in ``conf/engine``."""

from __future__ import annotations

from harness.engines.base import Engine, EngineSettings


def create(settings: EngineSettings) -> Engine:
    """Returns the engine that ``settings.engine.name`` names, nothing loaded yet."""
    # Imported here: an engine brings torch and its own library with it.
    if settings.engine.name == "baseline":
        from harness.engines.baseline import BaselineEngine

        return BaselineEngine(settings)
    if settings.engine.name == "fastgen":
        from harness.engines.fastgen.engine import FastGenEngine

        return FastGenEngine(settings)
    if settings.engine.name == "ds_inference":
        from harness.engines.ds_inference import DsInferenceEngine

        return DsInferenceEngine(settings)
    if settings.engine.name == "mii":
        from harness.engines.mii import MiiEngine

        return MiiEngine(settings)
    raise ValueError(f"no engine named {settings.engine.name!r}")  # config.check() lets none through
