"""Malformed files of every kind that users bring: one line each, or exactly the requests that are in them."""

from __future__ import annotations

import collections
import csv
import io
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pyarrow import parquet
from support.datasets import assert_valid
from support.file_kinds import prompts, table_of, write_stream
from support.malformed import (
    ANY,
    FILE_LIMIT,
    LENGTH,
    SOUND,
    Malformed,
    Pairs,
    assert_one_line,
    damaged,
    is_length,
    is_text,
    mutate,
    squeezed,
    text_of,
    values_of,
    written,
)
from support.patience import no_hang

from harness.basics.errors import UserError
from harness.config.schema import DatasetConfig
from harness.workload import stored_file
from harness.workload.reading import read

FIELDS = ("prompt", "text", "output_len", "max_tokens", "id", "custom_id", "body", "url", "stop", "n", "temperature")
OPENAI = "/v1/completions"


class Expected(NamedTuple):
    """One request that must be read."""

    prompt: str
    output_len: int
    id: str | None


# What the files say, read without the harness.


def of_jsonl(data: bytes, output_len: int | None) -> list[Expected]:
    """Returns what objects with fields of the usual names ask for; raises Malformed."""
    records = values_of(text_of(data), many=False, either=True)
    keys = {key for record in records if isinstance(record, dict) for key in record}
    names = [name for name in ("prompt", "messages") if name in keys][:1]
    names = names or [name for name in ("text", "question", "instruction", "input") if name in keys]
    if len(names) != 1:
        raise Malformed
    found = []
    for record in records:
        if not isinstance(record, dict) or not is_text(record.get(names[0])) or not record[names[0]]:
            raise Malformed
        length = first(record, "output_len", "max_tokens", "max_new_tokens", "max_completion_tokens")
        name = first(record, "id", "custom_id", "request_id")
        if isinstance(name, bool) or not (name is None or isinstance(name, int) or is_text(name)):
            raise Malformed
        found.append((record[names[0]], length, None if name is None else str(name)))
    return filled(found, output_len)


def of_batch(data: bytes, output_len: int | None) -> list[Expected]:
    """Returns what the lines of an OpenAI batch ask for, of the fields that are drawn here; raises Malformed."""
    found = []
    stops = []
    for record in values_of(text_of(data), many=False, either=True):
        if not isinstance(record, dict) or not isinstance(record.get("body"), dict):
            raise Malformed
        body, name = record["body"], record.get("custom_id")
        stop = body.get("stop") or []
        stops.append(sorted([stop] if isinstance(stop, str) else stop) if is_stop(stop) else None)
        sound = is_text(name) and name and is_text(body.get("prompt")) and body["prompt"] and stops[-1] == stops[0]
        if not sound or stops[-1] is None or body.get("n", 1) not in (1, None) or record.get("url") != OPENAI:
            raise Malformed
        if record.get("method", "POST") != "POST":
            raise Malformed
        found.append((body["prompt"], first(body, "max_completion_tokens", "max_tokens"), name))
    if len({name for _, _, name in found}) < len(found):
        raise Malformed
    return filled(found, output_len)


def is_stop(value: Any) -> bool:
    values = [value] if isinstance(value, str) else value
    return isinstance(values, list) and all(is_text(one) and one for one in values)


def of_text(data: bytes, output_len: int | None) -> list[Expected]:
    """Returns the lines of a text that are not blank; raises Malformed."""
    lines = [line.removesuffix("\r") for line in text_of(data).split("\n")]
    return filled([(line, None, None) for line in lines if line.strip()], output_len)


def first(record: dict[str, Any], *names: str) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def filled(found: list[tuple[str, Any, str | None]], output_len: int | None) -> list[Expected]:
    """Returns the requests, those without a length with the given one; raises Malformed where that cannot be."""
    lacking = [one for one in found if one[1] is None]
    if not found or bool(lacking) == (output_len is None):
        raise Malformed
    if not all(is_length(length) for _, length, _ in found if length is not None):
        raise Malformed
    return [Expected(prompt, output_len if length is None else length, name) for prompt, length, name in found]


# Files of text.


