"""The same prompts in every kind of file that a dataset may be."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import ipc, parquet

from support.runs import SAMPLE


class Prompt(NamedTuple):
    """One request, of which a file may lack the last two."""

    text: str
    output_len: int
    id: str


def prompts(count: int, one_line: bool = False) -> list[Prompt]:
    """Returns the first ``count`` prompts of the sample; ``one_line`` puts spaces in place of their line ends."""
    lines = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()[:count]]
    end = " " if one_line else "\n"
    return [
        Prompt(line["prompt"].replace("\n", end), line["output_len"], f"request {at}") for at, line in enumerate(lines)
    ]


def table_of(asked: Sequence[Prompt]) -> Any:
    """Returns the prompts as a table, with a column that nobody asks for."""
    columns = {name: [getattr(one, name) for one in asked] for name in ("text", "output_len", "id")}
    return pa.table(columns | {"embedding": [b"\x00\xff"] * len(asked)})


def write_stream(path: Path, table: Any) -> None:
    """Writes a table as ``datasets.save_to_disk`` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=7)


def _asc24(path: Path, asked: Sequence[Prompt]) -> None:
    path.write_text(json.dumps([[one.text, 5, one.output_len] for one in asked]))


def _jsonl(path: Path, asked: Sequence[Prompt]) -> None:
    lines = [{"id": one.id, "prompt": one.text, "max_tokens": one.output_len} for one in asked]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _openai_batch(path: Path, asked: Sequence[Prompt]) -> None:
    bodies = [{"model": "any", "prompt": one.text, "max_tokens": one.output_len, "temperature": 0} for one in asked]
    rest = {"method": "POST", "url": "/v1/completions"}
    lines = [{"custom_id": one.id, **rest, "body": body} for one, body in zip(asked, bodies, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _text(path: Path, asked: Sequence[Prompt]) -> None:
    path.write_text("".join(one.text + "\n" for one in asked), encoding="utf-8")


def _csv(path: Path, asked: Sequence[Prompt]) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as stream:
        rows = csv.writer(stream, delimiter=";")
        rows.writerows([("id", "prompt", "output_len"), *((one.id, one.text, one.output_len) for one in asked)])


def _parquet(path: Path, asked: Sequence[Prompt]) -> None:
    parquet.write_table(table_of(asked), path, row_group_size=9)


def _hub(path: Path, asked: Sequence[Prompt]) -> None:
    data = path / "data"
    data.mkdir(parents=True)
    table, half = table_of(asked), len(asked) // 2
    parquet.write_table(table.slice(0, half), data / "train-00000-of-00002.parquet")
    parquet.write_table(table.slice(half), data / "train-00001-of-00002.parquet")
    (path / "README.md").write_text("# A data set")


def _saved(path: Path, asked: Sequence[Prompt]) -> None:
    table, half = table_of(asked), len(asked) // 2
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (table.slice(0, half), table.slice(half)), strict=True):
        write_stream(path / "train" / name, part)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train", "_fingerprint": "0"}
    (path / "train" / "state.json").write_text(json.dumps(state))
    (path / "train" / "dataset_info.json").write_text("{}")
    (path / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))


class Kind(NamedTuple):
    """One kind of file: the option that reads it, how it is written, and whether it has lengths and ids."""

    option: str
    write: Callable[[Path, Sequence[Prompt]], None]
    lengths: bool = True
    ids: bool = True


KINDS = {
    "data.json": Kind("asc24", _asc24, ids=False),
    "data.jsonl": Kind("jsonl", _jsonl),
    "batch.jsonl": Kind("openai_batch", _openai_batch),
    "data.txt": Kind("text", _text, lengths=False, ids=False),
    "data.csv": Kind("csv", _csv),
    "data.parquet": Kind("parquet", _parquet),
    "hub": Kind("huggingface", _hub),
    "saved": Kind("huggingface", _saved),
}


def written(directory: Path, name: str, asked: Sequence[Prompt]) -> Path:
    """Writes the prompts to the file or directory of that name, as its kind is; returns its path."""
    path = directory / name
    KINDS[name].write(path, asked)
    return path
