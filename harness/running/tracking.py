"""``tracking=mlflow``: a run's config, figures and record to MLflow, once its clock has stopped and its row is written.

Whatever becomes of it there, the run's status stays what it was; a note says what could not be sent. Rank 0 sends a run
that it has closed itself, failed ones included; one that is resumed stays one run in MLflow.
"""

from __future__ import annotations

import datetime
import importlib.util
import logging
import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from harness.basics.errors import UserError, one_line, quoted
from harness.basics.files import can_write
from harness.basics.places import PROGRAM
from harness.config.identity import flat
from harness.config.schema import TrackingConfig
from harness.ranks import signals
from harness.results.columns import TABLE
from harness.results.recorder import RunRecorder

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

NONE, MLFLOW = "none", "mlflow"
LIMIT_S = 30.0  # for all that a server or a disk is asked; a user waits for the end of the process
IMPORT_S = 120.0  # for the package itself, which takes seconds, on a busy machine half a minute
# What MLflow reads from the environment, set where it is not: its own patience is many minutes, a directory in place
# of a database needs a word, and it would report its use over the network and print addresses.
VARIABLES = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
MOST_PARAMS, LONGEST_PARAM, LONGEST_TAG = 100, 6000, 5000  # that MLflow takes at once, and characters
ARTIFACTS = ("record.json", "config.yaml")
TAGS = ("job_hash",)  # of the record, beside the columns that are text
ENDS = {"ok": "FINISHED", "interrupted": "KILLED"}  # MLflow's word for the others is FAILED


def check(tracking: TrackingConfig, results_dir: str) -> None:
    """Raises UserError for what could not be tracked whatever the run does; imports nothing of MLflow."""
    if tracking.name == NONE:
        for key in ("uri", "experiment"):
            if (given := getattr(tracking, key)) != getattr(TrackingConfig(), key):
                found = f"{quoted(given)} means nothing with tracking=none"
                raise UserError(f"tracking.{key}", found, "add tracking=mlflow")
        return
    if tracking.name != MLFLOW:
        raise UserError("tracking.name", quoted(tracking.name), "choose tracking=none or tracking=mlflow")
    if importlib.util.find_spec("mlflow") is None:
        raise UserError("tracking", "mlflow is not installed", "pip install mlflow-skinny, or tracking=none")
    if not 0 < len(tracking.experiment.strip()) <= 200 or not tracking.experiment.isprintable():
        found = quoted(tracking.experiment)
        raise UserError("tracking.experiment", found, "give a name of 1 to 200 printable characters")
    uri = place(tracking, results_dir)
    parts = _split(uri)
    if parts is None or (parts.scheme in ("http", "https") and not parts.hostname):
        raise UserError("tracking.uri", quoted(uri), "give a directory, or a server's http://HOST:PORT")
    if parts.username or parts.password:
        remedy = "give them in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD: a record has its whole config"
        raise UserError("tracking.uri", "has a user's name or password in it", remedy)
    if not parts.scheme:
        try:
            can_write(Path(uri))
        except OSError as error:
            found = f"{quoted(uri, 300)} cannot be written: {error.strerror}"
            raise UserError("tracking.uri", found, "give another directory, or a server") from error


def _split(uri: str) -> Any:
    try:
        found = urlsplit(uri)
        _ = found.port  # raises too
    except ValueError:
        return None
    return found


def place(tracking: TrackingConfig, results_dir: str) -> str:
    """Returns where runs are sent: a URI, or a directory's absolute path."""
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{results_dir}/mlflow"
    return uri if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", uri) else str(Path(uri).expanduser().absolute())


def send(tracking: TrackingConfig, recorder: RunRecorder) -> str | None:
    """Sends a closed run, and notes in its record where it is, or why not; returns that as a line for the user.

    None where runs are not tracked.
    """
    if tracking.name == NONE:
        return None
    uri = place(tracking, str(recorder.results_dir))
    done = _Sending(recorder, uri, tracking.experiment)
    done.start()
    try:
        done.imported.wait(IMPORT_S)
        done.join(LIMIT_S)
    except signals.Ended:
        done.error = done.error or "interrupted"
    record, said = recorder.record, dict[str, Any]()
    if done.run_id is not None:
        said = {"tracking": {"uri": uri, "experiment": tracking.experiment, "run_id": done.run_id}}
        line = f"tracked in MLflow: experiment {tracking.experiment} of {uri}, run {done.run_id}"
    else:
        why = done.error or f"no answer within {LIMIT_S:.0f} s"
        line = f"not tracked: {quoted(uri, 200)}: {why}; the run is as it is"
        said = {"notes": [*(record.get("notes") or []), line]}
    try:
        recorder.amend(record["status"], record["error"], **said)
    except UserError as error:
        return f"{line}; nor can the record say so: {error}"
    return line


