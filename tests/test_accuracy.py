"""harness.accuracy: perplexity and lm-eval tasks over an engine, their records, and the verdict on two of them.

The tests of the adapter run where lm-eval is installed, which the test environment leaves out for its size.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support import warm
from support.engines import expected, settings_of
from support.models import save_small_demo
from support.runs import BIN, RANDOM, ROOT, SAMPLE, TINY, assert_refused, deepspeed, variables

from harness.accuracy import __main__ as accuracy
from harness.accuracy import perplexity, record
from harness.accuracy.pool import Pool
from harness.accuracy.tasks import figures
from harness.basics.errors import UserError
from harness.config.schema import Stop
from harness.engines.fastgen.config import Kernels
from harness.engines.fastgen.engine import FastGenEngine
from harness.engines.scoring import Score, Scored

if TYPE_CHECKING:
    from harness.accuracy.lm_eval_adapter import HarnessLM

HERE = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not HERE, reason="lm-eval is not installed")
TASKS = str(ROOT / "tests" / "tasks")
Evaluate = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def evaluate(tmp_path: Path) -> Evaluate:
    """Returns a function that runs the command with results, and a cache of data sets, of its own."""

    def run(*words: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        environment = variables(HF_DATASETS_CACHE=str(tmp_path / "cache"))  # which only lm-eval's imports read
        line = [*(launcher or ("-m", "harness.accuracy")), f"results_dir={tmp_path}", *words]
        return warm.run(line, ROOT, environment, 600)

    return run


def newest(results: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the record and the lines of the evaluation that ended last."""
    path = max(results.glob("*/accuracy.json"), key=lambda path: path.stat().st_mtime_ns)
    lines = (path.parent / "scores.jsonl").read_text().splitlines()
    return json.loads(path.read_text()), [json.loads(line) for line in lines]


# --- perplexity -----------------------------------------------------------------------------------------------------


def test_what_is_scored_follows_bos_or_the_first_token() -> None:
    assert perplexity.items([[5, 6, 7]], 1) == [Scored(0, [1], [5, 6, 7])]
    assert perplexity.items([[1, 5, 6]], 1) == [Scored(0, [1], [5, 6])]  # the tokenizer has put it there
    assert perplexity.items([[5, 6, 7], [5], []], None) == [
        Scored(0, [5], [6, 7]),
        Scored(1, [5], []),
        Scored(2, [], []),
    ]


def test_perplexity_weighs_tokens_not_prompts() -> None:
    lines = perplexity.per_request(
        [Score(0, [math.log(0.5)] * 3, True), Score(1, [], False, "too long"), Score(2, [math.log(0.125)], False)]
    )
    assert lines[1] == {"index": 1, "error": "too long"}
    assert [lines[0]["perplexity"], lines[2]["perplexity"]] == pytest.approx([2, 8])
    found = perplexity.figures(lines)
    assert (found["requests"], found["scored"], found["tokens"]) == (3, 2, 4)
    assert found["perplexity"] == pytest.approx(2 ** (6 / 4))
    assert perplexity.per_request([Score(0, [-1000.0], False)])[0]["perplexity"] == math.inf
    with pytest.raises(UserError, match="none of its 1 prompts could be scored: too long"):
        perplexity.figures(lines[1:2])


@pytest.mark.slow
def test_the_samples_perplexity_is_hugging_faces(evaluate: Evaluate, tmp_path: Path, demo_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    small = save_small_demo(tmp_path / "model", demo_model)
    tokenizer = AutoTokenizer.from_pretrained(small)
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32).eval()
    prompts = [json.loads(line)["prompt"] for line in SAMPLE.read_text().splitlines()[:3]]
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    wanted = [expected(model, Scored(0, [tokenizer.bos_token_id], tokens))[0].double() for tokens in ids]
    job = [f"model.path={small}", "model.dtype=float32", "dataset.num_samples=3"]
    done = evaluate(*job)
    assert done.returncode == 0, done.stderr
    made, lines = newest(tmp_path)
    assert [line["tokens"] for line in lines] == [len(tokens) for tokens in ids]
    for line, logprobs in zip(lines, wanted, strict=True):
        assert line["logprob"] == pytest.approx(logprobs.sum().item(), abs=1e-4 * len(logprobs))
        assert line["perplexity"] == pytest.approx(math.exp(-logprobs.mean()), rel=1e-4)
    found = made["perplexity"]
    assert found["perplexity"] == pytest.approx(math.exp(-torch.cat(wanted).mean()), rel=1e-4)
    assert found["tokens"] == sum(map(len, ids))
    assert f"Perplexity  {found['perplexity']:.4f} over" in done.stdout
    assert (made["engine"], made["dtype"], made["quantization"]) == ("fastgen", "float32", None)
    assert {"torch", "transformers"} <= made["environment"]["packages"].keys()
    done = evaluate(*job, "--prefill", "--against", made["run_id"])
    assert done.returncode == 0, done.stderr
    assert "ratio 1.0000" in done.stdout and "prefill: False -> True" in done.stdout


