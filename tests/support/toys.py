"""The toy engine as a package that is installed beside the harness."""

from __future__ import annotations

from pathlib import Path

TOY = Path(__file__).resolve().parent / "toy"
OPTIONS = f"hydra.searchpath=[file://{TOY / 'conf'}]"


def installed(site: Path) -> dict[str, str]:
    """Returns the environment of a machine that has it, with its entry point in the directory ``site``."""
    found = site / "toy_engine-1.0.dist-info"
    found.mkdir(parents=True)
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-engine\nVersion: 1.0\n")
    (found / "entry_points.txt").write_text("[harness.engines]\ntoy = toy_engine.room:ROOM\n")
    return {"PYTHONPATH": f"{site}:{TOY}"}
