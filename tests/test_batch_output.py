"""``export=openai_batch``: completions in the format of OpenAI's batch results, and under the ids of the dataset."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.in_process import answered
from support.runs import TINY, Run, python

from harness.basics.errors import UserError
from harness.config.schema import Config, Export
from harness.results import batch_output
from harness.results.recorder import RunRecorder
from harness.running import figures
from harness.workload.records import Completion, Request

REQUESTS = [
    Request(0, "a", 3, id="first"),
    Request(1, "hi", 3, id="second"),
    Request(2, "b", 3),
]


@pytest.fixture
def recorder(tmp_path: Path) -> RunRecorder:
    """A run of three requests that has been closed."""
    recorder = RunRecorder.create(tmp_path, "a-run", {"engine": {"name": "fastgen"}}, ["main.py"])
    recorder.note(model="a model")
    recorder.add(Completion(1, 5, 3, "length", [11, 12, 13], "a\nb", 0.5, 1.5, id="second"))
    recorder.add(Completion(0, 7, 2, "eos", [11, 2], "text", 0.5, 1.5, id="first"))
    recorder.add(Completion(2, 0, 0, "rejected", [], "", None, 1.5, "too long"))
    recorder.finish("ok", expected=3, elapsed_s=2.0)
    return recorder


def test_a_completion_has_the_id_that_the_dataset_gave_its_request(recorder: RunRecorder) -> None:
    lines = list(map(json.loads, (recorder.directory / "completions.jsonl").read_text().splitlines()))
    assert [line.get("id") for line in lines] == ["second", "first", None]
    assert list(lines[0])[-1] == "id" and "id" not in lines[2]
    assert [completion.id for completion in recorder.done()] == ["second", "first", None]


def test_lines_are_as_openai_writes_them(recorder: RunRecorder) -> None:
    path = batch_output.write(recorder.directory, recorder.record, REQUESTS, chats=False)
    first, second, third = map(json.loads, path.read_text().splitlines())
    assert first["custom_id"] == "first" and first["error"] is None
    assert first["response"]["status_code"] == 200
    body = first["response"]["body"]
    assert (body["object"], body["model"]) == ("text_completion", "a model") and body["created"] > 1_700_000_000
    assert body["choices"] == [{"index": 0, "text": "text", "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    assert second["response"]["body"]["choices"][0]["finish_reason"] == "length"
    assert (third["custom_id"], third["response"]) == ("request-2", None)
    assert third["error"] == {"code": "rejected", "message": "too long"}
    assert len({line["id"] for line in (first, second, third)}) == 3


def test_chats_are_answered_by_messages(recorder: RunRecorder) -> None:
    path = batch_output.write(recorder.directory, recorder.record, REQUESTS, chats=True)
    body = json.loads(path.read_text().splitlines()[1])["response"]["body"]
    message = {"role": "assistant", "content": "a\nb"}
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    assert body["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}]


def test_ids_must_differ() -> None:
    batch_output.check_ids(REQUESTS)
    with pytest.raises(
        UserError, match=r"export: openai_batch, but requests 0 and 1 have the same id, 'request-1'; give"
    ):
        batch_output.check_ids([Request(0, "a", 1, id="request-1"), Request(1, "b", 1)])


def test_a_run_whose_file_cannot_be_written_has_failed(recorder: RunRecorder) -> None:
    (recorder.directory / batch_output.OUTPUT).mkdir()
    run: Any = SimpleNamespace(job=SimpleNamespace(config=Config(export=Export.openai_batch)))
    delivery: Any = SimpleNamespace(loaded=SimpleNamespace(workload=SimpleNamespace(requests=REQUESTS)))
    row = figures._export(run, delivery, recorder, {"status": "ok"})
    assert row["status"] == "failed" and row["error"].startswith("export=openai_batch: ")
    assert row["error"].endswith("; the completions are all there")


def test_a_batch_goes_through_a_run_and_is_verified(tmp_path: Path, harness: Callable[..., Run]) -> None:
    bodies = [
        {"prompt": "ab", "max_tokens": 3},
        {"prompt": "c" * 5000, "max_tokens": 4},
        {"prompt": "d", "max_tokens": 2},
    ]
    lines = [
        {"custom_id": f"r{at}", "method": "POST", "url": "/v1/completions", "body": body | {"temperature": 0.5}}
        for at, body in enumerate(bodies)
    ]
    path = tmp_path / "batch.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = harness(*TINY, "dataset=openai_batch", f"dataset.path={path}", "export=openai_batch")
    assert run.status == 0, run.stderr
    found = list(map(json.loads, (run.directory / "openai_batch_output.jsonl").read_text().splitlines()))
    assert [line["custom_id"] for line in found] == ["r0", "r1", "r2"]
    assert [line["error"] is None for line in found] == [True, False, True]
    assert {index: line["id"] for index, line in run.completions.items()} == {0: "r0", 1: "r1", 2: "r2"}
    assert found[2]["response"]["body"]["choices"][0]["text"] == run.completions[2]["text"]
    assert "3 of 3 requests of the file ask for temperature=0.5" in " ".join(run.record["notes"])
    verified = python("-m", "harness.verify", str(run.directory), "--model")
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_what_makes_no_text_is_not_exported() -> None:
    done = answered("engine=simulate", "export=openai_batch")
    assert done.returncode == 2
    assert (
        done.stderr == "error: export: openai_batch: a simulation makes no text that could be written; leave it out\n"
    )
    assert answered("export=csv").stderr.startswith("error: export: 'csv' is not known; choose one of ")


def test_stop_strings_of_a_batch_must_be_the_runs(tmp_path: Path) -> None:
    path = tmp_path / "batch.jsonl"
    body = {"prompt": "a", "max_tokens": 3, "stop": ["END", "\n"]}
    path.write_text(json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}))
    words = [*TINY[:-1], "dataset=openai_batch", f"dataset.path={path}", f"results_dir={tmp_path / 'results'}"]
    done = answered(*words)
    assert done.returncode == 2 and done.stderr.startswith("error: generation.stop_strings: [], but the requests of ")
    remedy = done.stderr.strip().partition("; give the file's: ")[2]
    assert remedy == """$'generation.stop_strings=["END", "\\n"]'"""
    word = subprocess.run(["bash", "-c", f"printf %s {remedy}"], capture_output=True, text=True, check=True).stdout
    done = answered(*words, word)  # they agree: what is wrong now is the next thing
    assert done.stderr.startswith("error: generation.stop_strings: 'END': dummy weights without a tokenizer")