@pytest.mark.slow
def test_ranks_share_a_model_and_the_prompts(evaluate: Evaluate, tmp_path: Path) -> None:
    """On its own, sharded by fastgen, and two static replicas under deepspeed: the same scores."""
    job = [*TINY, *RANDOM, "dataset.num_samples=7", "dataset.input_len=20", "dataset.output_len=1"]
    done = evaluate(*job, "engine.kernels=torch")
    assert done.returncode == 0, done.stderr
    first, lines = newest(tmp_path)
    # The tokenizer of made-up weights has a BOS, which stands before each prompt of 20 ids.
    assert first["perplexity"]["tokens"] == 7 * 20
    command = ["harness/accuracy/__main__.py"]
    for words, launcher in [
        (["parallel.tp=2"], ()),
        (["engine=ds_inference", "parallel.dp=2", "engine.batch_size=3"], (*deepspeed(2), *command)),
    ]:
        done = evaluate(*job, *words, "--against", first["run_id"], "--within", "0.001", launcher=launcher)
        assert done.returncode == 0, done.stderr
        assert "ratio 1.0000" in done.stdout
        made, others = newest(tmp_path)
        assert made["run_id"] != first["run_id"]
        for line, other in zip(lines, others, strict=True):
            assert (other["index"], other["tokens"]) == (line["index"], line["tokens"])
            assert other["logprob"] == pytest.approx(line["logprob"], abs=1e-3)
    path = tmp_path / first["run_id"] / "accuracy.json"
    first["perplexity"]["perplexity"] *= 0.98
    path.write_text(json.dumps(first))
    done = evaluate(*job, "engine=baseline", "--against", first["run_id"])
    assert done.returncode == 1, done.stderr
    assert "ratio 1.0204 (+2.04%): worse than allowed" in done.stdout
    assert "engine.name: fastgen -> baseline" in done.stdout


@pytest.mark.slow
def test_a_run_that_ends_early_says_why(evaluate: Evaluate) -> None:
    job = [*TINY, *RANDOM, "dataset.num_samples=3", "dataset.output_len=1"]
    done = evaluate(*job, "dataset.input_len=5000")
    assert_last(done, 2, "error: dataset: none of its 3 prompts could be scored: its 5000 tokens exceed")
    done = evaluate(*job, "dataset.input_len=50", "parallel.dp=2", "engine=baseline", "timeout_s=0.2")
    assert_last(done, 1, "not finished after timeout_s=0.2")


