"""lm-evaluation-harness over the harness's engines, registered there under the name ``harness``.

It behaves as lm-eval's own ``hf`` model does (prefix token, special tokens, truncation from the left, what a stop
string is), so that the two differ by nothing but who computes. From Python:

    lm_eval.simple_evaluate(HarnessLM(Pool(engine)), tasks=[...])
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from harness.accuracy.pool import Pool
from harness.basics.errors import UserError, quoted
from harness.config.schema import Stop
from harness.engines.scoring import Scored
from harness.workload.records import Request

MAX_GEN_TOKS = 256  # lm-eval's own, where a task sets none
MAX_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first counts
Pair = tuple[tuple[str, str], list[int], list[int]]


@register_model("harness")
class HarnessLM(TemplateLM):
    """What lm-eval asks of a model, answered by :class:`Pool`.

    Attributes:
        truncated: contexts that were cut on the left, to fit the model.
    """

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool = pool
        self.tokenizer = pool.engine.tokenizer
        self.max_length = pool.engine.settings.max_context
        self.truncated = 0

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence id."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is: BOS, or EOS where the tokenizer has no BOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer where lm-eval caches requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns the ids; with special tokens as the tokenizer has it, unless the text begins with BOS already."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **options))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns the conversation as the tokenizer's template writes it."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def _loglikelihood_tokens(self, requests: list[Pair], **kwargs: Any) -> list[tuple[float, bool]]:
        """Returns the log-probability of each continuation after its context, and whether it is the greedy one.

        Raises:
            UserError: one of them does not fit the KV cache, or has no tokens.
        """
        scores = self.pool.score(
            [
                Scored(index, self._fitting(context, len(target) - 1), target)
                for index, (_, context, target) in enumerate(requests)
            ]
        )
        for score in scores:
            if score.error is not None:
                raise UserError("--tasks", f"a continuation cannot be scored: {score.error}")
        return [(sum(score.logprobs), score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of whole texts, in windows of the model's context where they are longer."""
        windows: list[Pair] = []
        begins = [0]
        for request in requests:
            ids = self.tok_encode(request.args[0])
            for window in utils.get_rolling_token_windows(
                token_list=ids,
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length or len(ids) + 1,
                context_len=1,
            ):
                windows.append((("", ""), *utils.make_disjoint_window(window)))
            begins.append(len(windows))
        found = [logprob for logprob, _ in self._loglikelihood_tokens(windows)]
        return [sum(found[begin:end]) for begin, end in pairwise(begins)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns greedy continuations, cut before the first of a request's stop strings.

        Raises:
            UserError: a task asks for sampling, or a request cannot run.
        """
        if self.pool.engine.settings.generation.stop is not Stop.eos:
            raise UserError("generation.stop", "length: text after the end of an answer is none", "use stop=eos")
        asked = [generation_arguments(request.args[1]) for request in requests]
        completions = self.pool.generate(
            [
                Request(index, "", output_len, prompt_ids=tuple(self._fitting(self.tok_encode(text), output_len)))
                for index, ((text, _), (_, output_len)) in enumerate(
                    zip([request.args for request in requests], asked, strict=True)
                )
            ]
        )
        texts = []
        for completion, (until, _) in zip(completions, asked, strict=True):
            if completion.error is not None:
                raise UserError("--tasks", f"a request cannot run: {completion.error}")
            text = completion.text
            for stop in [*until, self.tokenizer.decode(self.eot_token_id)]:
                text = text.split(stop)[0] if stop else text
            texts.append(text)
        return texts

    def _fitting(self, context: list[int], more: int) -> list[int]:
        """Returns as much of the end of ``context`` as fits the model before ``more`` tokens.

        Raises:
            UserError: nothing does.
        """
        if self.max_length is None or len(context) + more <= self.max_length:
            return context
        room = self.max_length - more
        if room < 1:
            raise UserError("--tasks", f"{more} tokens and a context do not fit the model's {self.max_length}")
        self.truncated += 1
        return context[-room:]


def generation_arguments(arguments: dict[str, Any]) -> tuple[list[str], int]:
    """Returns the stop strings and the most tokens that a task's ``generation_kwargs`` ask for.

    Raises:
        UserError: they ask for anything but greedy decoding.
    """
    left = dict(arguments)
    until: str | Sequence[str] | None = left.pop("until", None)
    lengths = [left.pop(name, None) for name in MAX_TOKENS_NAMES]
    length = next((int(value) for value in lengths if value is not None), MAX_GEN_TOKS)
    temperature, sampling = float(left.pop("temperature", None) or 0), left.pop("do_sample", None)
    if sampling is None:
        sampling = temperature > 0
    if sampling or left:
        found = {name: arguments[name] for name in arguments if name in (*left, "do_sample", "temperature")}
        raise UserError("generation_kwargs", f"{quoted(found)}: the engines decode greedily", "use a greedy task")
    return [until] if isinstance(until, str) else list(until or []), length
