"""``python -m harness.verify`` and ``verify=N``: real runs, then the same runs with something wrong in them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.models import save_model, save_small_demo
from support.runs import ROOT, Run, assert_refused, python, ran

from harness.basics.errors import UserError
from harness.basics.files import yaml_bytes
from harness.config.identity import config_hash
from harness.config.schema import GenerationConfig, ModelConfig
from harness.models.judging import Scores, bound_for, judge
from harness.results.columns import COLUMNS
from harness.results.completions import Tally, read_completions
from harness.results.table import put_row, read_rows
from harness.verify import __main__ as verify

REQUESTS, CAP = 6, 8
WORK = [f"dataset.num_samples={REQUESTS}", f"generation.max_output_len={CAP}", "model.dtype=float32"]

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}

Lines = list[dict[str, Any]]
Shown = tuple[int, str, str]


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    """Returns a model that is loaded at once: most of these tests load it."""
    return save_small_demo(tmp_path_factory.mktemp("small") / "model", demo_model)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Run:
    """Returns a run whose own check found all its outputs exact."""
    run = ran(tmp_path_factory.mktemp("verify") / "results", *WORK, f"model.path={small_model}", "verify=4")
    assert run.status == 0, run.stderr
    return run


@pytest.fixture
def copies(honest: Run, tmp_path: Path) -> Path:
    """Returns a results directory with the honest run twice: under its own id, and as ``other``."""
    results = tmp_path / "results"
    shutil.copytree(honest.results, results)
    shutil.copytree(honest.directory, results / "other")
    record = json.loads((results / "other" / "record.json").read_text())
    (results / "other" / "record.json").write_text(json.dumps(record | {"run_id": "other"}))
    header, row = (results / "runs.csv").read_text().splitlines()
    (results / "runs.csv").write_text("\n".join([header, row, row.replace(honest.row["run_id"], "other")]) + "\n")
    return results


@pytest.fixture
def shown(copies: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Shown]:
    """Returns a function that runs the command in this process and returns status, output and error output."""

    def run(*arguments: str) -> Shown:
        status = verify.main([*arguments, "--results", str(copies)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def edit(results: Path, change: Callable[[Lines], None], **record: Any) -> None:
    """Changes the lines of ``other``, and what its record says."""
    directory = results / "other"
    lines = read_completions(directory / "completions.jsonl")
    change(lines)
    (directory / "completions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = json.loads((directory / "record.json").read_text())
    (directory / "record.json").write_text(json.dumps(found | record))


def test_a_run_that_checks_itself(honest: Run) -> None:
    row, parity = honest.row, honest.record["parity"]
    assert (row["status"], row["parity_checked"]) == ("ok", "4")
    assert (float(row["parity_exact_share"]), float(row["parity_explained_share"])) == (1.0, 0.0)
    assert (parity["checked"], parity["exact"], parity["near_tie"], parity["wrong"]) == (4, 4, 0, 0)
    assert parity["reference"] == {"model": "Hugging Face generate", "dtype": "float32", "device": "cpu"}
    chosen = [one["index"] for one in parity["requests"]]
    assert chosen == sorted(set(chosen)) and set(chosen) <= set(range(REQUESTS))
    (tokens,) = (line for line in honest.stdout.splitlines() if line.strip().startswith("Tokens"))
    assert f"4 of {REQUESTS} outputs checked against Hugging Face float32: 4 exact" in " ".join(tokens.split())


@pytest.mark.slow
def test_two_replicas_check_what_both_of_them_wrote(harness: Callable[..., Run]) -> None:
    run = harness(*WORK, "parallel.dp=2", f"verify={REQUESTS + 5}")
    assert run.status == 0, run.stderr
    assert (run.row["parity_checked"], run.row["parity_exact_share"]) == (str(REQUESTS), "1")
    assert verify.main([str(run.directory)]) == 0


def test_an_honest_run_is_right(honest: Run, shown: Callable[..., Shown]) -> None:
    status, out, err = shown(honest.row["run_id"])
    assert (status, err) == (0, "")
    tokens = sum(len(ids) for ids in honest.token_ids.values())
    assert out.startswith(f"right: {REQUESTS} requests completed with")
    assert f"+ {tokens} output tokens, as recorded; the tokens themselves were not compared" in out


def test_the_model_agrees_with_an_honest_run(honest: Run, shown: Callable[..., Shown]) -> None:
    status, out, _ = shown(honest.row["run_id"], "--model", "--json")
    found = json.loads(out)
    assert (status, found["right"], found["exact"], found["compared"]) == (0, True, REQUESTS, REQUESTS)
    tokens = sum(len(ids) for ids in honest.token_ids.values())
    assert (found["tokens_judged"], found["tokens_that_are_the_best"]) == (tokens, tokens)
    assert found["runs"][0]["output_tokens"] == tokens
    status, out, _ = shown(honest.row["run_id"], "--model", "--samples", "2")
    assert status == 0 and "2 of 2 requests exact" in out and f"2 of {REQUESTS} requests were judged" in out


def test_as_a_user_types_it(copies: Path) -> None:
    line = ["-m", "harness.verify", "other", "--against", "fastgen", "--results", str(copies)]
    done = python(*line)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"right: {REQUESTS} of {REQUESTS} requests exact\n")
    edit(copies, lambda lines: lines.pop())
    done = python(*line)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("wrong: ")


def drop_token(lines: Lines) -> None:
    full = next(line for line in lines if line["finish_reason"] == "length")
    del full["token_ids"][3]


def drop_token_and_count(lines: Lines) -> None:
    drop_token(lines)
    for line in lines:
        line["output_tokens"] = len(line["token_ids"])


def count_padding(lines: Lines) -> None:
    for line in lines:
        line["prompt_tokens"] = 64


def too_long(lines: Lines) -> None:
    full = next(line for line in lines if line["finish_reason"] == "length")
    full["token_ids"] += [5]
    full["output_tokens"] += 1


def before_its_time(lines: Lines) -> None:
    lines[1]["first_token_s"] = lines[1]["finished_s"] + 1


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda lines: lines.pop(), "did not come back, though the run is ok (1 missing in all)"),
        (lambda lines: lines.append(lines[0]), "completed 2 times"),
        (lambda lines: lines[0].update(index=REQUESTS), f"there is no such request: the run has {REQUESTS}"),
        (drop_token, f"output_tokens is {CAP}, but there are {CAP - 1} token ids"),
        (drop_token_and_count, f"finished with length after {CAP - 1} tokens, but its output_len is {CAP}"),
        (count_padding, "record.json says prompt_tokens"),
        (too_long, f"finished with length after {CAP + 1} tokens, but its output_len is {CAP}"),
        (lambda lines: lines[3].update(finish_reason="tired"), "finish_reason 'tired' is neither"),
        (lambda lines: lines[3].update(finish_reason="rejected"), "rejected, but counts"),
        (lambda lines: lines[3]["token_ids"].__setitem__(0, -1), "token id -1 is outside the vocabulary"),
        (before_its_time, "its first token came after"),
    ],
)
def test_lines_that_do_not_add_up(
    copies: Path, shown: Callable[..., Shown], change: Callable[[Lines], None], found: str
) -> None:
    edit(copies, change)
    status, out, err = shown("other", "--json")
    assert (status, err) == (1, "")
    findings = [one["found"] for one in json.loads(out)["runs"][0]["findings"]]
    assert any(text.startswith(found) for text in findings), findings
    status, out, _ = shown("other")
    assert status == 1 and out.startswith("wrong: it does not add up: ")


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"total_tokens": 7}, "record.json says total_tokens 7, the completions have"),
        ({"completed": 5}, f"record.json says completed 5, the completions have {REQUESTS}"),
        ({"requests": 7}, f"record.json says 7 requests, the dataset gives {REQUESTS}"),
        ({"total_tokens_per_s": 1e6}, "record.json says total_tokens_per_s 1000000.0, which is not"),
        ({"status": "failed"}, "runs.csv says status ok, record.json failed"),
    ],
)
def test_a_record_that_says_other_than_its_lines(
    copies: Path, shown: Callable[..., Shown], record: dict[str, Any], found: str
) -> None:
    edit(copies, lambda lines: None, **record)
    status, out, _ = shown("other", "--json")
    findings = [one["found"] for one in json.loads(out)["runs"][0]["findings"]]
    assert status == 1 and any(text.startswith(found) for text in findings), findings


def test_a_row_that_says_other_than_its_lines(copies: Path, shown: Callable[..., Shown]) -> None:
    rows = (copies / "runs.csv").read_text()
    tokens = json.loads((copies / "other" / "record.json").read_text())["total_tokens"]
    (copies / "runs.csv").write_text(rows.replace(f",{tokens},", f",{tokens + 100},"))
    status, out, _ = shown("other")
    assert status == 1 and f"runs.csv says total_tokens {tokens + 100}, the completions have {tokens}" in out
    (copies / "runs.csv").write_text(rows + rows.splitlines()[-1] + "\n")
    status, out, _ = shown("other")
    assert status == 1 and "2 rows of this run in runs.csv, expected 1" in out
    (copies / "runs.csv").unlink()
    status, out, _ = shown("other")
    assert status == 0 and "no runs.csv beside other: its row was not checked" in out


def test_a_token_that_is_not_the_models_is_wrong_or_a_near_tie(
    honest: Run, copies: Path, shown: Callable[..., Shown], small_model: Path
) -> None:
    """The last token of a request becomes the second best one; how far below the best it is, is the bound to pass."""
    import torch

    from harness.models import loading, locate
    from harness.models.tokenizer import load_tokenizer

    source = locate.locate(ModelConfig(path=str(small_model)))
    tokenizer = load_tokenizer(source)
    model = loading.load_model(source, dtype=torch.float32, device="cpu")
    prompt = json.loads((ROOT / "harness/workload/data/sample.jsonl").read_text().splitlines()[1])["prompt"]
    ids = tokenizer(prompt).input_ids + honest.token_ids[1][:-1]
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -1]
    (best, second), spread = logits.topk(2), logits.std()
    gap = float((best[0] - best[1]) / spread)
    assert int(second[0]) == honest.token_ids[1][-1]
    assert gap > bound_for("float32")  # or the small model is not what it was

    def change(lines: Lines) -> None:
        line = next(line for line in lines if line["index"] == 1)
        line["token_ids"][-1] = int(second[1])
        line["text"] = tokenizer.decode(line["token_ids"], skip_special_tokens=True)

    edit(copies, change)
    name, place = honest.row["run_id"], CAP - 1
    assert shown("other")[0] == 0  # all that can be told without a model adds up

    status, out, _ = shown("other", "--against", name)
    assert status == 1 and out.startswith(f"not explained: {REQUESTS - 1} of {REQUESTS} requests exact; 1 with other")

    for more in (["--against", name], []):
        status, out, _ = shown("other", *more, "--model", "--json")
        found = json.loads(out)
        assert (status, found["right"], found["wrong"], found["explained"]) == (1, False, [1], [])
        (difference,) = found["differences"]
        assert (difference["index"], difference["position"], difference["verdict"]) == (1, place, "wrong")
        assert difference["token_ids"] == [int(second[1]), int(second[0])]
        assert difference["gaps"] == pytest.approx([gap, 0], rel=0.01, abs=1e-6)
        assert found["first_divergences"] == [place]

        status, out, _ = shown("other", *more, "--model", "--bound", str(gap * 1.01))
        assert status == 0 and f"{REQUESTS - 1} of {REQUESTS} requests exact; 1 explained by near-ties" in out
        assert shown("other", *more, "--model", "--bound", str(gap * 0.99))[0] == 1


def test_a_text_or_a_prompt_that_is_not_the_ids(copies: Path, shown: Callable[..., Shown]) -> None:
    def change(lines: Lines) -> None:
        for line in lines:
            if line["index"] in (0, 1):
                line["prompt_tokens"] += 1 - 2 * line["index"]  # their sum stays
            if line["index"] == 2:
                line["text"] += "!"

    edit(copies, change)
    for model, wrong in ([], [0, 1]), (["--model"], [0, 1, 2]):
        status, out, _ = shown("other", *model, "--json")
        findings = {one["index"]: one["found"] for one in json.loads(out)["runs"][0]["findings"]}
        assert status == 1 and sorted(findings) == wrong
        assert "but the prompt has" in findings[0] and "but the prompt has" in findings[1]
    assert findings[2] == "text is not what its token ids decode to"


def test_lines_of_two_requests_that_changed_places(copies: Path, shown: Callable[..., Shown]) -> None:
    def change(lines: Lines) -> None:
        one, two = (next(line for line in lines if line["index"] == index) for index in (2, 3))
        for name in ("token_ids", "text"):
            one[name], two[name] = two[name], one[name]

    edit(copies, change)
    assert shown("other")[0] == 0
    status, out, _ = shown("other", "--model")
    assert status == 1 and "2 wrong, the first is request 2" in out


def test_requests_of_one_run_only(honest: Run, copies: Path, shown: Callable[..., Shown]) -> None:
    def change(lines: Lines) -> None:
        lines[:] = [line for line in lines if line["index"] != 5]
        cut = next(line for line in lines if line["index"] == 0)
        cut["token_ids"], cut["output_tokens"] = cut["token_ids"][:5], 5

    edit(copies, change, status="interrupted")
    status, out, _ = shown("other", "--against", honest.row["run_id"])
    assert status == 1
    assert "1 request in one run only" in out
    assert "one ends after 5 tokens, the other continues" in out.replace("\n", " ")


def test_a_run_of_fewer_requests(honest: Run, copies: Path, shown: Callable[..., Shown]) -> None:
    def change(lines: Lines) -> None:
        lines[:] = [line for line in lines if line["index"] < 3]

    edit(copies, change)
    record = json.loads((copies / "other" / "record.json").read_text())
    lines = read_completions(copies / "other" / "completions.jsonl")
    tally = Tally.of_file(copies / "other" / "completions.jsonl")
    record["config"]["dataset"]["num_samples"] = record["requests"] = len(lines)
    record |= tally.figures(record["elapsed_s"]) | {"parity": None, "config_hash": config_hash(record["config"])}
    (copies / "other" / "config.yaml").write_bytes(yaml_bytes(record["config"]))
    (copies / "other" / "passes.csv").unlink()
    (copies / "other" / "record.json").write_text(json.dumps(record))
    put_row(copies, {name: record.get(name) for name in COLUMNS})
    for pair in (["other", "--against", honest.row["run_id"]], [honest.row["run_id"], "--against", "other"]):
        status, out, _ = shown(*pair)
        assert status == 0 and f"{REQUESTS - 3} requests in one run only" in out, out


def test_a_run_that_is_not_ok_is_not_right(copies: Path, shown: Callable[..., Shown]) -> None:
    edit(copies, lambda lines: None, status="running")
    status, out, _ = shown("other")
    assert status == 1 and out.startswith("incomplete: ") and f"other is running: {REQUESTS} of {REQUESTS}" in out
    edit(copies, lambda lines: None, status="ok", parity={"checked": 4, "wrong": 1})
    status, out, _ = shown("other")
    assert status == 1 and "its own check found 1 outputs wrong" in out


@pytest.mark.parametrize("name", ["elapsed_s", "latency_p99_s", "requests", "device_name"])
def test_a_row_that_says_other_than_its_record(copies: Path, shown: Callable[..., Shown], name: str) -> None:
    row = next(row for row in read_rows(copies / "runs.csv") if row["run_id"] == "other")
    put_row(copies, row | {name: "7.5"})
    status, out, _ = shown("other")
    assert status == 1 and f"runs.csv says {name} 7.5, record.json" in out


def test_what_follows_a_near_tie_is_judged(honest: Run, copies: Path, shown: Callable[..., Shown]) -> None:
    def change(lines: Lines) -> None:
        line = next(line for line in lines if line["index"] == 1)
        line["token_ids"][2] += 1
        line["token_ids"][CAP // 2 :] = [5] * (len(line["token_ids"]) - CAP // 2)

    edit(copies, change)
    pair = ["other", "--against", honest.row["run_id"], "--model"]
    found = json.loads(shown(*pair, "--json")[1])
    (difference,) = found["differences"]
    bound = 1.01 * max(difference["gaps"])  # as if the first difference were a near-tie
    status, out, _ = shown(*pair, "--bound", str(bound))
    assert status == 1 and "after a near-tie at token 2, a token is" in out.replace("\n", " ")


@pytest.mark.parametrize("name", ["trust_remote_code", "allow_pickle"])
def test_a_record_cannot_have_code_run(copies: Path, shown: Callable[..., Shown], name: str) -> None:
    config = json.loads((copies / "other" / "record.json").read_text())["config"]
    config["model"][name] = True
    edit(copies, lambda lines: None, config=config)
    status, _, err = shown("other", "--model")
    assert status == 2 and err.startswith(f"error: --model: other ran with model.{name}=true; if you trust ")


def test_a_checkpoints_penalties_are_not_the_references(tmp_path: Path, demo_model: Path) -> None:
    """Greedy is greedy, and ``stop=length`` goes on past the end of sequence, whatever generation_config.json says."""
    import torch

    from harness.config.schema import GenerationConfig, Stop
    from harness.models import locate
    from harness.models.reference import Reference

    directory = save_model(tmp_path / "model", "llama", torch.float32, **SIZES)
    source = locate.locate(ModelConfig(path=str(directory), tokenizer=str(demo_model)))
    generation = GenerationConfig(stop=Stop.length)
    plain = Reference(source, "float32", generation, "cpu").generate([1, 2, 3], 24)
    odd = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "eos_token_id": plain[2], "do_sample": True}
    (directory / "generation_config.json").write_text(json.dumps(odd))
    reference = Reference(source, "float32", generation, "cpu")
    assert reference.generate([1, 2, 3], 24) == plain
    with torch.inference_mode():
        ids = [1, 2, 3]
        for _ in range(24):
            ids.append(int(reference.model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert ids[3:] == plain


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nothing"], "error: run: no run id in"),
        (["run.csv/"], "error: run: 'run.csv/' is no run's directory"),
        (["other", "--against", "other"], "error: --against: other is the run itself"),
        (["other", "--samples", "2"], "error: --samples: says how the model judges, and no model is asked"),
        (["other", "--bound", "1"], "error: --bound: says how the model judges, and no model is asked"),
        (["other", "--model", "--bound", "nan"], "error: command line: argument --bound: 'nan' is not a number"),
        (["other", "--model", "--samples", "0"], "error: command line: argument --samples: '0' is not a whole"),
        (["other", "--model", "/nowhere"], "error: --model: no such directory or GGUF file: '/nowhere'"),
        (["other", "--dataset", "/nowhere"], "error: dataset"),
        (["other", "--modell"], "error: command line: unrecognized arguments: --modell"),
        ([], "error: command line: the following arguments are required: RUN_ID"),
    ],
)
def test_bad_input_is_one_line(shown: Callable[..., Shown], arguments: list[str], line: str) -> None:
    status, out, err = shown(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith(line) and err.count("\n") == 1


def test_other_work_is_not_compared(honest: Run, copies: Path, shown: Callable[..., Shown]) -> None:
    config = honest.record["config"] | {"generation": honest.record["config"]["generation"] | {"max_output_len": 9}}
    edit(copies, lambda lines: None, config=config)
    status, out, err = shown("other", "--against", honest.row["run_id"])
    assert (status, out) == (2, "")
    assert "did other work than other" in err or f"{honest.row['run_id']} did other work than other" in err
    assert "generation.max_output_len" in err


@pytest.mark.parametrize(
    ("name", "data", "found"),
    [
        ("record.json", b"", "is damaged: no record of a run"),
        ("record.json", b"[" * 100_000, "is damaged: no record of a run"),
        ("record.json", b"[1]", "is damaged: no record of a run"),
        ("record.json", b'{"status": "ok", "config": {"dataset": 5}}', "its config is not one of this harness"),
        ("completions.jsonl", b"\x00\xff\n{}\n", "is not a completion"),
        (
            "completions.jsonl",
            b'{"index":"x","finish_reason":"eos","prompt_tokens":1,"output_tokens":1,"token_ids":[1]}\n',
            "is not a completion; the file was edited or damaged",
        ),
    ],
)
def test_damaged_files_are_one_line(
    copies: Path, shown: Callable[..., Shown], name: str, data: bytes, found: str
) -> None:
    (copies / "other" / name).write_bytes(data)
    status, out, err = shown("other")
    assert (status, out) == (2, "")
    assert found in err and err.count("\n") == 1


def test_a_request_checked_in_a_run_may_be_wrong(copies: Path, honest: Run, small_model: Path) -> None:
    """What ``verify=N`` makes of ids that are not the model's: the run's own completions, one of them changed."""
    from harness.config.schema import DatasetConfig
    from harness.models import locate
    from harness.models import reference as references
    from harness.models.tokenizer import load_tokenizer
    from harness.verify import in_run
    from harness.workload import reading

    generation = GenerationConfig(max_output_len=CAP)
    reference = references.Reference(
        locate.locate(ModelConfig(path=str(small_model))), "float32", generation, "cpu", False
    )
    tokenizer = load_tokenizer(locate.locate(ModelConfig(path=str(small_model))))
    work = reading.resolve(
        reading.read(DatasetConfig(name="sample", num_samples=REQUESTS)),
        generation,
        vocab_size=reference.vocab_size,
        count_tokens=lambda texts: [len(ids) for ids in tokenizer(texts).input_ids],
    )
    lines = [honest.completions[request.index] for request in work.requests]
    lines[2]["token_ids"] = [*lines[2]["token_ids"][:3], 11, *lines[2]["token_ids"][4:]]
    lines[5]["token_ids"] = lines[5]["token_ids"][:-1]
    prompts = [tokenizer(request.prompt).input_ids for request in work.requests]
    found = in_run.check(reference, work.requests, prompts, lines, "float32")
    assert (found["checked"], found["exact"], found["near_tie"], found["wrong"]) == (REQUESTS, REQUESTS - 2, 0, 2)
    verdicts = {one["index"]: one for one in found["requests"]}
    assert (verdicts[2]["position"], verdicts[2]["token_id"]) == (3, 11)
    assert verdicts[2]["problem"].startswith("token 3 is 11, ")
    assert "output_tokens is" in verdicts[5]["problem"]


def test_judging() -> None:
    scores = Scores([0.0, 0.1, 0.0, 0.3], [1, 2, 3, 4], [3.0] * 4)
    judged = judge(7, scores, 0.2)
    assert (judged.first, judged.worst, judged.wrong, judged.largest) == (1, 3, 3, 0.3)
    assert judge(7, scores, 0.3).wrong is None
    exact = judge(7, Scores([0.0], [1], [3.0]), 0.2)
    assert (exact.first, exact.worst, exact.wrong, exact.largest) == (None, None, None, 0.0)
    for gap in (float("nan"), float("inf")):
        assert judge(7, Scores([0.0, gap], [1, 2], [3.0] * 2), 0.2).wrong == 1


def test_bounds() -> None:
    assert bound_for("float32", "bfloat16") == bound_for("bfloat16") > bound_for("float16") > bound_for("float32")
    assert bound_for("int3", given=0.5) == 0.5
    with pytest.raises(UserError, match="no bound for tokens computed in 'int3'"):
        bound_for("int3")
    with pytest.raises(UserError, match="quantized"):
        bound_for("float32", quantized=True)


def test_the_command_line_refuses_a_sample_that_is_no_number() -> None:
    done = python("-m", "harness.verify", "x", "--samples", "many")
    assert_refused(done, "error: command line: argument --samples: 'many' is not a whole number of at least 1")
