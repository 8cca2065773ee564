"""The requests of a run: what one is, how one ends, and the readers of every ``dataset=`` option.

A bad file is refused here, before any weight is loaded, with the record and the field that are wrong.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
import os
import random
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import environment
from harness.config import DatasetConfig, GenerationConfig, SyntheticPrompt
from harness.errors import UserError, quoted

SAMPLE_PATH = Path(__file__).resolve().parent / "data" / "sample.jsonl"
MAX_LENGTH = 1_000_000  # tokens of one prompt or one output
MAX_SAMPLES = 1_000_000  # synthetic requests; files are as long as they are
MAX_RANDOM_TOKENS = 100_000_000  # ids of dataset.prompt=random in total; each takes 8 bytes
BYTES_A_LIST, BYTES_A_VALUE = 180, 80  # in memory, of a list or object in a file, and of a value in one (measured)
MAX_FILE_BYTES = 2**31  # stored or uncompressed; the whole file is held in memory

_RECORDS = {
    "asc24": "[prompt, prompt_len, output_len]",
    "sample": '{"prompt": ..., "prompt_len": ..., "output_len": ...}',
    "sharegpt": '{"conversations": [{"from": ..., "value": ...}, ...]}',
}


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to run."""

    index: int  # position among the requests of the workload, from 0
    prompt: str  # empty when prompt_ids is given
    output_len: int | None  # tokens to generate; None until resolve() has counted the reply (sharegpt)
    claimed_prompt_len: int | None = None  # what the file says; only ever compared, never trusted
    prompt_ids: tuple[int, ...] | None = None  # in place of text (dataset=synthetic dataset.prompt=random)
    reply: str | None = None  # sharegpt: the reference whose token count becomes output_len


@dataclass(slots=True)
class Completion:
    """One finished or rejected request: one line of ``completions.jsonl``, fields in this order."""

    index: int
    prompt_tokens: int  # ids fed to the model, BOS included, padding never; 0 when rejected
    output_tokens: int  # ids generated, EOS included
    finish_reason: str  # "eos", "length" or "rejected"
    token_ids: list[int]  # the generated ids
    text: str
    first_token_s: float | None  # seconds after the clock started
    finished_s: float | None
    error: str | None = None  # why it was rejected


@dataclass(frozen=True, slots=True)
class Workload:
    """The requests of a run and where they came from."""

    name: str  # the dataset= option
    requests: list[Request]  # in the file's order; requests[i].index == i
    path: str | None  # None for synthetic
    sha256: str | None  # of the file's bytes as stored, compressed if they are; None for synthetic
    left_out: int = 0  # sharegpt: unusable conversations passed over on the way to the last request
    seed: int = 0  # synthetic: of the ids which resolve() draws


def read(dataset: DatasetConfig) -> Workload:
    """Reads, checks and fingerprints the dataset; the whole file is checked even when few samples are taken.

    ``dataset.num_samples`` takes the first N usable records in the file's order. vLLM's
    ``benchmark_throughput`` shuffles a ShareGPT file; here nothing is shuffled, so runs are repeatable.
    A ShareGPT conversation is left out, and counted, when it has fewer than two turns, an empty prompt,
    or an empty reply that should give the output length.

    Raises:
        UserError: the config contradicts itself, the file cannot be read, or a record is wrong.
    """
    _check(dataset)
    if dataset.name == "synthetic":
        return _synthetic(dataset)
    path = str(SAMPLE_PATH) if dataset.name == "sample" else os.path.expanduser(dataset.path or "")
    file = _File(dataset.name, path)
    data, sha256 = file.read()
    parsed = [
        _sharegpt(record, dataset.output_len) if file.name == "sharegpt" else _triple(record)
        for record in file.records(data)
    ]
    requests: list[Request] = []
    left_out = 0
    for request in parsed:
        if len(requests) == dataset.num_samples:
            break
        if request is None:
            left_out += 1
        else:
            requests.append(replace(request, index=len(requests)))
    if not requests:
        raise file.error(f"none of the {left_out:,} conversations has a prompt and a reply")
    if dataset.num_samples is not None and len(requests) < dataset.num_samples:
        raise UserError(
            "dataset.num_samples",
            f"{dataset.num_samples:,} asked for, but {quoted(path, 300)} holds {len(requests):,}"
            + (f" ({left_out:,} more are not usable)" if left_out else ""),
            f"give a number from 1 to {len(requests)}, or null for all",
        )
    return Workload(dataset.name, requests, path, sha256, left_out)


