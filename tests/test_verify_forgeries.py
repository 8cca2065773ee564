"""Finished runs with something forged in them, everything else made to fit: ``python -m harness.verify`` notices."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.forgeries import (
    FORGERIES,
    SLOWER,
    Forgery,
    Lines,
    Record,
    faster,
    feed,
    findings,
    forge,
    longer_prompts,
    lower_cap,
    table,
)
from support.models import save_small_demo
from support.runs import TINY, Run, ran

from harness.basics.files import yaml_bytes
from harness.config.identity import config_hash
from harness.models.loaded import NAMES, problems, unchecked
from harness.results import segments
from harness.results.table import read_rows
from harness.verify import __main__ as verify
from harness.verify import clock, limits, names, runs
from harness.verify.report import NOT_PROVEN
from harness.workload.records import Request

# The seventh prompt, of 930 tokens, is rejected rightly.
REQUESTS, REJECTED = 8, 6
WORK = ["model.dtype=float32", "model.max_context=512", "engine.kernels=torch", "generation.max_output_len=8"]
WORK.append(f"dataset.num_samples={REQUESTS}")
Verified = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Run:
    """Returns a run of a small model that has the demo model's tokenizer and name."""
    place = tmp_path_factory.mktemp("forgeries")
    run = ran(place / "results", *WORK, f"model.path={save_small_demo(place / 'smollm2_135m', demo_model)}")
    assert run.status == 0, run.stderr
    assert [line["finish_reason"] == "rejected" for _, line in sorted(run.completions.items())].index(True) == REJECTED
    return run


@pytest.fixture
def copy(honest: Run, tmp_path: Path) -> Path:
    """Returns a copy of the honest run's directory, in a results directory of its own."""
    shutil.copytree(honest.results, tmp_path / "results")
    return tmp_path / "results" / honest.directory.name


@pytest.fixture
def verified(capsys: pytest.CaptureFixture[str]) -> Verified:
    """Returns a function that runs the command here: exit status, what it printed as JSON, its error line."""

    def run(directory: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
        capsys.readouterr()  # what libraries have said while they were imported
        status = verify.main([str(directory), *arguments, "--json"])
        captured = capsys.readouterr()
        return status, json.loads(captured.out) if captured.out else {}, captured.err

    return run


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, indent=2))


def loaded_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "record.json").read_text())["loaded"]


def as_at_load(record: Record) -> None:
    """Has the section ``loaded`` say what the record says, and digests it as the harness does."""
    facts = {name: record[name] for name in NAMES}
    facts = {"checkpoint_sha256": record["loaded"]["checkpoint_sha256"], **facts}
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    record["loaded"] = facts | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def test_an_honest_run_is_right(honest: Run, copy: Path, verified: Verified) -> None:
    for arguments in ([], ["--model"]):
        status, found, err = verified(copy, *arguments)
        assert (status, findings(found), err.replace("7/7 requests judged\n", "")) == (0, [], "")
        assert found["notes"] == [NOT_PROVEN]
    loaded = loaded_of(copy)
    assert {name: loaded[name] for name in NAMES} == {name: honest.row[name] for name in NAMES}
    assert len(loaded["checkpoint_sha256"]) == len(loaded["sha256"]) == 64


def test_nothing_is_forged_where_nothing_is_changed(copy: Path, verified: Verified) -> None:
    forge(copy, lambda directory, record, lines: None)
    assert verified(copy)[0] == 0


@pytest.mark.parametrize("forgery", FORGERIES, ids=lambda forgery: forgery.name)
def test_a_forgery_is_noticed_without_a_model(copy: Path, verified: Verified, forgery: Forgery) -> None:
    forge(copy, forgery.change)
    status, found, err = verified(copy)
    assert (status, err, found["right"]) == (1, "", False)
    assert any(text.startswith(forgery.found) for text in findings(found)), findings(found)


