"""An independent recount of one run: what its ids add up to, against what its record and its row say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.basics.cells import cell_text
from harness.basics.errors import one_line
from harness.models.ends import Ends
from harness.results.columns import COLUMNS, TABLE, Source, names_of
from harness.results.completions import percentile
from harness.results.efficiency import efficiency
from harness.verify import clock, drafts, limits, names, sharing
from harness.verify.clock import number
from harness.verify.runs import RecordedRun
from harness.workload.records import Request

COUNTS = names_of(column for column in TABLE if column.source is Source.COUNT)
RATES = {column.name: column.rate_of for column in TABLE if column.rate_of is not None}
ROUNDING = 1e-5  # a row's rates have 6 digits


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that does not add up; ``index`` is the request's, None for the run as a whole."""

    index: int | None
    text: str

    def __str__(self) -> str:
        return self.text if self.index is None else f"request {self.index}: {self.text}"


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a run's requests and model beyond the run; None for what is not at hand.

    Attributes:
        requests: by index.
        prompts: each prompt's ids, by index.
        ends: what ends a request.
        vocab_size: ids are below it.
        decode: the text of ids, special tokens left out.
        architecture: of the model, with the length of its context.
        unknown: why something is not at hand, for the user.
    """

    requests: dict[int, Request] | None = None
    prompts: dict[int, list[int]] | None = None
    ends: Ends | None = None
    vocab_size: int | None = None
    decode: Callable[[list[int]], str] | None = None
    architecture: dict[str, Any] | None = None
    unknown: tuple[str, ...] = ()


@dataclass(slots=True)
class Recount:
    """What the lines of ``completions.jsonl`` add up to, and what does not fit."""

    run_id: str
    status: str
    requests: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def recount(run: RecordedRun, known: Known) -> Recount:
    """Counts a run again from its token ids and compares that with everything that it says of itself."""
    found = Recount(run.run_id, str(run.record["status"]), len(run.completions), notes=list(known.unknown))
    found.findings += _indices(run, known)
    completed = [line for line in run.completions if line["finish_reason"] != "rejected"]
    for line in run.completions:
        index = line["index"]
        found.findings += [Finding(index, text) for text in _line(line, run, index, known)]
    _rejections(run, known, found)
    prompt_tokens = sum(line["prompt_tokens"] for line in completed)
    output_tokens = sum(len(line["token_ids"]) for line in completed)
    found.counts = {
        "completed": len(completed),
        "rejected": len(run.completions) - len(completed),
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
    }
    if found.status == "running":
        found.notes.append(f"{run.run_id} is not finished: it has no sums to check")
        return found
    found.findings += [Finding(index, text) for index, text in sharing.check(run, completed, known.prompts)]
    texts = [
        *drafts.check(run),
        *_sums("record.json", run.record, found.counts),
        *_times(run.record, completed),
        *_costs(run.record),
    ]
    for more, notes in (clock.check(run, completed), names.check(run)):
        texts += more
        found.notes += notes
    parity = run.record.get("parity")
    if isinstance(parity, dict) and parity.get("wrong") and not run.record.get("quantization"):
        texts.append(f"its own check found {one_line(str(parity['wrong']), 20)} outputs wrong")
    if run.rows is None:
        found.notes.append(f"no runs.csv beside {run.run_id}: its row was not checked")
    elif len(run.rows) != 1:
        texts.append(f"{len(run.rows)} rows of this run in runs.csv, expected 1")
    else:
        texts += _row(run.rows[0], run.record, found.counts)
    found.findings += [Finding(None, text) for text in texts]
    return found


def _rejections(run: RecordedRun, known: Known, found: Recount) -> None:
    """Adds the requests that were rejected without need, or a note that this could not be checked."""
    rejected = sum(line["finish_reason"] == "rejected" for line in run.completions)
    if not rejected:
        return
    if known.requests is None or known.prompts is None or known.architecture is None:
        found.notes.append(f"whether the {rejected} rejected requests could have run was not checked")
        return
    wrong, notes = limits.check(run, known.requests, known.prompts, known.architecture)
    found.findings += [Finding(index, text) for index, text in wrong]
    found.notes += notes


def _row(row: dict[str, str], record: dict[str, Any], counts: dict[str, int]) -> Iterator[str]:
    """Yields what a row says other than the ids and the record."""
    yield from _sums("runs.csv", row, counts)
    for name in COLUMNS:
        recorded, cell = cell_text(name, record.get(name)), row.get(name)
        if cell not in (None, recorded):
            yield f"runs.csv says {name} {one_line(row[name], 60)}, record.json {one_line(recorded, 60)}"


def _indices(run: RecordedRun, known: Known) -> Iterator[Finding]:
    """Yields what is wrong with the set of indices: each request comes once, and all of them if the run is ok."""
    seen = Counter(line["index"] for line in run.completions)
    for index, times in sorted(seen.items()):
        if times > 1:
            yield Finding(index, f"completed {times} times")
    requests = run.record.get("requests")
    expected = len(known.requests) if known.requests is not None else requests
    if known.requests is not None and requests is not None and requests != expected:
        yield Finding(None, f"record.json says {requests} requests, the dataset gives {expected}")
    if not isinstance(expected, int):
        return
    for index in sorted(seen):
        if not 0 <= index < expected:
            yield Finding(index, f"there is no such request: the run has {expected}")
    missing = [index for index in range(expected) if index not in seen]
    if run.ok and missing:
        yield Finding(missing[0], f"did not come back, though the run is ok ({len(missing)} missing in all)")


def _line(line: dict[str, Any], run: RecordedRun, index: int, known: Known) -> Iterator[str]:
    """Yields what is wrong with one completion by itself."""
    request = None if known.requests is None else known.requests.get(index)
    fed = None if known.prompts is None else known.prompts.get(index)
    prompt_tokens = None if fed is None else len(fed)
    if prompt_tokens is None and request is not None and request.prompt_ids is not None:
        prompt_tokens = len(request.prompt_ids)
    stop, ends = run.setting("generation", "stop"), known.ends or _ends(run)
    yield from problems(line, stop, ends, request, prompt_tokens, fed, known.vocab_size)
    if line["finish_reason"] == "rejected":
        return
    ids = [max(token, 0) for token in line["token_ids"]]
    known_ids = all(token < (known.vocab_size or 2**31) for token in ids)  # or the tokenizer would break down
    if known.decode is not None and known_ids:
        text = known.decode(ids) if ends is None else ends.text(known.decode, fed or [], ids)
        if text != line.get("text"):
            yield "text is not what its token ids decode to"
    first, last, elapsed = line.get("first_token_s"), line.get("finished_s"), run.record.get("elapsed_s")
    times = [time for time in (0, first, last, elapsed) if isinstance(time, int | float)]
    if times != sorted(times):
        yield f"its first token came after {first} s and its last after {last} s of {elapsed} s"


def _ends(run: RecordedRun) -> Ends | None:
    """Returns what a run's config alone says of what ends a request; None with stop strings, which need a tokenizer."""
    ids = run.setting("generation", "stop_token_ids")
    stop_ids = frozenset(ids if isinstance(ids, list) else [])
    return None if run.setting("generation", "stop_strings") else Ends(None, stop_ids)