def resolve(
    workload: Workload,
    generation: GenerationConfig,
    *,
    vocab_size: int | None = None,
    count_tokens: Callable[[list[str]], list[int]] | None = None,
) -> Workload:
    """Settles what needs the model's vocabulary; afterwards every ``output_len`` is an int of at least 1.

    Counts the replies that give output lengths, leaves out the conversations whose reply has no token
    (the later requests move up), draws the random prompt ids and applies ``generation.max_output_len``.

    Args:
        workload: as ``read`` returned it.
        generation: for ``max_output_len``.
        vocab_size: ids are drawn below it; needed by ``dataset.prompt=random``.
        count_tokens: token counts of a list of texts, called at most once; needed by ShareGPT replies.

    Raises:
        UserError: ``generation.max_output_len`` is below 1, or no conversation is left.
        ValueError: an argument that this workload needs is missing or wrong.
    """
    cap = generation.max_output_len
    if cap is not None and cap < 1:
        raise UserError("generation.max_output_len", f"{cap} is below 1", "give 1 or more, or null for no limit")
    lengths = {request.index: request.output_len for request in workload.requests}
    uncounted = [request for request in workload.requests if request.output_len is None]
    if uncounted:
        if count_tokens is None:
            raise ValueError("count_tokens is needed: these requests take their output_len from a reply")
        counts = count_tokens([request.reply or "" for request in uncounted])
        lengths.update(zip((request.index for request in uncounted), counts, strict=True))
    drawn = _random_ids(workload, vocab_size)
    requests: list[Request] = []
    for request in workload.requests:
        output_len, prompt_ids = lengths[request.index], request.prompt_ids
        if not output_len:
            continue
        if not request.prompt and prompt_ids is None:
            prompt_ids = next(drawn)
        output_len = output_len if cap is None else min(output_len, cap)
        requests.append(replace(request, index=len(requests), output_len=output_len, prompt_ids=prompt_ids))
    left_out = workload.left_out + len(workload.requests) - len(requests)
    if not requests:
        found = f"none of the {left_out:,} conversations has a reply of at least one token"
        raise _File(workload.name, str(workload.path)).error(found)
    return replace(workload, requests=requests, left_out=left_out)


def _random_ids(workload: Workload, vocab_size: int | None) -> Iterator[tuple[int, ...]]:
    """Yields each request's ``claimed_prompt_len`` ids, the same ones for the same seed."""
    if vocab_size is None or vocab_size < 1:
        raise ValueError(f"vocab_size is needed to draw random token ids, not {vocab_size}")
    # The first three ids are <unk>, <s> and </s> in LLaMA-2's vocabulary. A list, because ids drawn from it
    # are shared objects; a range would make a new one for every token.
    ids = list(range(min(3, vocab_size - 1), vocab_size))
    rng = random.Random(workload.seed)
    for request in workload.requests:
        yield tuple(rng.choices(ids, k=request.claimed_prompt_len or 0))


def _check(dataset: DatasetConfig) -> None:
    """Refuses keys that the chosen dataset needs and lacks, or cannot use."""
    name, option = dataset.name, f"dataset={dataset.name}"
    if name not in ("sample", "asc24", "sharegpt", "synthetic"):
        options = "sample, asc24, sharegpt or synthetic"
        raise UserError("dataset.name", f"unknown dataset {quoted(name)}", f"use {options}")
    if name in ("asc24", "sharegpt"):
        if not dataset.path:
            raise UserError("dataset.path", f"not given with {option}", f"give the path of {_wanted(name)}")
    elif dataset.path is not None:
        raise UserError(
            "dataset.path",
            f"{quoted(dataset.path, 300)} given with {option}, which reads no file of yours",
            "leave it out, or use dataset=asc24 or dataset=sharegpt to run your own file",
        )
    required = name == "synthetic"
    _check_range("dataset.num_samples", dataset.num_samples, MAX_SAMPLES if required else None, required)
    for key, value in (("input_len", dataset.input_len), ("output_len", dataset.output_len)):
        if value is not None and not required and (name, key) != ("sharegpt", "output_len"):
            limit = ", or limit the outputs with generation.max_output_len" if key == "output_len" else ""
            found = f"{value} given with {option}, which brings its own lengths"
            raise UserError(f"dataset.{key}", found, f"leave it out{limit}")
        _check_range(f"dataset.{key}", value, MAX_LENGTH, required)
    if dataset.prompt is not SyntheticPrompt.hi and not required:
        found = f"{dataset.prompt.value} given with {option}, which brings its own prompts"
        raise UserError("dataset.prompt", found, "leave it out, or use dataset=synthetic")


def _check_range(field: str, value: int | None, limit: int | None, required: bool) -> None:
    if (value is None and required) or (value is not None and not 1 <= value <= (limit or value)):
        found = "not given" if value is None else f"{value} is out of range"
        remedy = "give a whole number from 1" + (f" to {limit:,}" if limit else "")
        raise UserError(field, found, remedy + ("" if required else ", or null"))