def test_a_forged_rejection_is_noticed_with_the_model(copy: Path, verified: Verified) -> None:
    forge(copy, FORGERIES[0].change)
    status, found, _ = verified(copy, "--model", "--samples", "1")
    assert status == 1 and any(text.startswith(FORGERIES[0].found) for text in findings(found)), findings(found)


# --- rejections ---


def test_which_rejection_was_forged(copy: Path, verified: Verified) -> None:
    forge(copy, FORGERIES[0].change)
    rejected = [line["index"] for line in runs.load(copy).completions if line["finish_reason"] == "rejected"]
    (found,) = verified(copy)[1]["runs"]
    (one,) = found["findings"]
    assert one["index"] in rejected and one["index"] != REJECTED and len(rejected) == 2
    assert one["found"].endswith("tokens + output_len 8 is within all limits of the run")


@pytest.mark.slow
def test_rejections_of_a_cache_that_is_too_small(tmp_path: Path, verified: Verified) -> None:
    """Of dummy weights: prompts of 40 bytes and BOS need two blocks of 32 tokens, and the cache has but one."""
    job = [*TINY, "dataset=synthetic", "dataset.num_samples=2", "dataset.input_len=21", "dataset.output_len=4"]
    small = ran(tmp_path / "results", *job, "engine.kernels=torch", "engine.kv_block_size=32", "engine.kv_memory=32KiB")
    blocks = small.record["engine_statistics"]["kv_blocks"]
    assert (blocks, {line["finish_reason"] for line in small.completions.values()}) == (1, {"rejected"})
    status, found, _ = verified(small.directory)
    assert status == 1 and findings(found) == [], "an invalid run is not right, but nothing of it is forged"
    edit(small.directory / "record.json", lambda record: record["engine_statistics"].update(kv_blocks=2))
    assert len(findings(verified(small.directory)[1])) == 2


def part(name: str, statistics: dict[str, Any] | None = None, dp: int = 1, **engine: Any) -> dict[str, Any]:
    config = {"engine": {"name": name, **engine}, "model": {"max_context": None}, "parallel": {"tp": 1, "dp": dp}}
    return {"config": config, "engine_statistics": statistics}


BLOCKS = {"kv_blocks": 10}
WIDE = {"kernel_inject": True, "batch_tokens": 400, "batch_size": 4}


@pytest.mark.parametrize(
    ("record", "prompt_tokens", "verdict"),
    [
        (part("baseline"), 0, "right"),
        (part("baseline"), 991, "right"),  # 1001 of 1000
        (part("baseline"), 990, "wrong"),
        (part("fastgen", BLOCKS, kv_block_size=16), 152, "right"),  # its 161 stored tokens need 11 blocks
        (part("fastgen", BLOCKS, kv_block_size=16), 151, "wrong"),
        (part("fastgen", BLOCKS, dp=2, kv_block_size=16), 72, "right"),
        (part("fastgen", BLOCKS, dp=2, kv_block_size=16), 20, "wrong"),
        (part("fastgen", None, kv_block_size=16), 151, "unknown"),
        (part("fastgen", None, kv_block_size=16), 991, "right"),
        (part("fastgen", BLOCKS, kv_block_size="16"), 151, "unknown"),
        (part("mii", BLOCKS), 151, "unknown"),
        (part("ds_inference", **WIDE), 91, "right"),  # 101 of the 100 columns
        (part("ds_inference", **WIDE), 90, "wrong"),
        (part("ds_inference", **(WIDE | {"kernel_inject": False})), 91, "wrong"),
        ({"segments": [part("baseline"), part("fastgen", BLOCKS, kv_block_size=16)]}, 152, "right"),
        ({"segments": [part("baseline"), part("fastgen", BLOCKS, kv_block_size=16)]}, 151, "wrong"),
        ({"segments": [part("fastgen", None), part("fastgen", BLOCKS, kv_block_size=16)]}, 152, "right"),
        ({"segments": [part("fastgen", None), part("fastgen", BLOCKS, kv_block_size=16)]}, 151, "unknown"),
        ({"config": None}, 151, "unknown"),
    ],
)
def test_limits(record: dict[str, Any], prompt_tokens: int, verdict: str) -> None:
    line = {"index": 0, "finish_reason": "rejected"}
    run = runs.RecordedRun(Path("nowhere"), record, None, [line])
    architecture = {"max_position_embeddings": 1000}
    found, notes = limits.check(run, {0: Request(0, "x", 10)}, {0: [1] * prompt_tokens}, architecture)
    assert ("wrong" if found else "unknown" if notes else "right") == verdict, (found, notes)


