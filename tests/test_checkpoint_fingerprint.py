"""One checkpoint told from another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from harness.models.fingerprint import HEAD_BYTES, SAMPLE_BYTES, fingerprint
from harness.models.source import Source


@pytest.fixture
def source(tmp_path: Path) -> Source:
    (tmp_path / "model.safetensors").write_bytes(bytes(HEAD_BYTES + 100 * SAMPLE_BYTES))
    return Source("directory", str(tmp_path), None, None, {"model_type": "llama"}, False)


def test_the_same_files_have_the_same_fingerprint(source: Source) -> None:
    assert fingerprint(source) == fingerprint(replace(source, tokenizer="elsewhere"))


@pytest.mark.parametrize("place", [0, HEAD_BYTES - 1, HEAD_BYTES + 99 * SAMPLE_BYTES, HEAD_BYTES + 100 * SAMPLE_BYTES])
def test_another_byte_is_another_fingerprint(source: Source, place: int) -> None:
    before = fingerprint(source)
    path = Path(str(source.path)) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[place : place + 1] = b"x"
    path.write_bytes(data)
    assert fingerprint(source) != before


def test_another_config_or_kind_is_another_fingerprint(source: Source) -> None:
    found = {
        fingerprint(each)
        for each in (source, replace(source, architecture={}), replace(source, kind="dummy", architecture={}))
    }
    assert len(found) == 3


def test_a_hub_id_has_none(source: Source) -> None:
    assert fingerprint(replace(source, kind="hub")) is None