def _synthetic(dataset: DatasetConfig) -> Workload:
    """The committee's workload without a dataset, or random ids of the same length."""
    num_samples, input_len = dataset.num_samples or 0, dataset.input_len or 0
    prompt = ""
    if dataset.prompt is SyntheticPrompt.hi:
        if input_len < 2:
            found = f'{input_len} makes the prompt "hi" * (input_len - 1) empty'
            raise UserError("dataset.input_len", found, "give at least 2, or use dataset.prompt=random")
        prompt = "hi" * (input_len - 1)
    elif num_samples * input_len > MAX_RANDOM_TOKENS:
        raise UserError(
            "dataset.num_samples",
            f"{num_samples:,} prompts of {input_len:,} random tokens are {num_samples * input_len:,} tokens",
            f"lower it or dataset.input_len to make at most {MAX_RANDOM_TOKENS:,}",
        )
    requests = [Request(index, prompt, dataset.output_len, input_len) for index in range(num_samples)]
    return Workload(dataset.name, requests, None, None, seed=dataset.seed)


@dataclass(frozen=True, slots=True)
class _HugeInteger:
    """An integer that is certainly no length; ``int()`` refuses those of more than 4,300 digits."""

    digits: int


def _parse_int(literal: str) -> int | _HugeInteger:
    return int(literal) if len(literal) <= 20 else _HugeInteger(len(literal.lstrip("-")))


_DECODER = json.JSONDecoder(parse_int=_parse_int)
_VALUE_START = re.compile(r"[^ \t\n\r]")