def problems(
    line: dict[str, Any],
    stop: Any,
    ends: Ends | None = None,
    request: Request | None = None,
    prompt_tokens: int | None = None,
    prompt: Sequence[int] | None = None,
    vocab_size: int | None = None,
) -> Iterator[str]:
    """Yields what is wrong with the counts and the end of one completion, as far as it can be told.

    Args:
        line: of ``completions.jsonl``.
        stop: the run's stop rule, ``eos`` or ``length``.
        ends: what ends a request; None where that is not known, as for all that follow.
        request: what was asked for.
        prompt_tokens: how many ids its prompt has.
        prompt: these ids.
        vocab_size: ids are below it.
    """
    ids, reason = line["token_ids"], line["finish_reason"]
    said = line["prompt_tokens"]
    if reason == "rejected":
        if ids or said or line["output_tokens"]:
            yield f"rejected, but counts {said} prompt and {line['output_tokens']} output tokens, {len(ids)} ids"
        return
    if line["output_tokens"] != len(ids):
        yield f"output_tokens is {line['output_tokens']}, but there are {len(ids)} token ids"
    if not ids or said < 1:
        yield f"completed with {said} prompt tokens and {len(ids)} token ids"
    if prompt_tokens is not None and said != prompt_tokens:
        yield f"prompt_tokens is {said}, but the prompt has {prompt_tokens} tokens"
    outside = [token for token in ids if token < 0 or (vocab_size is not None and token >= vocab_size)]
    if outside:
        yield f"token id {outside[0]} is outside the vocabulary" + (f" of {vocab_size}" if vocab_size else "")
    if reason not in ("eos", "stop", "length"):
        yield f"finish_reason {one_line(reason, 40)!r} is neither eos, stop, length nor rejected"
        return
    if reason != "length" and stop == "length":
        yield f"finished with {reason}, but generation.stop is length"
    if request is not None and request.output_len is not None:
        wanted = request.output_len
        if len(ids) > wanted or (reason == "length" and len(ids) < wanted):
            yield f"finished with {reason} after {len(ids)} tokens, but its output_len is {wanted}"
    if ends is not None and ids:
        yield from _end(ids, reason, ends, prompt)


