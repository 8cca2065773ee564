"""A simulated run, recounted: its lengths and its made-up tokens, which anyone can make again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from harness.basics.errors import UserError
from harness.config.schema import ModelConfig
from harness.costs.lengths import guessed_tokens, uncounted_tokens
from harness.engines.simulate import tokens
from harness.models import chat, locate, token_counts
from harness.models.architecture import positive_integer
from harness.models.ends import Ends
from harness.models.source import Source
from harness.verify import runs
from harness.verify.recount import Finding, Known, Recount, recount
from harness.verify.runs import RecordedRun
from harness.workload.reading import CountTokens, Render
from harness.workload.records import Request

NOTE = "simulated: its times were computed and its tokens made up, so neither says anything of a machine or a model"


def refuse_model(run: RecordedRun) -> None:
    """Raises UserError for a simulated run, of whose tokens no model knows anything."""
    if run.record.get("simulated"):
        found = f"{run.run_id} is simulated, and its tokens are made up"
        raise UserError("--model", found, "leave it out: the recount makes them again")


def recounted(run: RecordedRun, dataset: str | None) -> Recount:
    """Recounts a simulated run with its dataset and, if it counted by one that is at hand, its tokenizer file.

    Raises:
        UserError: ``dataset`` was given and is not the run's.
    """
    model = run.group("model", ModelConfig)
    try:
        source = locate.described(model)
        count_tokens = token_counts.counter(model, source)
    except UserError as error:
        found = recount(run, Known(unknown=(f"requests and tokens were not checked: {error}",)))
        return replace(found, notes=[*found.notes, NOTE])
    vocab = positive_integer(source.architecture.get("vocab_size"))
    requests = runs.read_requests(
        run,
        dataset,
        vocab_size=vocab or None,
        count_tokens=_count(run, count_tokens),
        render=_render(run, model, source),
        architecture=source.architecture,
    )
    stops = tokens.stop_ids(source.architecture)
    known = Known(
        requests.by_index,
        None if requests.by_index is None else _prompts(run, requests.by_index, count_tokens),
        Ends(frozenset(stops)) if run.setting("generation", "stop") == "eos" else Ends(),
        vocab,
        decode=lambda ids: "",
        architecture=source.architecture,
        unknown=() if requests.unknown is None else (f"the requests were not checked: {requests.unknown}",),
    )
    found = recount(run, known)
    if known.prompts is None and requests.unknown is None:
        found.notes.append("prompt_tokens were not checked: the tokenizer.json that counted them is not at hand")
    for line in run.completions:
        ids, eos = line["token_ids"], line["finish_reason"] == "eos"
        if ids and ids != tokens.token_ids(line["index"], len(ids), eos, vocab, stops):
            found.findings.append(Finding(line["index"], "its token ids are not those that a simulation makes"))
    found.notes.append(NOTE)
    return found


def _count(run: RecordedRun, count_tokens: token_counts.Counter | None) -> CountTokens | None:
    """Returns what the simulation counted texts by: a tokenizer, None where it is not at hand, or a guess."""
    if not _counted(run):
        return lambda texts: list(map(guessed_tokens, texts))
    return None if count_tokens is None else lambda texts: count_tokens(texts)


def _counted(run: RecordedRun) -> bool:
    return bool((run.record.get("simulation") or {}).get("counted"))


def _render(run: RecordedRun, model: ModelConfig, source: Source) -> Render | None:
    """Returns what writes chats as prompts, where that is at hand and brings no code; imports transformers."""
    place = chat.tokenizer_of(model, source).tokenizer
    if (
        not run.setting("dataset", "chat_template")
        or model.trust_remote_code
        or place is None
        or not Path(place).exists()
    ):
        return None
    from harness.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(chat.tokenizer_of(model, source))
    return lambda chats: chat.rendered(tokenizer, chats)


def _prompts(
    run: RecordedRun, requests: dict[int, Request], count_tokens: token_counts.Counter | None
) -> dict[int, list[int]] | None:
    """Returns as many numbers as each prompt has tokens; None where what counted them is not at hand."""
    counted = _counted(run)
    if counted and count_tokens is None:
        return None
    asked = {i: r.prompt for i, r in requests.items() if r.prompt_ids is None} if counted else {}
    lengths = dict(zip(asked, count_tokens(list(asked.values())), strict=True)) if asked and count_tokens else {}
    return {
        index: [0] * (lengths[index] if index in lengths else uncounted_tokens(request))
        for index, request in requests.items()
    }