@dataclass(frozen=True, slots=True)
class _File:
    """A dataset file, and the errors that name it."""

    name: str  # the dataset= option
    path: str

    @property
    def field(self) -> str:
        """The key that chose the file."""
        return "dataset=sample" if self.name == "sample" else "dataset.path"

    def error(self, found: str, remedy: str = "") -> UserError:
        found = f"{found}: {quoted(self.path, 300)}"
        if self.name == "sample":
            return UserError(self.field, found, "restore harness/data/sample.jsonl from the repository")
        return UserError(self.field, found, remedy or f"give the path of {_wanted(self.name)}")

    def read(self) -> tuple[bytes, str]:
        """Returns the uncompressed bytes, and the SHA-256 of the stored ones."""
        too_large = f"more than {MAX_FILE_BYTES:,} bytes"
        try:
            status = os.stat(self.path)
            if stat.S_ISDIR(status.st_mode):
                raise self.error("a directory, not a file")
            if not stat.S_ISREG(status.st_mode):  # reading a pipe or a terminal could wait for ever
                raise self.error("not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise self.error(too_large)
            data = Path(self.path).read_bytes()
        except FileNotFoundError:
            raise self.error("no such file") from None
        except OSError as error:
            raise self.error(f"cannot be read ({error.strerror or error})") from error
        except ValueError as error:  # a NUL or a lone surrogate in the path
            raise self.error(f"not a path ({error})") from error
        sha256 = hashlib.sha256(data).hexdigest()
        if not data.startswith(b"\x1f\x8b"):
            return data, sha256
        content = bytearray()
        try:
            with gzip.open(io.BytesIO(data)) as stream:
                while chunk := stream.read(2**20):
                    content += chunk
                    if len(content) > MAX_FILE_BYTES:
                        raise self.error(f"{too_large} when uncompressed")
        except EOFError:
            raise self.error("truncated gzip file", "copy or compress it again") from None
        except (OSError, zlib.error) as error:
            raise self.error(f"damaged gzip file ({error})", "copy or compress it again") from error
        return bytes(content), sha256

    def records(self, data: bytes) -> list[_Record]:
        """Returns the records, their values unchecked, out of uncompressed bytes."""
        needed = 2 * len(data) + BYTES_A_LIST * (data.count(b"[") + data.count(b"{")) + BYTES_A_VALUE * data.count(b",")
        if needed > (free := environment.available_memory_bytes()):  # a small gzip file may hold a billion lists
            found = f"reading it may take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of memory are free"
            raise self.error(found, "give a part of it, or use a larger machine")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            # The codec counts from after a byte order mark.
            offset = error.start + len(data) - len(error.object)
            found = f"not UTF-8, {error.reason} at byte {offset:,} ({data[offset]:#04x})"
            raise self.error(found, "save it as UTF-8, or copy it again if it was cut") from None
        values, end = [], 0
        try:
            while start := _VALUE_START.search(text, end):
                value, end = _DECODER.raw_decode(text, start.start())
                values.append(value)
        except RecursionError:
            raise self.error("JSON nested too deeply to read") from None
        except json.JSONDecodeError as error:
            started = text.lstrip().startswith("[") and not values
            cut = started and not (text.rstrip().endswith("]") and text[error.pos :].strip())
            state = "truncated" if cut or error.msg.startswith("Unterminated string") else "invalid"
            offset = len(text[: error.pos].encode()) + 3 * data.startswith(codecs.BOM_UTF8)
            place = f"line {error.lineno}, column {error.colno} (byte {offset:,})"
            raise self.error(f"{state} JSON, {error.msg.removesuffix(' at')} at {place}") from None
        if not values:
            raise self.error("empty file")
        if self.name != "sample":
            if len(values) > 1:
                raise self.error(f"{len(values):,} JSON values in a row, not one list")
            values = values[0]
            if not isinstance(values, list):
                raise self.error(f"{_describe(values)}, not a list")
            if not values:
                raise self.error("an empty list")
        return [_Record(value, index, self) for index, value in enumerate(values)]


@dataclass(frozen=True, slots=True)
class _Record:
    """One record of a file, and the errors that name it."""

    value: Any
    index: int
    file: _File

    def error(self, field: str, found: str, remedy: str = "") -> UserError:
        where = f"{self.file.field}, record {self.index} (counting from 0)" + (f", {field}" if field else "")
        return UserError(where, found, remedy or f"correct it in {quoted(self.file.path, 300)}")

    def misshapen(self) -> UserError:
        """The error for a value that is no record of this dataset; it recognises those of the others."""
        value, name, other = self.value, self.file.name, ""
        if isinstance(value, dict) and "conversations" in value:
            other = "sharegpt"
        elif isinstance(value, list) and len(value) == 3 and isinstance(value[0], str):
            other = "asc24"
        remedy = f"use dataset={other} for this file" if other else f"write it as {_RECORDS[name]}"
        return self.error("", f"{_describe(value)}, not {_RECORDS[name]}", remedy)

    def text(self, field: str, value: Any) -> str:
        """Returns ``value`` if it is text that can be encoded; it may be empty."""
        if not isinstance(value, str):
            raise self.error(field, f"{_describe(value)} is not a string")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            found = f"character {error.start:,} is the lone surrogate {value[error.start]!a}"
            raise self.error(field, found) from None
        return value

    def length(self, field: str, value: Any) -> int:
        """Returns ``value`` if it is a number of tokens; true, 5.0 and "5" are not."""
        if type(value) is not int or not 1 <= value <= MAX_LENGTH:
            raise self.error(field, f"{_describe(value)} is not a whole number from 1 to {MAX_LENGTH:,}")
        return value


def _triple(record: _Record) -> Request:
    """Reads a record of ``asc24``, a list, or of ``sample``, an object with the same fields."""
    value = record.value
    if record.file.name == "sample" and isinstance(value, dict):
        value = [value.get(field) for field in ("prompt", "prompt_len", "output_len")]
    if not isinstance(value, list) or len(value) != 3:
        raise record.misshapen()
    prompt = record.text("prompt", value[0])
    if not prompt:
        raise record.error("prompt", "the string is empty")
    prompt_len = record.length("prompt_len", value[1])
    return Request(record.index, prompt, record.length("output_len", value[2]), prompt_len)


def _sharegpt(record: _Record, output_len: int | None) -> Request | None:
    """Returns the first turn as prompt and the second as reply, or None when they cannot be used."""
    if not isinstance(record.value, dict) or "conversations" not in record.value:
        raise record.misshapen()
    turns = record.value["conversations"]
    if not isinstance(turns, list):
        raise record.error("conversations", f"{_describe(turns)} is not a list")
    if len(turns) < 2:
        return None
    texts = []
    for number, turn in enumerate(turns[:2]):
        if not isinstance(turn, dict):
            raise record.error(f"conversations[{number}]", f"{_describe(turn)} is not an object")
        texts.append(record.text(f"conversations[{number}].value", turn.get("value")))
    prompt, reply = texts
    if not prompt or (output_len is None and not reply):
        return None
    return Request(record.index, prompt, output_len, reply=reply)


def _wanted(name: str) -> str:
    return f"a JSON list of {_RECORDS[name]}"


def _describe(value: Any) -> str:
    """Returns a JSON value as it can stand inside an error line, its type visible."""
    if isinstance(value, dict):
        return f"an object with the keys {quoted(list(value)[:4])}" if value else "an empty object"
    if isinstance(value, list):
        return f"a list of length {len(value):,}"
    if isinstance(value, str):
        return f"the string {quoted(value)}"
    if isinstance(value, _HugeInteger):
        return f"an integer of {value.digits:,} digits"
    return f"the float {value!r}" if isinstance(value, float) else json.dumps(value)