def assert_last(done: subprocess.CompletedProcess[str], status: int, line: str) -> None:
    assert done.returncode == status, done.stderr
    assert line in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["engine=mii"], "error: engine: mii needs CUDA"),
        (["engine=simulate"], "error: engine: simulate cannot score given tokens"),
        (["--limit", "5"], "error: --limit: means nothing without --tasks"),
        (["--within", "1"], "error: --within: means nothing without --against"),
        (["--against", "x", "--within", "-1"], "error: command line: argument --within: '-1' is not a number"),
        (["--against", "nowhere"], "error: --against: no evaluation 'nowhere' in "),
        (["--tasks", "a,,b"], "error: --tasks: 'a,,b' names no task in one place"),
        (["repeat=2"], "error: repeat: 2: scores do not vary"),
        (["engine.tokenbudget=3"], "error: engine.tokenbudget: no such key; did you mean engine.token_budget?"),
        (["engine=nothing"], "error: engine: no option named 'nothing'"),
        (["-m", "parallel.dp=1,2"], "error: command line: "),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(
    words: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert accuracy.main([f"results_dir={tmp_path}", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(line) and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(HERE, reason="lm-eval is installed")
def test_tasks_need_lm_eval(evaluate: Evaluate) -> None:
    assert_refused(evaluate("--tasks", "mmlu"), "error: --tasks: lm-eval is not installed; pip install")


# --- records and verdicts -------------------------------------------------------------------------------------------

PERPLEXITY: dict[str, Any] = {
    "run_id": "one",
    "tasks": None,
    "perplexity": {"fingerprint": "f", "scored": 3, "tokens": 9, "perplexity": 10.0},
}
CHOICES: dict[str, Any] = {
    "run_id": "two",
    "perplexity": None,
    "tasks": {
        "quiz": {
            **{"version": 1, "n_shot": 5, "samples": 200, "subtask": False, "hash": "h"},
            "metrics": {"acc,none": 0.5, "word_perplexity,none": 30.0},
            "scores": ["acc,none"],
        },
        "part": {
            **{"version": 1, "n_shot": 5, "samples": 20, "subtask": True, "hash": "p"},
            **{"metrics": {"acc,none": 0.5}, "scores": ["acc,none"]},
        },
    },
}


@pytest.mark.parametrize(
    ("ours", "worse"), [(10.0, False), (9.0, False), (10.15, False), (10.16, True), (None, True), (math.nan, True)]
)
def test_a_perplexity_may_be_so_many_percent_higher(ours: float | None, worse: bool) -> None:
    made = copy.deepcopy(PERPLEXITY)
    made["perplexity"]["perplexity"] = ours
    (difference,) = record.differences(made, PERPLEXITY, 1.5)
    assert difference.worse is worse


@pytest.mark.parametrize(("ours", "worse"), [(0.5, False), (0.9, False), (0.485, False), (0.4849, True)])
def test_a_score_may_be_so_many_points_lower(ours: float, worse: bool) -> None:
    made = copy.deepcopy(CHOICES)
    made["tasks"]["quiz"]["metrics"] = {"acc,none": ours, "word_perplexity,none": 99.0}
    made["tasks"]["part"]["metrics"] = {"acc,none": 0.0}  # the group's score counts, not each part's
    (difference,) = record.differences(made, CHOICES, 1.5)
    assert (difference.name, difference.worse) == ("quiz acc,none", worse)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"n_shot": 0}, "quiz is of version 1, n_shot 0, samples 200, and two has version 1, n_shot 5, samples 200"),
        ({"samples": 100}, "samples 100, and two has"),
        ({"version": 2}, "version 2, n_shot 5"),
        ({"hash": "other"}, "quiz asked other questions in two"),
        ({"scores": []}, "quiz has no score from 0 to 1"),
    ],
)
def test_other_questions_are_not_compared(change: dict[str, Any], line: str) -> None:
    made = copy.deepcopy(CHOICES)
    made["tasks"]["quiz"] |= change
    with pytest.raises(UserError, match=line):
        record.differences(made, CHOICES, 1.5)


def test_other_tokens_are_not_compared(tmp_path: Path) -> None:
    made = copy.deepcopy(PERPLEXITY)
    made["perplexity"] |= {"fingerprint": "g", "tokens": 8}
    with pytest.raises(UserError, match=r"one is of 3 prompts and 9 tokens, this one of 3 and 8, or of others"):
        record.differences(made, PERPLEXITY, 1.5)
    with pytest.raises(UserError, match="two is of tasks, not of perplexity; add --tasks quiz,part"):
        record.check_comparable(None, CHOICES)
    with pytest.raises(UserError, match="one is of perplexity, not of tasks"):
        record.check_comparable(["quiz"], PERPLEXITY)
    with pytest.raises(UserError, match="two has no task riddle; it has quiz, part"):
        record.check_comparable(["riddle"], CHOICES)
    record.check_comparable(["quiz", "quiz_*"], CHOICES)
    (tmp_path / "record.json").write_text('{"status": "ok"}')
    with pytest.raises(UserError, match=r"record\.json is not the record of an evaluation"):
        record.read(str(tmp_path), str(tmp_path / "record.json"))


