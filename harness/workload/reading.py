"""The requests of a run: read from its dataset, then settled by what the model is.

A bad file is refused here, before any weight is loaded, with the record and the field that are wrong.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain

from harness.basics.errors import UserError, quoted
from harness.config.schema import DatasetConfig, GenerationConfig
from harness.workload import borrowed, catalogue, keys, recognition
from harness.workload.formats.synthetic import HI
from harness.workload.lengths import fitted
from harness.workload.records import Message, Request, Workload

CountTokens = Callable[[list[str]], list[int]]
Render = Callable[[list[tuple[Message, ...]]], list[list[int]]]
SYSTEM_ROLES = ("system", "developer")


def read(dataset: DatasetConfig) -> Workload:
    """Reads, checks and fingerprints the dataset; the whole file is checked even when few samples are taken.

    ``dataset.num_samples`` takes the first N usable records in the file's order, or in that of ``dataset.shuffle``.

    Raises:
        UserError: the config contradicts itself, the file cannot be read, or a record is wrong.
    """
    found = catalogue.find(dataset.name)
    keys.check(dataset, found)
    if found.takes_any_text:
        recognition.check(str(dataset.path), found)
    try:
        workload = found.read(dataset)
    except UserError as error:
        if dataset.path is None or not error.field.startswith("dataset.path"):
            raise
        raise recognition.better(error, dataset.path, found) from error
    if dataset.input_len is not None:
        prompts, sha256 = borrowed.asked(dataset, "input_len")
        workload = found.lengthened(replace(workload, sha256=sha256), dataset, prompts)
    return _with_output_lens(_with_messages(workload, dataset), dataset)


def there(dataset: DatasetConfig) -> int | None:
    """Returns how many requests a dataset has; None where it makes as many as are asked for. Raises as :func:`read`."""
    if catalogue.find(dataset.name).makes_requests:
        return None
    return len(read(replace(dataset, num_samples=None)).requests)


def _with_messages(workload: Workload, dataset: DatasetConfig) -> Workload:
    """Returns the workload with a chat for each request, where the model's template is to be applied."""
    if not dataset.chat_template:
        chat = next((request for request in workload.requests if request.messages is not None), None)
        if chat is None:
            return workload
        raise UserError(
            "dataset.chat_template",
            f"false, but request {chat.index} of {quoted(workload.path, 300)} is a chat",
            "add dataset.chat_template=true to feed it by the model's own template",
        )
    system = () if dataset.system_prompt is None else (Message("system", dataset.system_prompt),)
    requests = []
    for request in workload.requests:
        messages = request.messages or (Message("user", request.prompt),)
        if messages[0].role not in SYSTEM_ROLES:
            messages = (*system, *messages)
        # The file's own count was of the prompt without the template.
        requests.append(replace(request, messages=messages, claimed_prompt_len=None))
    return replace(workload, requests=requests)


def _with_output_lens(workload: Workload, dataset: DatasetConfig) -> Workload:
    """Returns the workload with an output length, or a text that gives one, for each request."""
    lacking = [request for request in workload.requests if request.output_len is None]
    if dataset.output_len is None:
        if all(request.reply for request in lacking):
            return workload
        found = f"not given, and {len(lacking):,} of {len(workload.requests):,} requests bring no output length"
        remedy = "give tokens, uniform:LOW:HIGH, lognormal:MEDIAN:SIGMA or file:PATH"
        raise UserError("dataset.output_len", found, remedy)
    if not lacking:
        found = f"{dataset.output_len} given, but each request of {quoted(workload.path, 300)} brings its own length"
        raise UserError(
            "dataset.output_len", found, "leave it out, or limit the outputs with generation.max_output_len"
        )
    lengths, sha256 = borrowed.asked(dataset, "output_len")
    drawn = borrowed.drawn(dataset)
    requests = []
    for request in workload.requests:
        if request.output_len is None:
            tokens, text = next(lengths)
            request = replace(request, output_len=tokens, reply=text if tokens is None else None, drawn=drawn)
        requests.append(request)
    return replace(workload, requests=requests, sha256=_both(workload.sha256, sha256))


