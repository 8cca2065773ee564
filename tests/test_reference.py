"""The measure of tokens: Hugging Face's ``generate`` for one request alone, also where its passes are not alone."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import LONGROPE, SIZES, save_model
from support.runs import Run, begun, command

from harness.config.schema import GenerationConfig, Stop
from harness.models import reference as references
from harness.models.architecture import rotary_threshold
from harness.models.directory import find
from harness.models.judging import BOUNDS, Scores
from harness.models.reference import Answer, Reference, forced_logits
from harness.models.source import Source

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama/longrope": {"rope_parameters": LONGROPE, "max_position_embeddings": 128},
    "phi3/longrope": {
        "rope_parameters": LONGROPE,
        "max_position_embeddings": 128,
        "original_max_position_embeddings": 32,
        "head_dim": None,
    },
}


@pytest.fixture(params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    sizes = {key: value for key, value in (SIZES | FAMILIES[request.param]).items() if value is not None}
    save_model(tmp_path / "model", request.param.partition("/")[0], torch.float32, sharp=2.0, **sizes)
    return find(str(tmp_path / "model"), False, need_weights=True)


def answers(reference: Reference) -> list[Answer]:
    """Returns what ``generate`` makes of prompts that end before, at and after the threshold, or cross it."""
    rng = random.Random(5)
    prompts = [[rng.randrange(300) for _ in range(length)] for length in (3, 20, 24, 28, 31, 32, 33, 40, 90)]
    return [Answer(index, prompt, reference.generate(prompt, 10)) for index, prompt in enumerate(prompts)]


def test_what_generate_gives_alone_is_exact(source: Source) -> None:
    reference = Reference(source, "float32", GenerationConfig(stop=Stop.length), "cpu")
    for answer, scores in zip(found := answers(reference), reference.scores(found), strict=True):
        assert len(scores.gaps) == 10
        assert max(scores.gaps) <= BOUNDS["float32"], (answer.index, scores.gaps)


def test_what_a_longer_neighbour_has_changed_is_wrong(tmp_path: Path) -> None:
    """Short prompts, padded beyond the threshold as a batch with a long one would be: other frequencies."""
    save_model(tmp_path, "llama", torch.float32, sharp=2.0, **SIZES | FAMILIES["llama/longrope"])
    source = find(str(tmp_path), False, need_weights=True)
    reference = Reference(source, "float32", GenerationConfig(stop=Stop.length), "cpu")
    wrong = 0
    for answer in answers(reference)[:4]:
        ids: list[int] = []
        with torch.inference_mode():
            for _ in range(3):
                row = [*answer.prompt, *ids]
                padded = torch.tensor([row + [0] * (60 - len(row))])
                ids.append(int(reference.model(padded, use_cache=False).logits[0, len(row) - 1].argmax()))
        (scores,) = reference.scores([Answer(answer.index, answer.prompt, ids)])
        wrong += max(scores.gaps) > BOUNDS["float32"]
    assert wrong >= 3


def test_a_pass_that_is_not_what_each_is_alone_is_not_taken(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rule knows of this model: the shortest answer of the batch, computed alone, tells."""
    reference = Reference(source, "float32", GenerationConfig(stop=Stop.length), "cpu")
    found = [answer for answer in answers(reference) if len(answer.prompt) < 20 or reference.threshold is None]
    whole = Reference._together

    def shifted(self: Reference, answers: list[Answer]) -> list[Scores]:
        return [Scores([gap + 0.5 for gap in one.gaps], one.best, one.spread) for one in whole(self, answers)]

    monkeypatch.setattr(Reference, "_together", shifted)
    assert all(max(scores.gaps) <= BOUNDS["float32"] for scores in reference.scores(found))


def test_forced_logits_are_those_of_a_whole_pass(source: Source) -> None:
    reference = Reference(source, "float32", GenerationConfig(stop=Stop.length), "cpu")
    prompt, ids = list(range(10, 22)), [7, 8, 9]
    with torch.inference_mode():
        whole = reference.model(torch.tensor([prompt + ids[:-1]]), use_cache=False).logits[0, -3:]
    torch.testing.assert_close(forced_logits(reference.model, prompt, ids), whole, atol=1e-4, rtol=1e-4)


def test_ids_that_the_model_does_not_have_are_infinitely_wrong_alone_too(source: Source) -> None:
    reference = Reference(source, "float32", GenerationConfig(stop=Stop.length), "cpu")
    prompt = [5] * 30
    right = reference.generate(prompt, 4)
    (scores,) = reference.scores([Answer(0, prompt, [*right[:2], 4000, 1])])
    assert scores.gaps[2:] == [float("inf")] and len(scores.best) == 3
    assert max(scores.gaps[:2]) <= BOUNDS["float32"]


@pytest.mark.parametrize(
    ("architecture", "threshold"),
    [
        ({}, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "max_position_embeddings": 64}, None),
        ({"rope_parameters": {"rope_type": "llama3", "original_max_position_embeddings": 32}}, None),
        ({"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 4096}, 4096),
        ({"rope_parameters": LONGROPE, "max_position_embeddings": 128}, 32),
        ({"rope_parameters": {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default"}}}, 32),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64}, 64),
    ],
)
def test_where_rotary_frequencies_change(architecture: dict[str, Any], threshold: int | None) -> None:
    assert rotary_threshold(architecture) == threshold


def test_reference_counts_small_batches(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small passes give what few large ones give."""
    reference = Reference(source, "float32", GenerationConfig(stop=Stop.length), "cpu")
    found = answers(reference)
    large = [scores.gaps for scores in reference.scores(found)]
    monkeypatch.setattr(references, "PASS_TOKENS", {"cpu": 60})
    steps: list[tuple[int, int]] = []
    small = [scores.gaps for scores in reference.scores(found, lambda done, of: steps.append((done, of)))]
    assert steps[-1] == (len(found), len(found)) and len(steps) > 3
    for one, other in zip(large, small, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.slow
def test_a_run_that_was_to_be_checked_and_was_not_is_not_ok(
    harness: Callable[..., Run], tmp_path: Path, demo_model: Path
) -> None:
    """The checkpoint is gone when the reference wants it; once it is back, ``resume`` makes up for the check."""
    model, results = tmp_path / "model", tmp_path / "results"
    model.mkdir()
    for path in demo_model.iterdir():
        (model / path.name).symlink_to(path)
    words = [f"model.path={model}", "dataset.num_samples=4", "generation.max_output_len=6", "verify=2"]
    with open(tmp_path / "output", "w") as output:
        line = command(*words, f"results_dir={results}")
        process = begun(line, forked=True, stdout=output, stderr=output)
        while process.poll() is None and "running 4 requests" not in (tmp_path / "output").read_text():
            time.sleep(0.02)
        (model / "model.safetensors").unlink()
        status = process.wait(timeout=300)
    run = Run(status, "", (tmp_path / "output").read_text(), results)
    assert status == 1, run.stderr
    assert (run.row["status"], run.row["completed"], run.row["parity_checked"]) == ("failed", "4", "")
    assert (run.row["parity_exact_share"], run.row["parity_explained_share"]) == ("", "")
    assert run.row["error"].startswith("verify=2: nothing was checked: ")
    assert run.row["error"] in run.stderr and "Traceback" not in run.stderr
    shutil.copy(demo_model / "model.safetensors", model / "model.safetensors")
    ids = run.token_ids
    again = harness(f"resume={run.row['run_id']}", results=results)
    assert again.status == 0, again.stderr
    assert (again.row["status"], again.row["parity_checked"]) == ("ok", "2")
    assert again.token_ids == ids