def test_the_kernels_own_size_of_a_block() -> None:
    record = part("fastgen", BLOCKS, kv_block_size=16)
    record["notes"] = ["the kernels' KV blocks are of 64 tokens, not engine.kv_block_size"]
    run = runs.RecordedRun(Path("nowhere"), record, None, [{"index": 0, "finish_reason": "rejected"}])
    assert limits.check(run, {0: Request(0, "x", 10)}, {0: [1] * 152}, {"max_position_embeddings": 1000})[0]


# --- the clock ---


def test_a_clock_of_passes_too(copy: Path, verified: Verified) -> None:
    """The passes are a tenth shorter as well: telemetry or the wall clock may tell, and may not."""

    def change(directory: Path, record: Record, lines: Lines) -> None:
        faster(directory, record, lines)

        def shorten(row: dict[str, str]) -> None:
            row |= {name: str(float(row[name]) * SLOWER) for name in ("started_s", "seconds")}

        table(directory / "passes.csv", shorten)

    forge(copy, change)
    told = findings(verified(copy)[1])
    assert all(text.startswith("telemetry.csv has ") for text in told)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"elapsed_s": 100.0}, "record.json says load_s "),
        ({"finished_at": "2020-01-01T00:00:00Z"}, "record.json says load_s "),
        ({"finished_at": "yesterday"}, "record.json says that it ran from "),
        ({"time": {"prefill_s": 1.0}}, "the parts of record.json's time add up to 1.000000 s, elapsed_s is "),
        ({"steps": 3}, "passes.csv has "),
        ({"passes": {"count": 1}}, "record.json's passes are not those of passes.csv"),
    ],
)
def test_times_of_a_record_that_cannot_be(copy: Path, verified: Verified, change: Record, found: str) -> None:
    edit(copy / "record.json", lambda record: record.update(change))
    told = findings(verified(copy)[1])
    assert any(text.startswith(found) for text in told), told


def last_pass_ends_later(row: dict[str, str]) -> None:
    row["seconds"] = str(float(row["seconds"]) + 0.5)


@pytest.mark.parametrize(
    ("change", "rows", "found"),
    [
        (lambda row: row.update(tokens=str(int(row["tokens"]) + 1)), slice(1), "the passes of passes.csv have "),
        (last_pass_ends_later, slice(-1, None), "passes.csv, step "),
        (lambda row: row.update(started_s="0"), slice(-1, None), "passes.csv, step "),
        (lambda row: row.update(seconds="nan"), slice(1), "passes.csv, step 1: "),
        (lambda row: row.update(seconds="10000"), slice(1), "the passes of passes.csv took 100"),
    ],
)
def test_passes_that_cannot_be(
    copy: Path, verified: Verified, change: Callable[[dict[str, str]], None], rows: slice, found: str
) -> None:
    table(copy / "passes.csv", change, rows)
    told = findings(verified(copy)[1])
    assert any(text.startswith(found) for text in told), told


def test_a_request_that_finished_before_its_passes(copy: Path, verified: Verified) -> None:
    def one(directory: Path, record: Record, lines: Lines) -> None:
        line = next(line for line in lines if len(line["token_ids"]) == 8)
        line |= {"first_token_s": line["first_token_s"] / 2, "finished_s": line["first_token_s"] * 1.01}

    def all_of_them(directory: Path, record: Record, lines: Lines) -> None:
        for line in lines:
            line["finished_s"] /= 2  # far enough, however late the machine was between the last pass and its request

    shutil.copytree(copy.parent, copy.parent.with_name("two"))
    forge(copy, one)
    assert any(" with 8 tokens, after " in text for text in findings(verified(copy)[1]))
    two = copy.parent.with_name("two") / copy.name
    forge(two, all_of_them)
    assert any(text.startswith("the last request finished at ") for text in findings(verified(two)[1]))