def _both(one: str | None, other: str | None) -> str | None:
    """Returns the fingerprint of two files together, or of the one that there is."""
    return hashlib.sha256(f"{one} {other}".encode()).hexdigest() if one and other else one or other


def resolve(
    workload: Workload,
    generation: GenerationConfig,
    *,
    vocab_size: int | None = None,
    count_tokens: CountTokens | None = None,
    render: Render | None = None,
    max_context: int | None = None,
) -> Workload:
    """Settles what needs the model; afterwards every ``output_len`` is an int of at least 1, and no chat is left.

    Has chats rendered, counts the replies that give output lengths, leaves out the conversations whose reply has no
    token (the later requests move up), applies ``generation.max_output_len``, cuts lengths that were drawn to the
    model's context, and draws the random prompt ids.

    Args:
        workload: as ``read`` returned it.
        generation: for ``max_output_len``.
        vocab_size: ids are drawn below it; needed by ``dataset.prompt=random``.
        count_tokens: token counts of a list of texts; needed by ShareGPT replies, and to cut drawn lengths.
        render: prompt ids of a list of chats, by the model's template; needed by ``dataset.chat_template``.
        max_context: longest prompt plus output of the model in tokens; None where it has no limit.

    Raises:
        UserError: ``generation.max_output_len`` is below 1, the template refuses a chat, or no conversation is left.
        ValueError: an argument that this workload needs is missing or wrong.
    """
    cap = generation.max_output_len
    if cap is not None and cap < 1:
        raise UserError("generation.max_output_len", f"{cap} is below 1", "give 1 or more, or null for no limit")
    requests = _counted(_rendered(workload.requests, render), workload, count_tokens)
    requests = [
        replace(request, output_len=min(request.output_len, cap or request.output_len))
        for request in requests
        if request.output_len
    ]
    left_out = workload.left_out + len(workload.requests) - len(requests)
    if not requests:
        found = f"none of the {left_out:,} conversations has a reply of at least one token"
        raise catalogue.find(workload.name).none_usable(workload, found)
    requests, notes = _fitted(requests, max_context, count_tokens)
    requests = _with_ids(requests, workload, vocab_size)
    requests = [replace(request, index=index) for index, request in enumerate(requests)]
    return replace(workload, requests=requests, left_out=left_out, notes=(*workload.notes, *notes))


def _rendered(requests: list[Request], render: Render | None) -> list[Request]:
    """Returns the requests, chats as the ids that the model's template makes of them."""
    chats = [request.messages for request in requests if request.messages is not None]
    if not chats:
        return requests
    if render is None:
        raise ValueError("render is needed: these requests are chats")
    ids = iter(render(chats))
    return [
        request if request.messages is None else replace(request, prompt="", prompt_ids=tuple(next(ids)), messages=None)
        for request in requests
    ]


def _counted(requests: list[Request], workload: Workload, count_tokens: CountTokens | None) -> list[Request]:
    """Returns the requests with the lengths that texts give: replies for outputs, others for drawn prompts."""
    replies = [request.reply or "" for request in requests if request.output_len is None]
    likes = [request.like for request in requests if request.like is not None and request.claimed_prompt_len is None]
    if not replies and not likes:
        return requests
    if count_tokens is None:
        raise ValueError("count_tokens is needed: these requests take their lengths from texts")
    counts = count_tokens([*replies, *likes])
    if len(counts) != len(replies) + len(likes):
        raise ValueError(f"count_tokens gave {len(counts)} counts of {len(replies) + len(likes)} texts")
    outputs, prompts = iter(counts[: len(replies)]), iter(counts[len(replies) :])
    found = []
    for request in requests:
        if request.output_len is None:
            request = replace(request, output_len=next(outputs))
        if request.like is not None and request.claimed_prompt_len is None:
            length = workload.shared_prefix + max(1, next(prompts))
            request = replace(request, claimed_prompt_len=length, like=None)
        found.append(request)
    return found