class _Sending(threading.Thread):
    """Sends a run in a thread of its own, so that nobody waits longer for a server than is worth it."""

    def __init__(self, recorder: RunRecorder, uri: str, experiment: str) -> None:
        super().__init__(name="tracking", daemon=True)
        self.record, self.directory = dict(recorder.record), recorder.directory
        self.uri, self.experiment = uri, experiment
        self.imported = threading.Event()
        self.run_id: str | None = None
        self.error: str | None = None

    def run(self) -> None:
        """Called by the thread."""
        for name, value in VARIABLES.items():
            os.environ.setdefault(name, value)
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        try:
            from mlflow.tracking import MlflowClient

            self.imported.set()
            client = MlflowClient(tracking_uri=self.uri)
            run_id = _run_of(client, self.experiment, self.record)
            _fill(client, run_id, self.record, self.directory)
            self.run_id = run_id
        except Exception as error:  # MLflow's, those of its servers and databases, a full disk
            self.error = one_line(str(error) or type(error).__name__, 200)
        finally:
            self.imported.set()


def _run_of(client: MlflowClient, name: str, record: dict[str, Any]) -> str:
    """Returns MLflow's id of the run: of a run that is resumed the one that it has already."""
    if (experiment := client.get_experiment_by_name(name)) is None:
        try:
            experiment_id = client.create_experiment(name)
        except Exception:  # another job of a sweep has just made it
            if (experiment := client.get_experiment_by_name(name)) is None:
                raise
            experiment_id = experiment.experiment_id
    else:
        experiment_id = experiment.experiment_id
    known = client.search_runs([experiment_id], f"tags.run_id = '{record['run_id']}'", max_results=1)
    if known:
        return str(known[0].info.run_id)
    tags = {"run_id": record["run_id"], "mlflow.source.name": PROGRAM}
    if record.get("git_commit"):
        tags["mlflow.source.git.commit"] = record["git_commit"]
    run = client.create_run(experiment_id, _milliseconds(record["started_at"]), tags, record["run_id"])
    return str(run.info.run_id)


def _fill(client: MlflowClient, run_id: str, record: dict[str, Any], directory: Path) -> None:
    from mlflow.entities import Metric, Param, RunTag

    at = _milliseconds(record["finished_at"])
    metrics = [Metric(name, float(value), at, 0) for name, value in figures(record).items()]
    tags = [RunTag(name, value) for name, value in texts(record).items()]
    known = client.get_run(run_id).data.params  # which MLflow would not have changed
    params = [Param(name, value) for name, value in parameters(record).items() if name not in known]
    client.log_batch(run_id, metrics=metrics, tags=tags)
    for first in range(0, len(params), MOST_PARAMS):
        client.log_batch(run_id, params=params[first : first + MOST_PARAMS])
    for name in ARTIFACTS:
        client.log_artifact(run_id, str(directory / name))
    client.set_terminated(run_id, ENDS.get(record["status"], "FAILED"), at)


def figures(record: dict[str, Any]) -> dict[str, float]:
    """Returns the columns that are numbers and known, and where the clock went, as MLflow's metrics."""
    found = {column.name: record.get(column.name) for column in TABLE if column.kind in (int, float)}
    found |= {f"time.{name}": value for name, value in (record.get("time") or {}).items()}
    return {name: value for name, value in found.items() if value is not None}


def texts(record: dict[str, Any]) -> dict[str, str]:
    """Returns the columns that are texts and known, as MLflow's tags."""
    names = [*(column.name for column in TABLE if column.kind is str), *TAGS]
    return {name: str(record[name])[:LONGEST_TAG] for name in names if record.get(name) is not None}


def parameters(record: dict[str, Any]) -> dict[str, str]:
    """Returns the config by its keys, as MLflow's parameters; what their names may not hold becomes ``_``."""
    config = flat(record["config"])
    return {re.sub(r"[^\w./: -]", "_", key)[:250]: str(value)[:LONGEST_PARAM] for key, value in config.items()}


def _milliseconds(moment: str) -> int:
    return int(datetime.datetime.fromisoformat(moment).timestamp() * 1000)