def test_tokens_that_were_fed_after_an_unseen_end_are_counted(copy: Path, verified: Verified) -> None:
    forge(copy, lambda directory, record, lines: feed(directory, record, 2))
    assert any(text.startswith("the passes of passes.csv have ") for text in findings(verified(copy)[1]))
    edit(copy / "record.json", lambda record: record["engine_statistics"].update(dropped_tokens=2))
    assert findings(verified(copy)[1]) == []


@pytest.mark.parametrize(("finished_s", "dropped", "found"), [(2.5, 0, 1), (2.5, 3, 0), (1.5, 3, 1), (3.5, 0, 0)])
def test_the_last_pass_may_end_after_the_last_request_where_it_was_for_nothing(
    finished_s: float, dropped: int, found: int
) -> None:
    passes = clock.Passes()
    for ends in (1.0, 2.0, 3.0):
        passes.step.append(ends)
        passes.started.append(ends - 1)
        passes.seconds.append(1.0)
        passes.ends.append(ends)
    assert len(list(clock._last(passes, [{"finished_s": finished_s}], dropped > 0))) == found


def test_samples_after_the_clock_and_too_many_of_them(copy: Path) -> None:
    record = {"elapsed_s": 9.0, "tp": 1, "dp": 1, "started_at": "2026-01-01T00:00:00Z"}

    def told(times: list[float], **changes: Any) -> list[str]:
        lines = ["time_s,host_memory_used_bytes", ",5", *(f"{time:.3f},5" for time in times)]
        (copy / "telemetry.csv").write_text("".join(f"{line}\n" for line in lines))
        return clock.check(runs.RecordedRun(copy, record | changes, None, []), [])[0][:1]

    (copy / "passes.csv").unlink()
    seconds = [float(second) for second in range(10)]
    assert told([0.001, *seconds, 9.01]) == []
    assert told([0.001, *seconds, 9.01], elapsed_s=0.9 * 9)[0].startswith("telemetry.csv has a sample at 9.000 s")
    assert told([*seconds, 15.0])[0].startswith("telemetry.csv has a sample at 15.000 s")
    assert told([time * 0.5 for time in range(18)])[0].startswith("telemetry.csv has 18 samples, 1 s apart")
    assert told([time * 0.5 for time in range(17)], segments=[{}, {}]) == []


def test_files_that_are_gone_are_told(copy: Path, verified: Verified) -> None:
    for name in ("passes.csv", "telemetry.csv", "config.yaml"):
        (copy / name).unlink()
    status, found, _ = verified(copy)
    notes = " ".join(found["notes"])
    assert status == 0, findings(found)
    assert all(f"no {name} in {copy.name}" in notes for name in ("passes.csv", "telemetry.csv", "config.yaml"))


# --- names ---


def test_a_model_renamed_everywhere(copy: Path, verified: Verified) -> None:
    """Without the files of the model nothing tells; with them its name does."""

    def change(directory: Path, record: Record, lines: Lines) -> None:
        record["model"] = "llama2_70b"
        as_at_load(record)

    forge(copy, change)
    for arguments in ([], ["--model", "--samples", "1"]):
        status, found, _ = verified(copy, *arguments)
        assert (status, findings(found)) == (
            1,
            ["record.json says model llama2_70b, the checkpoint is smollm2_135m"],
        )


