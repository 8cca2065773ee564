"""Proves the tokens of a run: ``python -m harness.verify RUN_ID [--against RUN_ID] [--model [DIR]]``.

Always first, of each run by itself: a recount from its token ids (:mod:`harness.verify.recount`). ``--against``
compares two runs of the same work request by request; ``--model`` asks Hugging Face's model, in float32 and fed the
same tokens, whether differences are near-ties, or judges every token of the one run. A near-tie's gap is within
:data:`harness.models.judging.BOUNDS`, where they come from is said there.

Exit status 0: right (exact, or all differences explained). 1: wrong, or not explained since ``--model`` is missing. 2:
the runs cannot be compared, or the command line is wrong.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from harness.basics.command import Parser, not_negative, output_ended, positive, show_any_text
from harness.basics.errors import INTERRUPTED, UserError, report
from harness.config.schema import GenerationConfig
from harness.models import loaded
from harness.models.architecture import positive_integer
from harness.models.chat import rendered
from harness.models.ends import Ends
from harness.models.judging import COARSE_REFERENCE, bound_for, judge
from harness.models.source import Source
from harness.models.tokenizer import load_tokenizer
from harness.verify import models, runs, simulated
from harness.verify.pairs import Pair, compare, refuse_other_work
from harness.verify.prompts import at_hand, lengths, tokenized
from harness.verify.recount import Finding, Known, Recount, recount
from harness.verify.report import Verification, show
from harness.verify.runs import RecordedRun
from harness.workload.records import Request

if TYPE_CHECKING:
    from harness.models.reference import Reference

DEFAULT_RESULTS = "results"
DEFAULT_LIMIT = 10
EXIT_WRONG = 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m harness.verify",
        description="Proves the tokens of a run: recounts it, compares it with another run, or with the model itself.",
        epilog="Exit status 0: right; 1: wrong, or differences not explained; 2: cannot be compared.",
    )
    parser.add_argument("run", metavar="RUN_ID", help="a run id, an unambiguous part of one, or a run's directory")
    parser.add_argument("--against", metavar="RUN_ID", help="compare with this run of the same work")
    parser.add_argument(
        "--results", metavar="DIR", default=DEFAULT_RESULTS, help=f"where the runs are ({DEFAULT_RESULTS})"
    )
    parser.add_argument(
        "--model",
        metavar="DIR",
        nargs="?",
        const="",
        help="ask the model: of each difference, or without --against of every token (the one in the run's record)",
    )
    for name in models.TRUSTED:
        text = f"with --model, for a run with model.{name}=true: you trust the checkpoint too"
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=text)
    parser.add_argument("--dataset", metavar="FILE", help="where the run's dataset lies now (as in the record)")
    parser.add_argument(
        "--samples", type=positive, metavar="N", help="with --model, without --against: judge N random requests (all)"
    )
    parser.add_argument(
        "--bound",
        type=not_negative,
        metavar="X",
        help="largest gap of a near-tie, in standard deviations of the logits (by the runs' types)",
    )
    parser.add_argument(
        "--limit", type=positive, default=DEFAULT_LIMIT, metavar="N", help=f"differences shown ({DEFAULT_LIMIT})"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    show_any_text()
    try:
        outcome = _run(options := _parser().parse_args(arguments))
        sys.stdout.write(outcome.as_json() if options.json else show(outcome, options.limit))
        sys.stdout.flush()
    except UserError as error:
        return report(error)
    except OSError as error:
        if status := output_ended(error):
            return status
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0 if outcome.right else EXIT_WRONG


def _run(options: argparse.Namespace) -> Verification:
    for name in ("samples", "bound"):
        if getattr(options, name) is not None and options.model is None:
            raise UserError(f"--{name}", "says how the model judges, and no model is asked", "add --model")
    if options.samples is not None and options.against is not None:
        raise UserError("--samples", "all differences between two runs are judged", "leave out one of the two")
    one = runs.load(runs.find(options.run, options.results))
    both = [one]
    if options.against is not None:
        other = runs.load(runs.find(options.against, options.results))
        if other.directory.resolve() == one.directory.resolve():
            raise UserError("--against", f"{one.run_id} is the run itself", "name another run")
        refuse_other_work(one, other)
        both.append(other)
    if options.model is None:
        outcome = Verification([_recount(run, options) for run in both], both)
        if len(both) == 2:
            outcome.pair = compare(*both)
        return outcome
    return _with_model(both, options)


def _recount(run: RecordedRun, options: argparse.Namespace) -> Recount:
    """Recounts a run with what is at hand without its model: its requests and, by its tokenizer, its prompts."""
    if run.record.get("simulated"):
        return simulated.recounted(run, options.dataset)
    try:
        source, tokenizer = at_hand(run)
    except UserError as error:
        requests = runs.read_requests(run, options.dataset)
        why = [f"prompt_tokens were not checked: {error}"]
        why += [f"output lengths were not checked: {requests.unknown}"] if requests.unknown is not None else []
        return recount(run, Known(requests.by_index, unknown=tuple(why)))
    vocab_size = positive_integer(source.architecture.get("vocab_size")) or None
    requests = runs.read_requests(
        run,
        options.dataset,
        vocab_size=vocab_size,
        count_tokens=lambda texts: lengths(texts, tokenizer),
        render=lambda chats: rendered(tokenizer, chats),
        architecture=source.architecture,
    )
    if requests.by_index is None:
        found = recount(run, Known(unknown=(f"prompt_tokens and output lengths were not checked: {requests.unknown}",)))
    else:
        prompts = tokenized(requests.by_index, tokenizer)
        generation = run.group("generation", GenerationConfig)
        ends = Ends.of(None, generation, tokenizer)
        found = recount(run, Known(requests.by_index, prompts, ends, architecture=source.architecture))
    if loaded.checkpoints(run.record) and (wrong := models.other_name(run, source, "")):
        found.findings.append(Finding(None, wrong))
    return found


def _with_model(both: list[RecordedRun], options: argparse.Namespace) -> Verification:
    """Returns what the model says of one run, or of the differences between two."""
    one = both[0]
    for run in both:
        simulated.refuse_model(run)
    source = models.find(one, options.model, [name for name in models.TRUSTED if getattr(options, name)])
    models.refuse_other_checkpoint(both, source, options.model)
    generation = one.group("generation", GenerationConfig)
    dtypes = [run.record.get("dtype") for run in both]
    quantized = any(run.record.get("quantization") for run in both)
    bound = bound_for(*dtypes, quantized=quantized, given=options.bound)
    # All checks of the files are done; what follows takes seconds to import, and may take minutes to load.
    from harness.machine.device import accelerator
    from harness.models.reference import Reference
    from harness.verify.in_run import as_user_error

    device = "cuda:0" if accelerator() == "cuda" else "cpu"
    drawn_by = one.record.get("kernels"), one.record.get("device")
    if source.kind == "dummy" and (drawn_by[0] == "deepspeed" or drawn_by[1] not in (None, accelerator())):
        found = "the run's random weights, drawn by other kernels or on another kind of device, cannot be drawn again"
        raise UserError("--model", found, "compare it with another run by --against alone")
    tokenizer = load_tokenizer(source)
    by_run = [_needed(run, source, tokenizer, options) for run in both]
    requests = max(by_run, key=len)  # of the same dataset, so that the fewer are among them
    prompts = tokenized(requests, tokenizer)
    with as_user_error("--model"):
        reference = Reference(source, str(dtypes[0] or "float32"), generation, device, _sharded(one))
        if not reference.exact and options.bound is None:
            bound *= COARSE_REFERENCE
        outcome = Verification([], both, bound=bound, reference=reference.description)
        for run, own in zip(both, by_run, strict=True):
            known = Known(own, prompts, reference.ends, reference.vocab_size, architecture=source.architecture)
            known = replace(known, decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
            outcome.recounts.append(recount(run, known))
            if wrong := models.other_name(run, source, options.model):
                outcome.recounts[-1].findings.append(Finding(None, wrong))
        outcome.token_text = lambda token: tokenizer.decode([token])
        if len(both) == 2:
            outcome.pair = compare(*both)
            _explain(outcome, outcome.pair, prompts, reference)
        else:
            _judge(outcome, one, prompts, reference, options.samples)
    return outcome


def _needed(run: RecordedRun, source: Source, tokenizer: Any, options: argparse.Namespace) -> dict[int, Request]:
    """Returns a run's requests by index; raises UserError where its dataset is not at hand."""
    requests = runs.read_requests(
        run,
        options.dataset,
        vocab_size=source.architecture.get("vocab_size"),
        count_tokens=lambda texts: lengths(texts, tokenizer),
        render=lambda chats: rendered(tokenizer, chats),
        architecture=source.architecture,
        needed=True,
    ).by_index
    assert requests is not None
    return requests


