"""Chats by the model's own template: the ids that Hugging Face makes of them, and what is refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from support import datasets
from support.datasets import NO_CAP, TRIPLES, assert_valid, refusal
from support.models import save_small_demo
from support.runs import ROOT, Run, python, ran

from harness.basics.errors import UserError
from harness.config.schema import DatasetConfig, ModelConfig
from harness.costs import lengths
from harness.engines.catalogue import register
from harness.models import chat
from harness.models.locate import described, locate
from harness.models.tokenizer import ByteTokenizer, load_tokenizer
from harness.running.job import Job, prepare
from harness.workload.reading import read, resolve
from harness.workload.records import Message

write = datasets.write

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no\nsystem role') }}{% endif %}" + TEMPLATE
CHATS = [
    [Message("user", "What is the capital of France?")],
    [
        Message("system", "Be brief."),
        Message("user", "안녕하세요"),
        Message("assistant", "안녕!"),
        Message("user", "<|im_end|>"),
    ],
]


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    """A small model with the demo model's tokenizer and template."""
    directory = save_small_demo(tmp_path_factory.mktemp("small") / "small", demo_model)
    shutil.copy(demo_model / "chat_template.jinja", directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Any:
    return load_tokenizer(locate(ModelConfig(name="demo", path=str(demo_model))))


def theirs(tokenizer: Any, *chats: list[Message]) -> list[list[int]]:
    """What Hugging Face makes of chats."""
    asked = [[message._asdict() for message in one] for one in chats]
    return [list(tokenizer.apply_chat_template(one, add_generation_prompt=True)["input_ids"]) for one in asked]


def source(path: Path, template: str | None, **config: Any) -> tuple[ModelConfig, Any]:
    """A model whose tokenizer has this template, as headers show it."""
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text("{}")
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    if config:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    model = ModelConfig(name="x", tokenizer=str(path), architecture=SIZES)
    return model, described(model)


SIZES: dict[str, Any] = {
    **{"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 512},
}


# What a dataset asks for


def test_each_prompt_becomes_a_chat_with_the_system_prompt(write: Callable[..., str]) -> None:
    path = write(TRIPLES)
    work = read(DatasetConfig(name="asc24", path=path, chat_template=True, system_prompt="Be brief."))
    assert work.requests[0].messages == (Message("system", "Be brief."), Message("user", "Hello, world"))
    assert {request.claimed_prompt_len for request in work.requests} == {None}  # theirs was of the bare prompt
    bare = read(DatasetConfig(name="asc24", path=path, chat_template=True))
    assert bare.requests[0].messages == (Message("user", "Hello, world"),)
    # Before it is tokenized, a chat is a little longer than what is said in it.
    assert lengths.of(work.requests).items[0].prompt == len("Be brief.Hello, world") // 3 + 10
    asked: list[Any] = []

    def render(chats: list[tuple[Message, ...]]) -> list[list[int]]:
        asked.extend(chats)
        return [[number, 7] for number, _ in enumerate(chats)]

    resolved = resolve(work, NO_CAP, render=render)
    assert [messages[1].content for messages in asked] == [prompt for prompt, _, _ in TRIPLES]
    assert [request.prompt_ids for request in resolved.requests] == [(number, 7) for number in range(4)]
    assert_valid(resolved)
    assert resolve(resolved, NO_CAP) == resolved
    with pytest.raises(ValueError, match="render"):
        resolve(work, NO_CAP)


def test_a_system_prompt_needs_the_template(write: Callable[..., str]) -> None:
    line = refusal("asc24", write(TRIPLES), system_prompt="Be brief.")
    assert line == (
        "dataset.system_prompt: 'Be brief.' given, but prompts are fed as they are; add dataset.chat_template=true"
    )

    for text in ("", "a\ud800"):
        line = refusal("asc24", write(TRIPLES), system_prompt=text, chat_template=True)
        assert line.endswith("; give a text, or null") and line.encode()


def test_a_file_of_chats_needs_the_template(write: Callable[..., str]) -> None:
    record = {"messages": [message._asdict() for message in CHATS[1]], "max_tokens": 5}
    path = write(json.dumps(record), "chat.jsonl")
    assert refusal("jsonl", path) == (
        f"dataset.chat_template: false, but request 0 of {path!r} is a chat; "
        "add dataset.chat_template=true to feed it by the model's own template"
    )
    keys: dict[str, Any] = {"name": "jsonl", "path": path, "chat_template": True}
    assert read(DatasetConfig(**keys)).requests[0].messages == tuple(CHATS[1])
    # A chat keeps the system message that it has.
    assert read(DatasetConfig(**keys, system_prompt="Be long.")).requests[0].messages == tuple(CHATS[1])


# The template


def test_ids_are_those_of_hugging_face_with_no_further_bos(tokenizer: Any) -> None:
    found = chat.rendered(tokenizer, CHATS)
    assert found == theirs(tokenizer, *CHATS)
    texts = [tokenizer.decode(ids) for ids in found]
    assert texts[0].startswith("<|im_start|>system\nYou are a helpful AI assistant") and texts[0].count("<s>") == 0
    assert texts[1].endswith("<|im_start|>assistant\n")


def test_a_template_with_bos_gets_one(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ bos_token }}" + TEMPLATE)
    [ids] = chat.rendered(tokenizer, CHATS[:1])
    assert ids == theirs(tokenizer, CHATS[0])[0] and ids.count(tokenizer.bos_token_id) == 1


def test_a_template_that_writes_the_day_writes_the_same_one_each_day(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y, %H:%M') }}{% endif %}"
    inner = "{% macro day() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}\n  {% if true %}{{ day() }}{% endif %}"
    for template, day in ((asks, "26 Jul 2024, 12:00"), ("\n" + asks, "\n26 Jul 2024, 12:00"), (inner, "2024-07-26")):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        [ids] = chat.rendered(tokenizer, CHATS[:1])
        assert tokenizer.decode(ids) == day


def test_a_chat_that_the_template_refuses_is_one_line(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for template, found in (
        (STRICT, "request 1 (system, user, assistant, user) is refused by the model's template (no system role)"),
        ("{{ messages[2].content.nothing.more }}", "request 0 (user) is refused by the model's template"),
        ("{% if %}", "request 0 (user) is refused by the model's template"),
        ("{{ messages.__class__.__mro__ }}", "request 0 (user) is refused by the model's template"),
    ):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        with pytest.raises(UserError) as caught:
            chat.rendered(tokenizer, CHATS)
        line = str(caught.value)
        assert line.startswith(f"dataset.chat_template: {found}") and "\n" not in line
    monkeypatch.setattr(tokenizer, "chat_template", "{% if messages[1] %}x{% endif %}")
    with pytest.raises(UserError, match="makes nothing of request 0"):
        chat.rendered(tokenizer, CHATS)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    for without in (tokenizer, ByteTokenizer()):
        with pytest.raises(UserError, match=r"dataset\.chat_template: the tokenizer brings no template"):
            chat.rendered(without, CHATS)


# Whether there is one, by headers alone


def test_a_template_is_found_wherever_a_checkpoint_keeps_it(tmp_path: Path) -> None:
    assert chat.has_template(*source(tmp_path / "none", None)) is False
    assert chat.has_template(*source(tmp_path / "file", TEMPLATE)) is True
    assert chat.has_template(*source(tmp_path / "config", None, chat_template=TEMPLATE)) is True
    assert chat.has_template(*source(tmp_path / "other", None, bos_token="<s>", chat_template=None)) is False
    (tmp_path / "none" / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"model\.tokenizer: .*tokenizer_config.json cannot be read"):
        chat.has_template(*source(tmp_path / "none", None))
    hub = ModelConfig(name="x", tokenizer="someone/some-model", architecture=SIZES)
    assert chat.has_template(hub, described(hub)) is None


def test_a_gguf_file_tells_its_template(tmp_path: Path) -> None:
    import gguf
    import numpy as np

    for name, template in (("chat.gguf", TEMPLATE), ("base.gguf", None)):
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        writer.add_block_count(1)
        if template is not None:
            writer.add_chat_template(template)
        writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
        for write_part in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write_part()
        writer.close()
        model = ModelConfig(name="x", tokenizer=str(tmp_path / name), architecture=SIZES)
        assert chat.has_template(model, described(model)) is (template is not None)


def job(*overrides: str) -> Job:
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return prepare(compose("config", list(overrides)))


def test_a_model_without_a_template_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    source(tmp_path / "none", None)
    sizes = [f"model.architecture.{key}={value}" for key, value in SIZES.items()]
    asked = ["dataset.chat_template=true", "engine=baseline", "model.weights=dummy", "model.path=null", *sizes]
    with pytest.raises(UserError) as caught:
        job(*asked)
    assert str(caught.value).startswith("dataset.chat_template: smollm2_135m has no tokenizer here; leave it out, or")
    with pytest.raises(UserError) as caught:
        job(*asked, f"model.tokenizer={tmp_path / 'none'}")
    assert f"no chat template in {tmp_path / 'none'}" in str(caught.value)


# Runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Run:
    """Three chats through an engine, two of them checked against Hugging Face's generate."""
    directory = tmp_path_factory.mktemp("chat")
    (directory / "data.json").write_text(json.dumps([[one[-1].content, 5, 6] for one in (*CHATS, CHATS[0])]))
    words = ["dataset=asc24", f"dataset.path={directory / 'data.json'}", f"model.path={small_model}"]
    words += ["dataset.chat_template=true", "dataset.system_prompt='Be brief, please.'", "dataset.shuffle=true"]
    return ran(directory / "results", *words, "model.dtype=float32", "engine.kernels=torch", "verify=3")


def test_a_run_of_chats_gives_what_generate_makes_of_the_template(run: Run, tokenizer: Any, small_model: Path) -> None:
    import torch

    from harness.models.generation import greedy
    from harness.models.loading import load_model

    assert run.status == 0, run.stderr
    assert run.row["parity_exact_share"] == "1" and run.record["chat_template"] == {"applied": True, "known": True}
    assert not any("chat template" in note for note in run.record["notes"])
    model = load_model(locate(ModelConfig(name="small", path=str(small_model))), dtype=torch.float32)
    work = read(DatasetConfig(name="asc24", path=run.record["config"]["dataset"]["path"], shuffle=True))
    for request in work.requests:
        said = [Message("system", "Be brief, please."), Message("user", request.prompt)]
        [prompt] = theirs(tokenizer, said)
        made = greedy(model, torch.tensor([prompt]), 6, frozenset({2})).tolist()
        assert [*prompt, *run.token_ids[request.index]] == made
        assert run.completions[request.index]["prompt_tokens"] == len(prompt)


def test_a_run_of_chats_is_recounted(run: Run) -> None:
    asked = python("-m", "harness.verify", run.row["run_id"], "--results", str(run.results))
    assert asked.returncode == 0 and "prompt_tokens were not checked" not in asked.stdout, asked.stdout
    first = json.loads((run.directory / "completions.jsonl").read_text().splitlines()[0])
    copy = run.results.parent / "copy" / run.row["run_id"]
    shutil.copytree(run.directory, copy)
    (copy / "completions.jsonl").write_text(json.dumps(first | {"prompt_tokens": 1 + first["prompt_tokens"]}) + "\n")
    wrong = python("-m", "harness.verify", str(copy))
    assert wrong.returncode == 1 and "but the prompt has" in wrong.stdout


def test_what_feeds_other_prompts_is_refused(run: Run, small_model: Path) -> None:
    path = run.record["config"]["dataset"]["path"]
    recounted = python("launch/recount.py", str(run.directory), path, str(small_model / "tokenizer.json"))
    assert recounted.returncode == 2 and "dataset.chat_template=true" in recounted.stderr
    asked = ["dataset.chat_template=true", f"model.path={small_model}", "model.dtype=float32"]
    tasks = python("-m", "harness.accuracy", "--tasks", "some_task", *asked)
    assert tasks.returncode == 2, tasks.stdout
    assert "dataset.chat_template: true, but tasks bring prompts of their own; leave it out" in tasks.stderr


@pytest.mark.slow
def test_bare_prompts_of_a_user_s_file_are_noted_where_the_model_has_a_template(
    run: Run, small_model: Path, tmp_path: Path
) -> None:
    simulated = ["engine=simulate", f"model.path={small_model}", "hardware.memory_bandwidth=1e10"]
    simulated += ["hardware.peak_flops.float32=1e11", "hardware.peak_flops.bfloat16=1e11"]
    path = run.record["config"]["dataset"]["path"]
    bare = ran(tmp_path / "bare", *simulated, "dataset=asc24", f"dataset.path={path}")
    assert bare.status == 0, bare.stderr
    assert any(note.startswith("the model has a chat template") for note in bare.record["notes"])
    shipped = ran(tmp_path / "shipped", *simulated, "dataset.num_samples=2")
    assert not any("chat template" in note for note in shipped.record["notes"])
    assert shipped.record["chat_template"] == {"applied": False, "known": True}
    # A simulation counts the very prompts that the run had.
    chats = [word for word in run.record["command_line"] if word.startswith("dataset")]
    played = ran(tmp_path / "played", *simulated, *chats)
    assert played.status == 0, played.stderr
    counts = {index: line["prompt_tokens"] for index, line in run.completions.items()}
    assert {index: line["prompt_tokens"] for index, line in played.completions.items()} == counts
    recounted = python("-m", "harness.verify", played.row["run_id"], "--results", str(played.results))
    assert recounted.returncode == 0 and "not checked" not in recounted.stdout, recounted.stdout
