"""What is asked of an engine, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

MAX_LENGTH = 1_000_000  # tokens of one prompt or one output


@dataclass(slots=True)
class PassRecord:
    """One forward pass: times in seconds from the start of the clock, counts of tokens and sequences.

    What attention and the head cost by, and drafts, an engine that does not know them leaves None.
    """

    step: int
    started_s: float
    seconds: float
    tokens: int
    prompt_tokens: int
    decode_tokens: int
    sequences: int
    kv_utilisation: float | None  # 0..1; None for an engine without a paged cache
    waiting: int | None
    logit_rows: int | None = None  # tokens after which an id is given: of each sequence the newest, and its drafts
    kv_read_tokens: int | None = None  # keys that are read, each sequence's once
    attention_pairs: int | None = None  # of a token and a key that it sees
    draft_tokens: int | None = None  # of decode_tokens, those that were drafted


PASS_COLUMNS = tuple(field.name for field in fields(PassRecord))


class Message(NamedTuple):
    """One message of a chat."""

    role: str  # "system", "user", "assistant", ...: whatever the model's template knows
    content: str


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to run."""

    index: int  # position among the requests of the workload, from 0
    prompt: str  # empty when prompt_ids is given; of a chat what its messages say, for estimates alone
    output_len: int | None  # tokens to generate; None until resolve() has counted the reply (sharegpt)
    claimed_prompt_len: int | None = None  # what the file says; only ever compared, never trusted
    prompt_ids: tuple[int, ...] | None = None  # in place of text (dataset=synthetic dataset.prompt=random)
    reply: str | None = None  # sharegpt: the reference whose token count becomes output_len
    messages: tuple[Message, ...] | None = None  # a chat, which the model's template turns into prompt_ids
    id: str | None = None  # what the file calls it, for the completion
    like: str | None = None  # the text whose token count becomes the length of the drawn prompt_ids (synthetic)
    drawn: tuple[str, ...] = ()  # of input_len and output_len, those that were drawn: they may be cut to the context


@dataclass(slots=True)
class Completion:
    """One finished or rejected request: one line of ``completions.jsonl``, fields in this order."""

    index: int
    prompt_tokens: int  # its ids, BOS included, padding never; 0 when rejected
    output_tokens: int  # ids generated, EOS included
    finish_reason: str  # "eos", "stop" (a stop string or stop id), "length" or "rejected"
    token_ids: list[int]  # the generated ids
    text: str
    first_token_s: float | None  # seconds after the clock started
    finished_s: float | None
    error: str | None = None  # why it was rejected
    id: str | None = None  # the request's; None where the dataset has no ids
    shared_tokens: int | None = None  # of the prompt, not computed, as another begins alike; None: nothing is shared


@dataclass(frozen=True, slots=True)
class Workload:
    """The requests of a run and where they came from."""

    name: str  # the dataset= option
    requests: list[Request]  # in the file's order; requests[i].index == i
    path: str | None  # None for synthetic
    sha256: str | None  # of the file's bytes as stored, compressed if they are, and of a file of lengths; None for none
    left_out: int = 0  # sharegpt: unusable conversations passed over on the way to the last request
    seed: int = 0  # synthetic: of the ids which resolve() draws
    shared_prefix: int = 0  # synthetic: of those ids, how many at the beginning are shared
    prefixes: int = 1  # synthetic: how many such beginnings there are
    notes: tuple[str, ...] = ()  # choices that were made for the user, and what could not be followed, for the record
    stop_strings: tuple[str, ...] | None = None  # what all requests of the file ask for; None where it cannot say