def _sharded(run: RecordedRun) -> bool:
    tp = run.record.get("tp")
    return isinstance(tp, int) and tp > 1


def _explain(outcome: Verification, pair: Pair, prompts: dict[int, list[int]], reference: Reference) -> None:
    """Has the reference judge all tokens of both runs, of each request of which nothing but tokens differ."""
    from harness.basics.terminal import Steps
    from harness.models.reference import Answer

    lines = [{line["index"]: line for line in run.completions} for run in outcome.runs]
    asked = [difference for difference in pair.differences if difference.reason is None and difference.index in prompts]
    answers = [
        Answer(difference.index, prompts[difference.index], by_index[difference.index]["token_ids"])
        for difference in asked
        for by_index in lines
    ]
    with Steps("differences judged", sys.stderr) as steps:
        scores = list(reference.scores(answers, lambda done, of: steps.update(done // 2, of // 2)))
    for number, difference in enumerate(asked):
        assert difference.position is not None
        one, other = (scores[2 * number + side].gaps for side in range(2))
        outcome.gaps[difference.index] = one[difference.position], other[difference.position]
        outcome.largest[difference.index] = max((*one, *other), key=lambda gap: math.inf if math.isnan(gap) else gap)


def _judge(
    outcome: Verification, run: RecordedRun, prompts: dict[int, list[int]], reference: Reference, samples: int | None
) -> None:
    """Has the reference judge every token of a run, or of so many random requests of it."""
    from harness.basics.terminal import Steps
    from harness.models.reference import Answer
    from harness.verify.in_run import sample

    done = {line["index"]: line["token_ids"] for line in run.completions if line["finish_reason"] != "rejected"}
    known = [index for index in done if index in prompts and done[index]]
    if not known:
        raise UserError("run", f"{run.run_id} completed no request that its dataset has", "name another run")
    chosen = sorted(known) if samples is None else sample(known, samples, run.run_id)
    if len(chosen) < len(known):
        outcome.notes.append(f"{len(chosen)} of {len(known)} requests were judged, drawn with the run id as seed")
    answers = [Answer(index, prompts[index], done[index]) for index in chosen]
    assert outcome.bound is not None
    with Steps("requests judged", sys.stderr) as steps:
        for answer, scores in zip(answers, reference.scores(answers, steps.update), strict=True):
            outcome.judgements.append(judge(answer.index, scores, outcome.bound))


if __name__ == "__main__":
    sys.exit(main())