def _fitted(
    requests: list[Request], max_context: int | None, count_tokens: CountTokens | None
) -> tuple[list[Request], list[str]]:
    """Returns the requests, those of drawn lengths within the model's context, and a note of how many were cut."""
    drawn = [request for request in requests if request.drawn]
    if not drawn or max_context is None:
        return requests, []
    texts = [request.prompt for request in drawn if _prompt_tokens(request) is None]
    if texts and count_tokens is None:
        raise ValueError("count_tokens is needed: what a prompt leaves of the context is not known")
    counts = iter(count_tokens(texts) if count_tokens is not None and texts else [])
    found, cut = [], 0
    for request in requests:
        if request.drawn:
            prompt_tokens = _prompt_tokens(request)
            whole = (next(counts) if prompt_tokens is None else prompt_tokens, request.output_len or 0)
            prompt, output = fitted(*whole, request.drawn, max_context)
            cut += (prompt, output) != whole
            request = _cut(request, prompt, output)
        found.append(request)
    if not cut:
        return found, []
    return found, [f"{cut:,} of {len(drawn):,} drawn lengths were cut to the model's context of {max_context:,} tokens"]


def _prompt_tokens(request: Request) -> int | None:
    """Returns how long a prompt is, where that need not be counted: made-up ones are as long as asked for."""
    if request.prompt_ids is not None:
        return len(request.prompt_ids)
    return request.claimed_prompt_len if not request.prompt or "input_len" in request.drawn else None


def _cut(request: Request, prompt: int, output: int) -> Request:
    if "input_len" not in request.drawn:
        return replace(request, output_len=output)
    ids = None if request.prompt_ids is None else request.prompt_ids[:prompt]
    text = request.prompt[: len(HI) * max(1, prompt - 1)]
    return replace(request, prompt=text, prompt_ids=ids, claimed_prompt_len=prompt, output_len=output)


def _with_ids(requests: list[Request], workload: Workload, vocab_size: int | None) -> list[Request]:
    """Returns the requests, each without a prompt with ``claimed_prompt_len`` ids, the same ones for the same seed."""
    if all(request.prompt or request.prompt_ids is not None for request in requests):
        return requests
    if vocab_size is None or vocab_size < 1:
        raise ValueError(f"vocab_size is needed to draw random token ids, not {vocab_size}")
    # The first three ids are <unk>, <s> and </s> in LLaMA-2's vocabulary. A list, because ids drawn from it
    # are shared objects; a range would make a new one for every token.
    ids = list(range(min(3, vocab_size - 1), vocab_size))
    rng, shared = random.Random(workload.seed), random.Random(f"{workload.seed} shared_prefix")
    prefixes = [tuple(shared.choices(ids, k=workload.shared_prefix)) for _ in range(workload.prefixes)]
    found = []
    for request in requests:
        if not request.prompt and request.prompt_ids is None:
            length = request.claimed_prompt_len or 0
            prefix: Sequence[int] = prefixes[request.index % len(prefixes)][:length]
            own = rng.choices(ids, k=length - len(prefix))
            request = replace(request, prompt_ids=tuple(chain(prefix, own)))
        found.append(request)
    return found


def check_stop(workload: Workload, stop_strings: Sequence[str]) -> None:
    """Raises UserError where a file asks for other stop strings than ``generation.stop_strings``."""
    if workload.stop_strings is None or sorted(workload.stop_strings) == sorted(stop_strings):
        return
    asked = json.dumps(workload.stop_strings, ensure_ascii=False)
    found = f"{quoted(list(stop_strings))}, but the requests of {quoted(workload.path, 200)} have stop: {asked}"
    plain = not any(sign in asked for sign in ("'", '\\"', "\\\\"))  # what a shell takes as it is written in JSON
    remedy = f"give the file's: $'generation.stop_strings={asked}'" if plain else "give the file's"
    raise UserError("generation.stop_strings", found, remedy)
