"""Changes the record of a run: facts that become known while it runs, and what is found once it is closed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.basics.files import json_bytes, replace, yaml_bytes
from harness.config.identity import config_hash
from harness.results import segments
from harness.results.columns import COLUMNS, columns_from_config
from harness.results.table import put_row


def settled(record: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Returns what a record says of its config once all of it is known, the split of the ranks included.

    Args:
        record: its current segment, if the run was resumed, gets the settings that are not those of the segment before.
        config: the resolved config as plain data.
    """
    if (segment := record.get("segment")) is not None:
        segment["changed"] = segments.changed(record["segments"][-1].get("config", {}), config)
    split = {name: value for name, value in columns_from_config(config).items() if name in ("tp", "dp")}
    return {**split, "config": config, "config_hash": config_hash(config)}


def write_record(directory: Path, record: dict[str, Any]) -> None:
    """Puts ``record`` in place of a run's ``record.json``; raises UserError."""
    replace(directory / "record.json", json_bytes(record, indent=2))


def write_config(directory: Path, config: dict[str, Any]) -> None:
    """Puts a resolved config in place of a run's ``config.yaml``; raises UserError."""
    replace(directory / "config.yaml", yaml_bytes(config))


def write_row(results_dir: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Puts what a closed run's record says into its row and its ``record.json``; returns the row.

    In this order a failure in between leaves the run open to ``close_unfinished`` and to a resume, which put their row
    in the place of this one.

    Raises:
        UserError: a file cannot be written.
    """
    row = {name: record[name] for name in COLUMNS}
    put_row(results_dir, row)
    write_record(results_dir / record["run_id"], record)
    return row