def _end(ids: list[int], reason: str, ends: Ends, prompt: Sequence[int] | None) -> Iterator[str]:
    """Yields what is wrong with where one completion ended."""
    before = list(prompt or [])
    tokens, last = [*before, *ids], ids[-1]
    found = ends.reason(tokens, len(tokens) - 1)
    if reason == "eos" and ends.eos is not None and last not in ends.eos:
        yield f"finished with eos, but its last token {last} is not one of {sorted(ends.eos)}"
    # A stop string may have begun in a prompt that is not known.
    unseen = prompt is None and ends.strings is not None and len(ids) < ends.strings.window
    if reason == "stop" and found != "stop" and not unseen:
        yield f"finished with stop, but with its last token {last} ends none of the stop strings, and it is no stop id"
    if reason == "length" and found == "eos":
        yield f"finished with length, but its last token {last} is an end-of-sequence token"
    if reason == "length" and found == "stop":
        yield f"finished with length, but its last token {last} ends a stop string, or is a stop id"
    for place, token in enumerate(ids[:-1]):
        if token in ends.watched and (found := ends.reason(tokens, len(before) + place)):
            what = "end-of-sequence token" if found == "eos" else "a stop string, or stop id, with token"
            yield f"went on after {what} {token} at position {place}"
            return


def _sums(where: str, said: dict[str, Any], counts: dict[str, int]) -> Iterator[str]:
    """Yields the counts and rates of a record or a row that are not those of the ids."""
    for name in COUNTS:
        if str(said.get(name)) != str(counts[name]):
            yield f"{where} says {name} {one_line(str(said.get(name)), 40)}, the completions have {counts[name]}"
    elapsed = number(said.get("elapsed_s"))
    for name, count in RATES.items():
        rate = number(said.get(name))
        if not elapsed:
            if rate is not None:
                yield f"{where} says {name} {rate:g} of a run whose clock was not stopped"
        elif rate is None or not abs(rate * elapsed - counts[count]) <= ROUNDING * max(counts[count], 1):
            value = one_line(str(said.get(name)), 40)
            yield f"{where} says {name} {value}, which is not {counts[count]} / {elapsed:g} s"


def _times(record: dict[str, Any], completed: list[dict[str, Any]]) -> Iterator[str]:
    """Yields the percentiles of a record that are not those of its completions."""
    if not number(record.get("elapsed_s")):
        return
    for name, key in (("ttft", "first_token_s"), ("latency", "finished_s")):
        times = [line[key] for line in completed if isinstance(line.get(key), int | float)]
        for q in (50, 99):
            said, found = number(record.get(f"{name}_p{q}_s")), percentile(times, q)
            if said != found and (said is None or found is None or not abs(said - found) <= ROUNDING * abs(found)):
                yield f"record.json says {name}_p{q}_s {said}, the completions give {found}"


def _costs(record: dict[str, Any]) -> Iterator[str]:
    """Yields the figures per joule and per million tokens that do not follow from the record; older ones lack them."""
    for name, found in efficiency(record).items():
        said = number(record.get(name))
        if name in record and said != found and None in (said, found):
            yield f"record.json says {name} {said}, its other figures give {found}"
        elif said is not None and found is not None and not abs(said - found) <= ROUNDING * abs(found):
            yield f"record.json says {name} {said:g}, its other figures give {found:g}"
