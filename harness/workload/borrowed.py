"""The lengths that a key of ``conf/dataset`` asks for, one after the other, a file's own among them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import cycle, repeat

from harness.basics.errors import UserError
from harness.config.schema import DatasetConfig
from harness.workload import catalogue, lengths, recognition
from harness.workload.json_file import JsonFile
from harness.workload.lengths import Length
from harness.workload.records import MAX_LENGTH

DATASETS = ("parquet", "huggingface")  # what need not be read as text
_NUMBER = re.compile(rb"[0-9]+")
_NUMBERS = re.compile(rb"[\s\[]*[0-9]+(?:[\s,]+[0-9]+)*[\s\]]*")


def asked(dataset: DatasetConfig, key: str) -> tuple[Iterator[Length], str | None]:
    """Returns the lengths that ``dataset`` asks for by ``key``, without end, and the SHA-256 of their file if any.

    Args:
        key: ``input_len`` or ``output_len``, which is given.

    Raises:
        UserError: the value is no length, or its file has none.
    """
    found = lengths.parse(f"dataset.{key}", getattr(dataset, key))
    if isinstance(found, int):
        return repeat(Length(found)), None
    if isinstance(found, lengths.Spread):
        return map(Length, found.lengths(dataset.seed, key)), None
    of_file, sha256 = _of_file(key, os.path.expanduser(found.path))
    return cycle(of_file), sha256


def drawn(dataset: DatasetConfig) -> tuple[str, ...]:
    """Returns which of ``input_len`` and ``output_len`` are other than one number."""
    return tuple(key for key in ("input_len", "output_len") if isinstance(getattr(dataset, key), str))


def _of_file(key: str, path: str) -> tuple[list[Length], str | None]:
    """Returns the lengths that a file has, and its SHA-256: bare numbers, or those of a dataset's requests."""
    field = f"dataset.{key}"
    file = JsonFile(path, field, "a number", "give a dataset, or a file with a number of tokens a line")
    known = recognition.option_of(path)
    if known is None or known.option not in DATASETS:
        data, sha256 = file.read()
        if _NUMBERS.fullmatch(data):
            return [Length(number) for number in _numbers(file, data)], sha256
    if known is None:
        raise file.error("neither a dataset whose format is known, nor bare numbers")
    try:
        work = catalogue.find(known.option).read(DatasetConfig(name=known.option, path=path))
    except UserError as error:
        of_path = error.field.startswith("dataset.path")
        place = error.field.removeprefix("dataset.path") if of_path else ""
        raise UserError(f"{field}{place}", error.found, error.remedy if of_path else file.remedy) from error
    if key == "input_len":
        return [Length(one.claimed_prompt_len, one.prompt) for one in work.requests], work.sha256
    found = [Length(one.output_len, one.reply) for one in work.requests if one.output_len or one.reply]
    if not found:
        raise file.error(f"no request brings a length of its output, read as dataset={known.option}")
    return found, work.sha256


def _numbers(file: JsonFile, data: bytes) -> list[int]:
    numbers = [int(word[:20]) for word in _NUMBER.findall(data)]
    wrong = next((number for number in numbers if not 1 <= number <= MAX_LENGTH), None)
    if wrong is not None:
        raise file.error(f"{wrong:,} is not a whole number from 1 to {MAX_LENGTH:,}")
    return numbers