@pytest.mark.slow
def test_another_checkpoint_of_the_same_name(
    copy: Path, verified: Verified, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((copy / "record.json").read_text())["config"]
    copied = shutil.copytree(config["model"]["path"], tmp_path / "copy")
    assert verified(copy, "--model", str(copied), "--samples", "1")[0] == 0
    weights = copied / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4096:] = bytes(4096)
    weights.write_bytes(data)
    status, _, err = verified(copy, "--model", str(copied))
    assert status == 2 and err.count("\n") == 1
    assert err.startswith(f"error: --model: '{copied}' is not the checkpoint of {copy.name}: its sha256 is ")


def test_a_digest_that_is_not_of_what_it_says(copy: Path, verified: Verified) -> None:
    edit(copy / "record.json", lambda record: record["loaded"].update(kernels="native"))
    told = findings(verified(copy)[1])
    assert "record.json, loaded: its sha256 is not that of what it says" in told
    assert "record.json says kernels torch, its section loaded native" in told


def test_a_run_from_before_names_were_written_down(copy: Path, verified: Verified) -> None:
    edit(copy / "record.json", lambda record: record.pop("loaded"))
    status, found, _ = verified(copy)
    assert status == 0, findings(found)
    assert any("was recorded before runs wrote down what they had loaded" in note for note in found["notes"])


def resumed(*devices: str | None, checkpoint: tuple[str, ...] = ("aa", "aa", "aa")) -> dict[str, Any]:
    """Returns a record of segments on these devices; None is one that ended before its load did."""
    names = {"model": "small", "weights": "pretrained", "dtype": "float32", "device": "cpu", "kernels": "torch"}
    parts: list[dict[str, Any]] = []
    for number, device in enumerate(devices):
        if device is None:
            parts.append({"device_name": "A CPU", "environment": {"device": "cpu", "device_name": "A CPU"}})
            continue
        record = names | {"device_name": device, "loaded": {"checkpoint_sha256": checkpoint[number]}}
        as_at_load(record)
        parts.append({key: record[key] for key in ("device_name", "kernels", "loaded")})
    return names | {"device_name": parts[-1]["device_name"], "segments": parts, "loaded": parts[-1].get("loaded")}


def test_names_of_a_run_that_was_gone_on_with() -> None:
    def whole(*devices: str | None, **more: Any) -> dict[str, Any]:
        record = resumed(*devices, **more)
        return record | {name: value for name, value in segments.whole_run(padded(record)).items() if name in JOINED}

    for honest in (whole("A CPU", "A CPU"), whole("A GPU", "A CPU"), whole("A GPU", None, "Another")):
        assert (list(problems(honest)), unchecked(honest)) == ([], False)
    assert whole("A GPU", None, "Another")["device_name"] == "A GPU + A CPU + Another"
    forged = whole("A GPU", "A CPU") | {"device_name": "A GPU"}
    (found,) = problems(forged)
    assert found == "record.json says device_name A GPU, its section loaded A GPU + A CPU"
    (found,) = problems(whole("A CPU", "A CPU", checkpoint=("aa", "bb")))
    assert found == "its segments loaded 2 checkpoints: sha256 aa, bb"
    older = whole("A CPU", "A CPU")
    del older["segments"][0]["loaded"]
    assert unchecked(older) and list(problems(older)) == []


JOINED = ("device_name", "kernels")


def padded(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"segments": [{"config_hash": "0", "job_hash": "0"} | each for each in record["segments"]]}


# --- prompts ---


def test_prompts_that_cannot_be_tokenized_are_told(
    copy: Path, verified: Verified, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def of_the_demo_model(directory: Path, record: Record, lines: Lines) -> None:
        record["config"]["model"]["path"] = None
        record["config_hash"] = config_hash(record["config"])
        (directory / "config.yaml").write_bytes(yaml_bytes(record["config"]))

    forge(copy, of_the_demo_model)
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "empty"))
    status, found, _ = verified(copy)
    assert status == 0, findings(found)
    assert not (tmp_path / "empty").exists(), "nothing is to be fetched"
    (why,) = (note for note in found["notes"] if note.startswith("prompt_tokens were not checked: "))
    assert f"the demo model is not in {tmp_path / 'empty'}" in why
    assert "whether the 1 rejected requests could have run was not checked" in found["notes"]