@st.composite
def trees(draw: st.DrawFn, kind: str) -> list[Any]:
    """Draws the records of a JSON file, sound or not."""
    tree: list[Any] = []
    for at in range(draw(st.integers(1, 4))):
        length = [(draw(st.sampled_from(["max_tokens", "max_tokens", "output_len"])), draw(LENGTH))]
        if kind == "openai_batch":
            rest = [("method", "POST"), ("url", OPENAI)]
            body = Pairs([("prompt", draw(SOUND)), ("max_tokens", length[0][1]), ("n", 1), ("stop", ["x"])])
            tree.append(Pairs([("custom_id", f"r{at}"), *rest, ("body", body)]))
        else:
            tree.append(Pairs([("prompt", draw(SOUND)), *length, ("id", draw(st.one_of(SOUND, st.integers(0, 9))))]))
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 1, 2]))):
        mutate(draw, tree, FIELDS)
    return tree


@st.composite
def texts(draw: st.DrawFn, kind: str) -> bytes:
    """Draws the bytes of a file of text."""
    if kind == "text":
        lines = draw(st.lists(st.one_of(SOUND, SOUND, st.sampled_from(["", " ", "\t"])), max_size=4))
        data = draw(st.sampled_from(["\n", "\n", "\r\n"])).join(lines).encode("utf-8", "surrogatepass")
    elif kind == "csv":
        data = rows(draw)
    else:
        tree = draw(trees(kind))
        listed = draw(st.integers(0, 4)) == 0
        data = (written(tree) if listed else "\n".join(map(written, tree))).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 2 if kind == "text" else 6)) == 0:
        data = damaged(draw, data)
    if draw(st.integers(0, 2 if kind == "text" else 6)) == 0:
        data = squeezed(draw, data)
    encoding = draw(st.sampled_from([None] * 8 + ["utf-16", "utf-32", "utf-16-le"]))
    return data if encoding is None else data.decode("utf-8", "replace").encode(encoding)


def rows(draw: st.DrawFn) -> bytes:
    """Draws a table with a header, often with a cell too many or one that is no length."""
    out = io.StringIO(newline="")
    ends = draw(st.sampled_from(["\n", "\r\n"]))
    table = csv.writer(out, delimiter=draw(st.sampled_from(",;\t|")), lineterminator=ends)
    table.writerow(
        draw(st.sampled_from([["prompt", "output_len"]] * 9 + [["a", "b"], ["prompt"] * 2, ["text", "input"]]))
    )
    wrong = draw(st.booleans())
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        cells = [draw(SOUND), draw(st.one_of(LENGTH, ANY.map(str)) if wrong else LENGTH)]
        table.writerow(draw(st.sampled_from([cells, cells, cells, cells[:1], [*cells, "more"]])) if wrong else cells)
    return out.getvalue().encode("utf-8", "surrogatepass")


READERS = {"jsonl": of_jsonl, "openai_batch": of_batch, "text": of_text}


