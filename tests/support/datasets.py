"""Dataset files, and what is asked of their readers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.basics.errors import UserError
from harness.config.schema import DatasetConfig, GenerationConfig
from harness.workload.reading import read
from harness.workload.records import Workload

TRIPLES: list[list[Any]] = [
    ["Hello, world", 4, 10],
    ["안녕하세요", 7, 3],
    [" ", 2, 1],
    ["nul \x00 inside", 5, 1_000_000],
]
NO_CAP = GenerationConfig()


def chat(*values: Any) -> dict[str, Any]:
    """A ShareGPT conversation."""
    return {"id": "x", "conversations": [{"from": "human", "value": value} for value in values]}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes bytes, text or a JSON value to a file and returns its path."""

    def write(content: Any, name: str = "data.json") -> str:
        if not isinstance(content, bytes):
            content = (content if isinstance(content, str) else json.dumps(content)).encode()
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return write


def refusal(name: str, path: str | None = None, **keys: Any) -> str:
    """Reads a dataset that must be refused and returns the error line."""
    with pytest.raises(UserError) as caught:
        read(DatasetConfig(name=name, path=path, **keys))
    line = str(caught.value)
    assert "\n" not in line
    return line


def assert_valid(loaded: Workload) -> None:
    """Checks what every resolved workload promises."""
    assert loaded.requests
    for index, request in enumerate(loaded.requests):
        assert request.index == index
        assert type(request.output_len) is int and request.output_len >= 1
        assert (request.prompt == "") == (request.prompt_ids is not None)
        request.prompt.encode()
        claimed = request.claimed_prompt_len
        assert claimed is None or (type(claimed) is int and 1 <= claimed <= 1_000_000)