@pytest.mark.parametrize("change", [{"path": "nobody/nothing"}, {"tokenizer": "nobody/nothing"}])
def test_a_hub_id_is_not_looked_up(
    copy: Path, verified: Verified, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    monkeypatch.setattr("harness.models.hub.reachable", pytest.fail)
    edit(copy / "record.json", lambda record: record["config"]["model"].update(change))
    notes = verified(copy)[1]["notes"]
    assert any("'nobody/nothing' is not on this machine" in note for note in notes)


def test_code_of_a_checkpoint_is_not_run_for_its_prompts(copy: Path, verified: Verified) -> None:
    edit(copy / "record.json", lambda record: record["config"]["model"].update(trust_remote_code=True))
    notes = verified(copy)[1]["notes"]
    assert any(f"{copy.name} ran with model.trust_remote_code=true" in note for note in notes)


@pytest.mark.slow
def test_another_checkpoint_where_the_runs_was(tmp_path: Path, verified: Verified, demo_model: Path) -> None:
    directory = save_small_demo(tmp_path / "model", demo_model)
    job = [f"model.path={directory}", "model.dtype=float32", "engine.kernels=torch", "dataset.num_samples=2"]
    run = ran(tmp_path / "results", *job, "generation.max_output_len=4")
    assert run.status == 0, run.stderr
    assert (verified(run.directory)[0], run.row["model"]) == (0, "model")
    forge(run.directory, longer_prompts)
    assert any(text.startswith("prompt_tokens is ") for text in findings(verified(run.directory)[1]))
    (directory / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes()[:-4] + b"abcd")
    notes = verified(run.directory)[1]["notes"]
    assert any("is not the checkpoint that ran" in note for note in notes)


# --- the config ---


def test_a_config_changed_with_its_hash(copy: Path, verified: Verified) -> None:
    """The record, its hash and the row say one thing, ``config.yaml`` another."""

    def change(directory: Path, record: Record, lines: Lines) -> None:
        lower_cap(directory, record, lines)
        record["config_hash"] = config_hash(record["config"])

    forge(copy, change)
    (found,) = findings(verified(copy)[1])
    assert found == "record.json says generation.max_output_len=4 in its config, config.yaml 8"
    assert read_rows(copy.parent / "runs.csv")[0]["config_hash"] != ""


def test_an_engine_renamed(copy: Path, verified: Verified) -> None:
    forge(copy, lambda directory, record, lines: record.update(engine="baseline"))
    assert "record.json says engine baseline, its config fastgen" in findings(verified(copy)[1])


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"a: [", b"a: ${b}", b"- 1\n- 2\n", b""])
def test_a_damaged_config(copy: Path, verified: Verified, data: bytes) -> None:
    (copy / "config.yaml").write_bytes(data)
    status, found, err = verified(copy)
    assert (status, err) == (1, "") and any("config.yaml" in text for text in findings(found))


def test_configs_of_a_run_that_was_gone_on_with(copy: Path) -> None:
    run = runs.load(copy)
    config = run.record["config"]
    other = config | {"engine": config["engine"] | {"token_budget": 64}}
    parts = [
        {"config": each, "config_hash": config_hash(each), "job_hash": "0", "status": "failed"}
        for each in (other, config)
    ]
    record = run.record | {"segments": parts, "loaded": None}
    record["config_hash"] = segments.whole_run(record)["config_hash"]

    def told(**changes: Any) -> list[str]:
        return names.check(dataclasses.replace(run, record=record | changes))[0]

    assert told() == []
    assert told(config_hash=config_hash(config))[0].startswith("record.json says config_hash ")
    assert told(segments=[parts[0] | {"config": config}, parts[1]])[0].startswith("record.json, segment 1: ")
    assert "record.json's config is not that of its last segment" in told(segments=parts[::-1])
    assert told(segments=[parts[0], 5]) != []