def test_settings_that_differ_are_named() -> None:
    ours = {"config": {"engine": {"name": "fastgen", "quantization": "wf6af16"}, "results_dir": "a"}, "kernels": "a"}
    theirs = {"config": {"engine": {"name": "fastgen", "quantization": None}, "results_dir": "b"}, "kernels": "a"}
    assert record.settings_that_differ(ours, theirs) == ["engine.quantization: None -> wf6af16"]


def test_groups_are_told_from_their_parts() -> None:
    found = {
        "results": {
            "group": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "group"},
            "part": {"acc,none": 0.5, "ppl,none": 3.0, "acc_stderr,none": "N/A", "sample_len": 2},
            "empty": {"alias": "empty", " ": " "},
        },
        "group_subtasks": {"group": ["part"], "empty": []},
        "higher_is_better": {"group": {"acc": True}, "part": {"acc": True, "ppl": False}},
        "versions": {"part": 1.0},
        "n-shot": {"part": 5},
        "n-samples": {"part": {"original": 9, "effective": 2}},
        "samples": {"part": [{"doc_id": n, "doc_hash": "d", "prompt_hash": "p", "target_hash": "t"} for n in (1, 0)]},
    }
    tasks = figures(found)
    assert tasks.keys() == {"group", "part"}
    assert (tasks["group"]["subtask"], tasks["part"]["subtask"]) == (False, True)
    assert tasks["group"]["stderr"] == {"acc,none": 0.1} and tasks["part"]["stderr"] == {}
    assert tasks["part"]["scores"] == ["acc,none"]
    assert tasks["part"]["samples"] == 2 and tasks["group"]["hash"] is None
    found["samples"]["part"].reverse()  # type: ignore[attr-defined]
    assert figures(found)["part"]["hash"] == tasks["part"]["hash"]
    found["samples"]["part"][0]["prompt_hash"] = "q"  # type: ignore[index]
    assert figures(found)["part"]["hash"] != tasks["part"]["hash"]


# --- lm-evaluation-harness ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cpu_model(demo_model: Path) -> Callable[..., HarnessLM]:
    """Returns a function that makes an lm-eval model over PyTorch's kernels in float32."""
    from harness.accuracy.lm_eval_adapter import HarnessLM

    def make(max_context: int = 512, **keys: Any) -> HarnessLM:
        from dataclasses import replace

        chosen = settings_of(demo_model, kernels=Kernels.torch, stop=Stop.eos, **keys)
        engine = FastGenEngine(replace(chosen, max_context=max_context))
        engine.load()
        return HarnessLM(Pool(engine))

    return make


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