@pytest.mark.endurance
@pytest.mark.parametrize("kind", ["jsonl", "openai_batch", "text", "csv"])
def test_every_malformed_file_of_text_is_one_line(
    tmp_path: Path,
    kind: str,
    scale: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "data"
    tally: collections.Counter[str] = collections.Counter()
    monkeypatch.setattr(stored_file, "MAX_FILE_BYTES", FILE_LIMIT)

    @hypothesis_settings(max_examples=scale(600, 6_000, 150), database=None, suppress_health_check=list(HealthCheck))
    @given(data=texts(kind), output_len=st.sampled_from([5] if kind == "text" else [None] * 5 + [5]))
    def fuzz(data: bytes, output_len: int | None) -> None:
        file.write_bytes(data)
        expected: list[Expected] | None = []
        try:
            expected = READERS[kind](data, output_len) if kind in READERS else None
        except Malformed:
            pass
        try:
            with no_hang():
                loaded = read(DatasetConfig(name=kind, path=str(file), output_len=output_len))
        except UserError as error:
            assert not expected, f"refused, though sound: {error}"
            assert_one_line(error)
            tally["refused"] += 1
            return
        tally["accepted"] += 1
        assert_valid(loaded)
        if expected is not None:
            assert [(one.prompt, one.output_len, one.id) for one in loaded.requests] == expected

    told(capsys, kind, fuzz, tally)
    assert tally["refused"] >= scale(200, 2_000, 50) and tally["accepted"] >= scale(40, 400, 10)


def told(
    capsys: pytest.CaptureFixture[str], kind: str, fuzz: Callable[[], None], tally: collections.Counter[str]
) -> None:
    """Runs ``fuzz`` and prints what came of it."""
    started = time.perf_counter()
    fuzz()
    with capsys.disabled():
        print(f"\n{kind}: {tally.total():,} files in {time.perf_counter() - started:.0f} s: {dict(tally)}")


# Tables and data sets.


def spoiled(rng: random.Random, data: bytes) -> bytes:
    """Returns ``data`` with a few bytes changed, put in or taken out, most of them in what describes the table."""
    found = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at = rng.randrange(len(found))
        if rng.random() < 0.5:  # the end of a Parquet file says what is in it
            at = max(0, len(found) - 1 - int(rng.expovariate(1 / 300)))
        deed = rng.random()
        if deed < 0.5:
            found[at] = rng.randrange(256)
        elif deed < 0.7:
            found[at] ^= 1 << rng.randrange(8)
        elif deed < 0.8:
            found = found[:at] or found
        elif deed < 0.9:
            found[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif len(found) > 8:
            del found[at : at + rng.randrange(1, 9)]
            found = found or bytearray(b"x")
    return bytes(found)


def wrong_table(rng: random.Random) -> Any:
    """Returns a table that asks for nothing that could be run."""
    columns: dict[str, Any] = {"prompt": ["a", "b"], "output_len": [1, 2]}
    name = rng.choice(["prompt", "output_len", "id"])
    odd = {
        "prompt": [["", "b"], [None, "b"], [1, 2], [b"x", b"y"], [["a"], ["b"]], [{"a": 1}, {"a": 2}]],
        "output_len": [[0, 1], [None, 1], ["1", "2"], [1.5, 2.0], [2**40, 1], [True, False], [-1, 1]],
        "id": [[1.5, 2.0], [b"x", b"y"], [True, False], [["a"], ["b"]]],
    }
    columns[name] = rng.choice(odd[name])
    if rng.random() < 0.2:
        del columns["prompt"]
    return pa.table(columns)


def write_table(rng: random.Random, path: Path, table: Any) -> None:
    """Writes a table as Parquet or, where the file's name says so, as an Arrow stream."""
    if path.suffix == ".arrow":
        write_stream(path, table)
    else:
        parquet.write_table(table, path, compression=rng.choice(["none", "snappy", "zstd", "gzip"]))


def misdescribed(rng: random.Random, path: Path) -> None:
    """Changes what a saved data set says of its files."""
    file = rng.choice([path / "dataset_dict.json", path / "train" / "state.json"])
    names: list[Any] = [None, "", "..", "../train", "/etc", "train", "gone", "a\0b", "\ud800", 5, ["train"], {}]
    key = "splits" if file.name == "dataset_dict.json" else "_data_files"
    some = [rng.choice(names) for _ in range(rng.randrange(3))]
    files = [{"filename": one} for one in some]
    wrong: list[Any] = [{key: some}, {key: rng.choice(names)}, {}, some, None, {key: files}]
    text = json.dumps(rng.choice(wrong)).encode()
    file.write_bytes(rng.choice([text, text, text[:-1], b"", b"\xff", b"[" * 100_000]))


def table_file(rng: random.Random, path: Path, suffix: str, good: Any) -> Path:
    """Writes a table that is wrong or spoiled."""
    file = path / f"data{suffix}"
    if rng.random() < 0.3:
        write_table(rng, file, wrong_table(rng))
    else:
        write_table(rng, file, good)
        file.write_bytes(spoiled(rng, file.read_bytes()))
    return file


def data_set(rng: random.Random, path: Path, good: Any) -> Path:
    """Writes a saved data set of which something is wrong."""
    train = path / "train"
    write_stream(train / "a.arrow", good)
    (path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (train / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
    if rng.random() < 0.5:
        misdescribed(rng, path)
    else:
        table_file(rng, train, ".arrow", good).rename(train / "a.arrow")
    return path


@pytest.mark.endurance
@pytest.mark.parametrize("kind", ["parquet", "arrow", "huggingface"])
def test_every_malformed_table_is_one_line(
    tmp_path: Path, kind: str, scale: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    good = table_of(prompts(8))
    wanted = scale(200, 2_000, 60)
    tally: collections.Counter[str] = collections.Counter()

    def fuzz() -> None:
        rng = random.Random(kind)
        while tally["refused"] < wanted:
            made = (
                data_set(rng, tmp_path, good) if kind == "huggingface" else table_file(rng, tmp_path, f".{kind}", good)
            )
            option = kind if kind == "huggingface" else "parquet"  # which reads both
            try:
                with no_hang():
                    loaded = read(DatasetConfig(name=option, path=str(made)))
            except UserError as error:
                assert_one_line(error)
                tally["refused"] += 1
            else:  # a byte that nothing hangs on, or of a prompt
                assert_valid(loaded)
                tally["accepted"] += 1
                assert tally["accepted"] < 3 * wanted

    told(capsys, kind, fuzz, tally)
