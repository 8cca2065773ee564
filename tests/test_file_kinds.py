"""Every kind of file that prompts may come in: what is read of it, and what is said of one of another kind."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from support import datasets
from support.datasets import TRIPLES, chat, refusal
from support.file_kinds import KINDS, prompts, table_of, write_stream, written

from harness.config.schema import DatasetConfig
from harness.workload.reading import check_stop, read
from harness.workload.records import Message, Request, Workload

write = datasets.write


def requests(name: str, path: str | Path, **keys: Any) -> list[Request]:
    return read(DatasetConfig(name=name, path=str(path), **keys)).requests


def jsonl(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


# The same prompts


@pytest.mark.parametrize("name", KINDS)
def test_the_same_prompts_are_read_from_every_kind_of_file(tmp_path: Path, name: str) -> None:
    kind, asked = KINDS[name], prompts(50, one_line=True)
    path = written(tmp_path, name, asked)
    keys: dict[str, Any] = {} if kind.lengths else {"output_len": 9}
    found = requests(kind.option, path, **keys)
    lengths = [one.output_len if kind.lengths else 9 for one in asked]
    assert [(one.prompt, one.output_len) for one in found] == list(
        zip([one.text for one in asked], lengths, strict=True)
    )
    assert [one.id for one in found] == [one.id if kind.ids else None for one in asked]
    assert [one.index for one in found] == list(range(50))


@pytest.mark.parametrize("name", [name for name in KINDS if name != "data.txt"])
def test_line_ends_and_other_scripts_in_prompts_are_kept(tmp_path: Path, name: str) -> None:
    asked = prompts(72)
    assert sum("\n" in one.text for one in asked) > 20
    found = requests(KINDS[name].option, written(tmp_path, name, asked))
    assert [one.prompt for one in found] == [one.text for one in asked]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "batch.jsonl", "data.txt", "data.csv"])
def test_each_kind_of_text_may_be_gzip(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name, prompts(3, one_line=True))
    plain = read(DatasetConfig(name=KINDS[name].option, path=str(path), output_len=None if KINDS[name].lengths else 4))
    stored = gzip.compress(path.read_bytes())
    path.write_bytes(stored)
    packed = read(DatasetConfig(name=KINDS[name].option, path=str(path), output_len=None if KINDS[name].lengths else 4))
    assert packed.requests == plain.requests
    assert packed.sha256 == hashlib.sha256(stored).hexdigest() != plain.sha256


@pytest.mark.parametrize("name", ["hub", "saved"])
def test_the_digest_of_a_directory_is_that_of_its_data_files(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name, prompts(6))
    files = sorted([*path.rglob("*.arrow"), *path.rglob("*.parquet")])
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    config = DatasetConfig(name="huggingface", path=str(path))
    assert len(files) == 2 and read(config).sha256 == digest
    (path / "NOTES.md").write_text("none of its rows")
    assert read(config).sha256 == digest
    files[0].write_bytes(files[1].read_bytes())
    assert read(config).sha256 != digest


# Fields


def test_fields_are_found_by_their_usual_names(write: Callable[..., str]) -> None:
    path = write(jsonl({"question": "a", "max_new_tokens": 3, "request_id": 7}, {"question": "b", "output_len": 4}))
    assert requests("jsonl", path) == [Request(0, "a", 3, id="7"), Request(1, "b", 4)]
    path = write(json.dumps([{"prompt": "a", "text": "other", "prompt_len": 5, "output_len": 1, "id": None}]))
    assert requests("jsonl", path) == [Request(0, "a", 1, 5)]


def test_fields_are_named_by_keys_and_by_dots(write: Callable[..., str]) -> None:
    record = {"input": {"text": "a", "n": [3, 4]}, "a.b": "x", "prompt": "not this"}
    keys = {"prompt_field": "input.text", "output_len_field": "input.n.1", "id_field": "a.b"}
    assert requests("jsonl", write(jsonl(record)), **keys) == [Request(0, "a", 4, id="x")]
    path = write(jsonl({"a": 1}))
    line = refusal("jsonl", path, prompt_field="b.c")
    assert (
        line == "dataset.prompt_field: no record has the field 'b.c'; "
        "name one of its fields: ['a'], by dots what lies deeper"
    )
    assert refusal("jsonl", write(jsonl({"prompt": "a"})), output_len_field="n").startswith(
        "dataset.output_len_field: no "
    )
    line = refusal("jsonl", write(jsonl({"a": {"b": "x"}, "n": 1}, {"a": {}, "n": 1})), prompt_field="a.b")
    assert line.startswith("dataset.path, line 2: an object with the keys ['a', 'n'], not an object with a 'a.b';")


def test_which_field_is_the_prompt_must_be_clear(write: Callable[..., str]) -> None:
    alpaca = {"instruction": "do", "input": "this", "output": "done"}
    line = refusal("jsonl", write(jsonl(alpaca)))
    assert line.startswith("dataset.path: the prompt may be 'instruction' and 'input': ")
    assert line.endswith("; say which: dataset.prompt_field=instruction")
    assert requests("jsonl", write(jsonl(alpaca)), prompt_field="input", output_len=3)[0].prompt == "this"


@pytest.mark.parametrize("key", ["prompt_field", "output_len_field", "id_field", "split"])
@pytest.mark.parametrize("name", ["sample", "asc24", "text", "openai_batch", "synthetic"])
def test_fields_are_refused_where_there_are_none_to_choose(write: Callable[..., str], name: str, key: str) -> None:
    path = None if name in ("sample", "synthetic") else write(TRIPLES)
    keys = {"input_len": 2, "num_samples": 1} if name == "synthetic" else {}
    output_len = {"output_len": 3} if name in ("synthetic", "text") else {}
    line = refusal(name, path, **{key: "x"}, **keys, **output_len)
    assert line.startswith(
        f"dataset.{key}: 'x' given with dataset={name}, which has none to choose; leave it out, or use"
    )


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"prompt": ""}, ", prompt: the string is empty"),
        ({"prompt": 5}, ", prompt: 5 is not a string"),
        ({"prompt": "a\ud800"}, ", prompt: character 1 is the lone surrogate"),
        ({"prompt": "a", "output_len": "5"}, ", output_len: the string '5' is not a whole number from 1 to 1,000,000"),
        ({"prompt": "a", "max_tokens": 5.0}, ", max_tokens: the float 5.0 is not a whole number"),
        ({"prompt": "a", "id": {"x": 1}}, ", id: an object with the keys ['x'] is neither text nor a whole number"),
        ({"prompt": "a", "id": True}, ", id: true is neither text nor a whole number"),
        (["a", 1, 2], ": a list of length 3, not an object with a 'prompt'"),
        ({"question": "a"}, ": an object with the keys ['question'], not an object with a 'prompt'"),
        ({"prompt": []}, ", prompt: an empty list"),
        ({"prompt": ["a"]}, ", prompt[0]: the string 'a' is not an object"),
    ],
)
def test_a_bad_record_is_named_by_its_line(write: Callable[..., str], record: Any, found: str) -> None:
    path = write(jsonl({"prompt": "good", "output_len": 1}) + "\n\n" + jsonl(record))
    assert refusal("jsonl", path).startswith("dataset.path, line 4" + found)


# Chats


def test_chats_are_read_from_fields(write: Callable[..., str]) -> None:
    messages = [{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"}]
    answered = [*messages, {"role": "assistant", "content": "hello"}]
    path = write(jsonl({"messages": messages, "output_len": 3}, {"messages": answered, "output_len": 4}))
    chats = (Message("system", "be short"), Message("user", "hi"))
    assert parsed("jsonl", path) == [
        Request(0, "be short\nhi", 3, messages=chats),
        Request(1, "be short\nhi", 4, messages=chats, reply="hello"),
    ]


def parsed(name: str, path: str) -> list[Request]:
    """Returns the requests as the format reads them, before what needs a template is refused."""
    from harness.workload import catalogue

    return catalogue.find(name).read(DatasetConfig(name=name, path=path)).requests


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ("hi", "messages[0]: the string 'hi' is not an object"),
        ({"content": "hi"}, "messages[0].role: null is not a string"),
        ({"role": "user"}, "messages[0].content: null is not a string"),
        (
            {"role": "user", "content": [{"type": "image_url"}]},
            "messages[0].content[0]: an object with the keys ['type'] is",
        ),
        ({"role": "assistant", "content": "hi"}, "messages: an assistant's message alone asks nothing"),
        (
            {"role": "user", "content": "a", "tool_calls": [1]},
            "messages[0].tool_calls: calls of tools cannot be asked here",
        ),
    ],
)
def test_a_message_that_is_none(write: Callable[..., str], message: Any, found: str) -> None:
    assert refusal("jsonl", write(jsonl({"messages": [message]}))).startswith(f"dataset.path, line 1, {found}")


# OpenAI's batches


def batch(body: Any, **changes: Any) -> dict[str, Any]:
    url = "/v1/chat/completions" if isinstance(body, dict) and "messages" in body else "/v1/completions"
    return {"custom_id": "a", "method": "POST", "url": url, "body": body} | changes


def test_a_batch_of_chats(write: Callable[..., str]) -> None:
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    body = {"model": "m", "messages": [{"role": "user", "content": parts}], "max_tokens": 9, "max_completion_tokens": 8}
    path = write(jsonl(batch(body), batch({"prompt": "p", "max_tokens": 7, "n": 1, "stream": False}, custom_id="b")))
    assert parsed("openai_batch", path) == [
        Request(0, "hello", 8, messages=(Message("user", "hello"),), id="a"),
        Request(1, "p", 7, id="b"),
    ]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ({"prompt": "a"}, ": an object with the keys ['prompt'], not {"),
        (batch(None), ": an object with the keys ['custom_id', 'method', 'url', 'body'], not {"),
        (batch({"prompt": "a"}, custom_id=5), ", custom_id: 5 is not a string"),
        (batch({"prompt": "a"}, method="GET"), ", method: the string 'GET' is not the string 'POST'"),
        (batch({"input": "a"}, url="/v1/embeddings"), ", url: the string '/v1/embeddings' is neither /v1/chat/"),
        (batch({"messages": []}), ", body.messages: an empty list"),
        (batch({"prompt": [1, 2]}), ", body.prompt: a list of length 2 is not a string"),
        (batch({"prompt": "a", "max_tokens": 0}), ", body.max_tokens: 0 is not a whole number"),
        (batch({"prompt": "a", "n": 2}), ", body.n: 2 cannot be done here; leave it out"),
        (batch({"prompt": "a", "logprobs": 5}), ", body.logprobs: 5 cannot be done here"),
        (batch({"prompt": "a", "tools": [{}]}), ", body.tools: a list of length 1 cannot be done here"),
        (batch({"prompt": "a", "stream": True}), ", body.stream: true cannot be done here"),
        (batch({"prompt": "a", "stop": 5}), ", body.stop: 5 is neither a string nor a list of them"),
        (batch({"prompt": "a", "stop": "x"}), ", body.stop: the string 'x', but line 1 has []; a run has one rule"),
        (batch({"prompt": "a"}, custom_id="first"), ", custom_id: 'first' is that of line 1 too"),
    ],
)
def test_a_line_of_a_batch_that_cannot_be_run(write: Callable[..., str], line: Any, found: str) -> None:
    path = write(jsonl(batch({"prompt": "a", "max_tokens": 1}, custom_id="first"), line))
    assert refusal("openai_batch", path).startswith("dataset.path, line 2" + found)


def test_sampling_is_noted_and_stop_strings_must_be_the_runs(write: Callable[..., str]) -> None:
    body = {"prompt": "p", "max_tokens": 7, "temperature": 0.7, "top_p": 1, "stop": ["b", "a"]}
    found = read(DatasetConfig(name="openai_batch", path=write(jsonl(batch(body)))))
    assert found.notes == ("1 of 1 requests of the file ask for temperature=0.7: decoding is greedy all the same",)
    assert found.stop_strings == ("b", "a")
    check_stop(found, ["a", "b"])
    with pytest.raises(
        Exception, match=r"generation\.stop_strings: \[\], but .* stop: \[\"b\", \"a\"\]; give the file's"
    ):
        check_stop(found, [])
    check_stop(dataclasses.replace(found, stop_strings=None), ["x"])


# Text and CSV


def test_lines_of_text(write: Callable[..., str]) -> None:
    path = write("\ufeff one \r\n\n  \t\ntwo\u2028\x0cand more\nlast", "a.txt")
    assert [one.prompt for one in requests("text", path, output_len=5)] == [" one ", "two\u2028\x0cand more", "last"]
    assert refusal("text", write(" \n\n"), output_len=5).startswith("dataset.path: empty file: ")
    assert "not UTF-8" in refusal("text", write(b"a\xff"), output_len=5)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_dialects_of_csv(write: Callable[..., str], delimiter: str, end: str) -> None:
    rows = [["id", "prompt", "output_len"], ["1", f'"a{delimiter} ""b""\n\nc"', "3"], ["", ",;|", "4.0"], ["", "", ""]]
    if delimiter in ",;|":
        rows[2][1] = f'"{rows[2][1]}"'
    text = end.join(delimiter.join(row) for row in rows) + end + end
    for before in ("", "\ufeff", *([f"sep={delimiter}{end}"])):
        assert requests("csv", write(before + text)) == [
            Request(0, f'a{delimiter} "b"\n\nc', 3, id="1"),
            Request(1, ",;|", 4),
        ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "prompt,output_len\na,1\nb\n",
            "dataset.path, line 3: 1 cells, but the header has 2: ['prompt', 'output_len'];",
        ),
        ('prompt,output_len\n"a\nb",1\n"c,2\n', "dataset.path, line 4: not CSV (a quote is never closed)"),
        ("prompt,output_len\na,x\n", "dataset.path, line 2, output_len: the string 'x' is not a whole number"),
        ('prompt,output_len\n"a"b,1\n', "dataset.path, line 2: not CSV ("),
        ("prompt,output_len\n\ra,1\n", "dataset.path, line 2: not CSV (a carriage return outside quotes)"),
        ("prompt,output_len\n,1\n", "dataset.path, line 2, prompt: the string is empty"),
        ("prompt,output_len\n", "dataset.path: no row below the header: "),
        ("a,b\nc,1\n", "dataset.path: no field of a record is called prompt, messages, text, question, instruction or"),
        ("", "dataset.path: empty file"),
    ],
)
def test_csv_that_is_none(write: Callable[..., str], text: str, found: str) -> None:
    assert refusal("csv", write(text, "data.csv")).startswith(found)


def test_a_column_of_csv_is_named_by_a_key(write: Callable[..., str]) -> None:
    path = write("My prompt;n\nhello, you;3\n", "data.csv")
    assert requests("csv", path, prompt_field="My prompt", output_len_field="n") == [Request(0, "hello, you", 3)]


# Tables and Hugging Face


def test_columns_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    deep = [{"text": "a"}, {"text": "b"}]
    table = pa.table({"input": deep, "n": [2.0, None], "messages": [[{"role": "user", "content": "hi"}]] * 2})
    parquet.write_table(table, path)
    found = requests("parquet", path, prompt_field="input.text", output_len_field="n", output_len=7)
    assert [(one.prompt, one.output_len) for one in found] == [("a", 2), ("b", 7)]
    assert [one.messages for one in parsed("parquet", str(path))] == [(Message("user", "hi"),)] * 2
    parquet.write_table(pa.table({"a": [1], "b": [b"x"]}), path)
    assert "name one of its fields: ['a', 'b']" in refusal("parquet", str(path))
    line = refusal("parquet", str(path), prompt_field="b")
    assert line.startswith("dataset.path, record 0 (counting from 0), b: b'x' is not a string")
    parquet.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    assert refusal("parquet", str(path)).startswith("dataset.path: a table without rows: ")


def test_a_text_that_many_rows_share_takes_its_place_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    shared = pa.array(["a", "b", "a"]).dictionary_encode()
    parquet.write_table(pa.table({"prompt": shared}), path)
    assert [one.prompt for one in requests("parquet", path, output_len=1)] == ["a", "b", "a"]
    write_stream(tmp_path / "v.arrow", pa.table({"prompt": pa.array(["a", "b"], pa.string_view())}))
    assert [one.prompt for one in requests("parquet", tmp_path / "v.arrow", output_len=1)] == ["a", "b"]
    parquet.write_table(pa.table({"prompt": pa.array(["x" * 1000] * 60_000).dictionary_encode()}), path)
    assert path.stat().st_size < 10_000
    monkeypatch.setattr("harness.machine.memory.available_memory_bytes", lambda: 60_000_000)
    assert refusal("parquet", str(path), output_len=1).startswith("dataset.path: reading it may take 0.1 GiB, ")
    write_stream(tmp_path / "n.arrow", pa.table({"prompt": pa.StructArray.from_arrays([shared], ["text"])}))
    assert "a column of type struct<text: dictionary" in refusal("parquet", str(tmp_path / "n.arrow"), output_len=1)


def test_splits_of_a_folder(tmp_path: Path) -> None:
    asked = prompts(6)
    for place, part in (
        ("data/train-00000-of-00001.parquet", asked[:4]),
        ("data/test-00000-of-00001.parquet", asked[4:]),
    ):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        parquet.write_table(table_of(part), tmp_path / place)
    line = refusal("huggingface", str(tmp_path))
    assert line == (
        f"dataset.split: not given, but {str(tmp_path)!r} has the splits ['test', 'train']; "
        "name one of them with dataset.split="
    )
    assert [one.id for one in requests("huggingface", tmp_path, split="test")] == ["request 4", "request 5"]
    assert refusal("huggingface", str(tmp_path), split="dev").startswith("dataset.split: 'dev' is none: ")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "test.jsonl").write_text(jsonl({"text": "x"}))
    line = refusal("huggingface", str(tmp_path), split="test")
    assert "the split 'test' is there more than once, in ['data/*.parquet', 'other/*.jsonl']" in line
    assert [one.prompt for one in requests("huggingface", tmp_path / "other", output_len=1)] == ["x"]


def test_splits_of_what_was_saved(tmp_path: Path) -> None:
    asked = prompts(4)
    path = written(tmp_path, "saved", asked)
    (path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert "has the splits ['train', 'test']" in refusal("huggingface", str(path))
    assert len(requests("huggingface", path, split="train")) == 4
    assert len(requests("huggingface", path / "train")) == 4
    state = json.loads((path / "train" / "state.json").read_text())
    for change, found in (
        ({"_data_files": [{"filename": "../../etc/passwd"}]}, "its state.json names no data files"),
        ({"_data_files": 5}, "its state.json names no data files"),
        ({"_data_files": []}, "its state.json names no data files"),
        ({"_indices_data_files": [{"filename": "i.arrow"}]}, "its rows are chosen by an index"),
        ({"_data_files": [{"filename": "gone.arrow"}]}, "no such file"),
    ):
        (path / "train" / "state.json").write_text(json.dumps(state | change))
        assert refusal("huggingface", str(path / "train")).startswith(f"dataset.path: {found}: ")


def test_a_record_of_a_data_set_is_named_with_its_file(tmp_path: Path) -> None:
    write_stream(tmp_path / "a.arrow", pa.table({"prompt": ["x", ""], "output_len": [1, 1]}))
    line = refusal("huggingface", str(tmp_path))
    assert line.startswith(
        "dataset.path, a.arrow, record 1 (counting from 0), prompt: the string is empty; correct it in "
    )
    (tmp_path / "a.arrow").unlink()
    assert refusal("huggingface", str(tmp_path)).startswith(
        "dataset.path: no parquet, arrow, jsonl, json or csv file in it"
    )


# Another kind than was said


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("option", ["sample", *dict.fromkeys(kind.option for kind in KINDS.values()), "sharegpt"])
def test_a_file_of_another_kind_is_recognised(tmp_path: Path, name: str, option: str) -> None:
    kind = KINDS[name]
    path = written(tmp_path, name, prompts(3, one_line=True))
    if kind.option != option and not (option == "csv" and name == "data.txt"):
        line = refusal(option, str(path), **({"output_len": 3} if option == "text" else {}))
        assert line.endswith(f": use dataset={kind.option}"), line


def test_what_files_are_called(write: Callable[..., str]) -> None:
    assert refusal("asc24", write(jsonl({"prompt": "a"}, {"prompt": "b"}))).endswith(
        "; this is JSONL: use dataset=jsonl"
    )
    assert refusal("jsonl", write(jsonl(chat("a", "b")))).endswith("; this is ShareGPT: use dataset=sharegpt")
    assert requests("sharegpt", write(jsonl(chat("a", "b"), chat("c", "d"))))[1].prompt == "c"
    line = refusal("sample", write("nothing that is known", "a.txt"))
    assert line.endswith("; this is plain text: use dataset=text")
    assert "this is" not in refusal("sample", write('{"cut": "off', "a.jsonl"))
    assert refusal("text", write("prompt\na", "a.csv"), output_len=1).endswith("; this is CSV: use dataset=csv")
    assert len(requests("text", write("prompt\na", "a.txt"), output_len=1)) == 2


def test_lengths_come_from_the_file_then_from_the_key(write: Callable[..., str]) -> None:
    path = write(jsonl({"prompt": "a", "output_len": 3}, {"prompt": "b"}, {"prompt": "c", "output_len": None}))
    assert [one.output_len for one in requests("jsonl", path, output_len=5)] == [3, 5, 5]
    assert refusal("jsonl", path).startswith("dataset.output_len: not given, ")
    assert refusal("jsonl", write(jsonl({"prompt": "a", "output_len": 3})), output_len=5).startswith(
        "dataset.output_len: 5 given, but "
    )


def test_nothing_of_the_file_is_lost_by_num_samples(tmp_path: Path) -> None:
    path = written(tmp_path, "data.jsonl", prompts(5))
    found: Workload = read(DatasetConfig(name="jsonl", path=str(path), num_samples=2))
    assert [one.id for one in found.requests] == ["request 0", "request 1"]
    assert refusal("jsonl", str(path), num_samples=6).startswith("dataset.num_samples: 6 asked for, but ")
