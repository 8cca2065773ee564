"""Ranks that share a model and would each copy all of it into the host's memory: refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.checkpoints import save

from harness.basics.errors import UserError
from harness.config.compose import compose
from harness.engines import catalogue
from harness.models.directory import copied_from, find
from harness.models.source import Source
from harness.running import job as jobs
from harness.running import preflight

DUMMY = ["model=llama2_7b", "model.weights=dummy", "model.dtype=bfloat16", "dataset.num_samples=4"]
SEVEN = 6_738_415_616 * 2  # bytes


def prepared(monkeypatch: pytest.MonkeyPatch, free: int, *words: str) -> jobs.Job:
    catalogue.register()
    monkeypatch.setattr(preflight, "available_memory_bytes", lambda: free)
    return jobs.prepare(compose(list(words)))


@pytest.mark.parametrize("engine", [["engine=ds_inference"], ["engine=fastgen", "engine.kernels=torch"]])
def test_a_host_too_small_for_a_copy_a_rank_is_refused(monkeypatch: pytest.MonkeyPatch, engine: list[str]) -> None:
    with pytest.raises(UserError) as error:
        prepared(monkeypatch, 4 * SEVEN - 1, *DUMMY, *engine, "parallel.tp=4", "parallel.dp=1")
    assert str(error.value) == (
        "parallel.tp: 4: each of 4 ranks here loads all 12.6 GiB of weights into the host's memory before it keeps its "
        "part, 50.2 GiB together, and 50.2 GiB are free; use more hosts, or fewer ranks; preflight=false tries it all "
        "the same"
    )
    prepared(monkeypatch, 4 * SEVEN, *DUMMY, *engine, "parallel.tp=4", "parallel.dp=1")
    prepared(monkeypatch, 4 * SEVEN - 1, *DUMMY, *engine, "parallel.tp=1", "parallel.dp=1")
    prepared(monkeypatch, 4 * SEVEN - 1, *DUMMY, *engine, "parallel.tp=4", "parallel.dp=1", "preflight=false")


def test_weights_in_their_own_type_are_mapped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save(tmp_path)
    source = find(str(tmp_path), False, need_weights=True)
    assert (copied_from(source, "float32"), copied_from(source, "bfloat16")) == (None, "float32")
    assert copied_from(Source("hub", "a/b", None, None, {}, False), "float16") is None
    words = [f"model.path={tmp_path}", "engine=ds_inference", "parallel.tp=2", "parallel.dp=1"]
    with pytest.raises(UserError, match=r"^parallel.tp: 2: .*; use model.dtype=float32, in which they are stored"):
        prepared(monkeypatch, 100_000, *words, "model.dtype=bfloat16")
    with pytest.raises(UserError, match=r"^parallel: 2 ranks need"):  # what else so little memory is too small for
        prepared(monkeypatch, 100_000, *words, "model.dtype=float32")