@needs_lm_eval
@pytest.mark.parametrize("max_context", [512, 24])
def test_the_adapter_answers_as_lm_evals_own_hf_model(
    cpu_model: Callable[..., HarnessLM], demo_model: Path, max_context: int
) -> None:
    """With room for everything, and where contexts have to be cut and texts go through windows."""
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(demo_model), dtype="float32", batch_size=1, device="cpu", max_length=max_context)
    ours = cpu_model(max_context)
    text = "The quick brown fox jumps over the lazy dog, and then, as every evening, it returns home to its den. " * 2
    pairs = [
        *((text[:30] + " The capital of France is", choice) for choice in (" Paris", " Rome", " a large town")),
        ("", "Once upon a time"),
        (text, " den"),
        ("Trailing space ", "word"),
        ("<|im_start|>user\nHello", " there"),
    ]
    for our, their in zip(
        ours.loglikelihood(asked("loglikelihood", *pairs)),
        theirs.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True),
        strict=True,
    ):
        assert our[0] == pytest.approx(their[0], abs=1e-3)
        assert our[1] == their[1]
    assert ours.truncated == (1 if max_context == 24 else 0)
    rolling = [("A short one.",), (text,)]
    assert ours.loglikelihood_rolling(asked("loglikelihood_rolling", *rolling)) == pytest.approx(
        theirs.loglikelihood_rolling(asked("loglikelihood_rolling", *rolling), disable_tqdm=True), abs=1e-3
    )
    questions = [
        ("The capital of France is", {"until": ["\n", "."], "max_gen_toks": 12}),
        ("One, two, three,", {"until": [" six"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}),
        (text, {"until": "\n\n", "max_new_tokens": 10}),
    ]
    answers = ours.generate_until(asked("generate_until", *questions))
    assert answers == theirs.generate_until(asked("generate_until", *questions), disable_tqdm=True)
    assert "six" not in answers[1] and "four" in answers[1]


@needs_lm_eval
def test_sampling_is_refused(cpu_model: Callable[..., HarnessLM]) -> None:
    from harness.accuracy.lm_eval_adapter import MAX_GEN_TOKS, generation_arguments

    assert generation_arguments({}) == ([], MAX_GEN_TOKS)
    assert generation_arguments({"until": "x", "max_gen_toks": 3, "max_tokens": 9, "temperature": 0}) == (["x"], 3)
    assert generation_arguments({"do_sample": False, "temperature": 0.7}) == ([], MAX_GEN_TOKS)
    for arguments in ({"do_sample": True}, {"temperature": 0.7}, {"top_p": 0.9}, {"num_beams": 4}):
        with pytest.raises(UserError, match=r"^generation_kwargs: \{.*\}: the engines decode greedily"):
            generation_arguments(arguments)
    small = cpu_model(kv_memory="1MiB", kv_block_size=16)
    with pytest.raises(UserError, match=r"a continuation cannot be scored: .*KV blocks"):
        small.loglikelihood(asked("loglikelihood", ("word " * 400, "more")))


@pytest.mark.slow
@needs_lm_eval
def test_a_task_from_local_files_end_to_end(
    evaluate: Evaluate, tmp_path: Path, demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same accuracy and log-likelihoods as lm-eval's own command over its own model."""
    limited = ["--tasks", "facts", "--include-path", TASKS, "--limit", "8"]
    done = evaluate(*limited, "model.dtype=float32")
    assert done.returncode == 0, done.stderr
    made, lines = newest(tmp_path)
    output = tmp_path / "theirs"
    own = subprocess.run(
        [
            *(str(BIN / "lm_eval"), "run", "--model", "hf", "--model_args", f"pretrained={demo_model},dtype=float32"),
            *("--tasks", "facts", "--include_path", TASKS, "--limit", "8", "--device", "cpu", "--batch_size", "1"),
            *("--log_samples", "--output_path", str(output)),
        ],
        cwd=ROOT,
        env=variables(HF_DATASETS_CACHE=str(tmp_path / "cache"), HF_DATASETS_OFFLINE="1"),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert own.returncode == 0, own.stderr
    theirs = json.loads(next(output.rglob("results_*.json")).read_text())["results"]
    for name in ("facts", "facts_choice", "facts_answer"):
        for metric, value in made["tasks"][name]["metrics"].items():
            assert value == pytest.approx(theirs[name][metric], abs=1e-9)
    samples = [json.loads(line) for line in next(output.rglob("samples_facts_choice*")).read_text().splitlines()]
    answers = {line["doc_id"]: line for line in lines if line["task"] == "facts_choice"}
    assert len(samples) == len(answers) == 8
    for sample in samples:
        for (theirs_is, greedy), (ours_is, same) in zip(
            sample["filtered_resps"], answers[sample["doc_id"]]["filtered_resps"], strict=True
        ):
            assert float(theirs_is) == pytest.approx(ours_is, abs=1e-3)
            assert same is (str(greedy) == "True")
    again = evaluate(*limited, "engine=ds_inference", "parallel.dp=2", "--against", made["run_id"], "--within", "30")
    assert again.returncode == 0, again.stderr
    assert "facts acc,none" in again.stdout and "facts_choice acc,none:" not in again.stdout


@pytest.mark.slow
@needs_lm_eval
def test_what_is_not_on_this_machine_is_not_fetched(evaluate: Evaluate, tmp_path: Path) -> None:
    (tmp_path / "far.yaml").write_text(
        "task: far\ndataset_path: nobody/nothing\ntest_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: question\ndoc_to_choice: choices\ndoc_to_target: gold\nmetric_list:\n  - metric: acc\n"
    )
    done = evaluate("--tasks", "far", "--include-path", str(tmp_path))
    assert_last(done, 2, "error: --tasks: ")
    assert "a task's data must be on this machine" in done.stderr
    assert_last(
        evaluate("--tasks", "neer", "--include-path", str(tmp_path)), 2, "error: --tasks: there is no task neer"
    )
