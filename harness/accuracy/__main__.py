"""How right an engine's tokens are: ``python -m harness.accuracy [options] [overrides]``.

The overrides are those of ``harness/main.py``; what is measured are the kernels, types and passes that it would run.

python -m harness.accuracy engine=fastgen dataset.num_samples=32                    (perplexity of the prompts)
python -m harness.accuracy --tasks mmlu engine=ds_inference --against RUN --within 1.5
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if __name__ == "__main__":
    # A script's own directory comes first on sys.path, where our modules would shadow installed packages.
    root = Path(__file__).resolve().parents[2]
    sys.path[:1] = [] if (root / "harness" / "conf").is_dir() else [str(root)]

from harness.basics.command import Parser, collect_seldom, not_negative, positive, whole
from harness.basics.errors import INTERRUPTED, REFUSED, UserError, report
from harness.basics.outcome import leave
from harness.basics.places import PROGRAM
from harness.basics.programs import beside_the_interpreter
from harness.config.compose import compose
from harness.engines import catalogue
from harness.ranks.rank import Rank, current, decoded, without_local_rank

if TYPE_CHECKING:
    from harness.running.job import Job

WITHIN = 1.5  # what the challenge allowed: MMLU within 1.5% of the unquantized model


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m harness.accuracy",
        description="Perplexity of an engine on the dataset's prompts, or lm-evaluation-harness tasks over it.",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help=f"as for {PROGRAM}: engine=fastgen model.dtype=bfloat16"
    )
    parser.add_argument("--tasks", metavar="NAME[,NAME]", help="tasks of lm-evaluation-harness, in place of perplexity")
    parser.add_argument("--include-path", metavar="DIR", help="where more task files are")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N questions of each task")
    parser.add_argument("--num-fewshot", type=whole, metavar="N", help="examples before each question")
    parser.add_argument(
        "--prefill", action="store_true", help="score in prompt passes, not by decode steps: faster (fastgen, baseline)"
    )
    parser.add_argument(
        "--against", metavar="RUN", help="an evaluation to compare with; exit status 1 if this one is worse"
    )
    parser.add_argument(
        "--within",
        type=not_negative,
        metavar="P",
        help=f"how much worse it may be: percent of perplexity, percentage points of a task's score ({WITHIN})",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command, or this rank's part of it; returns the exit status."""
    rank: Rank | None = None
    beside_the_interpreter()
    try:
        rank = current()
        words = decoded(without_local_rank(list(sys.argv[1:] if arguments is None else arguments)))
        options = _parser().parse_intermixed_args(words)
        _check(options)
        return _run(options, words, rank)
    except UserError as error:
        return report(error) if rank is None or rank.first else REFUSED
    except KeyboardInterrupt:
        return INTERRUPTED


def _check(options: argparse.Namespace) -> None:
    for name in ("include_path", "limit", "num_fewshot"):
        if getattr(options, name) is not None and options.tasks is None:
            raise UserError(f"--{name.replace('_', '-')}", "means nothing without --tasks", "add --tasks NAME")
    if options.within is not None and options.against is None:
        raise UserError("--within", "means nothing without --against", "add --against RUN")
    if options.tasks is not None and not all(options.tasks.split(",")):
        raise UserError("--tasks", f"{options.tasks!r} names no task in one place", "give NAME or NAME,NAME")


def _run(options: argparse.Namespace, words: list[str], rank: Rank | None) -> int:
    catalogue.register()
    composed = compose(options.overrides)
    # Only now: a mistyped command line is refused within a second.
    from harness.accuracy import session
    from harness.accuracy.tasks import TaskOptions

    asked = None
    if options.tasks is not None:
        asked = TaskOptions(options.tasks.split(","), options.include_path, options.limit, options.num_fewshot)
    within = WITHIN if options.within is None else options.within
    chosen = session.Options(asked, options.against, within, options.prefill)
    if rank is not None:
        return session.run(composed, rank, chosen)
    job = session.check(composed, chosen)
    return _launch(job, words) if job.ranks > 1 else session.run(composed, Rank(), chosen, job)


def _launch(job: Job, words: list[str]) -> int:
    """Starts the ranks, which do all the rest; returns their exit status."""
    from harness.running import launcher

    launcher.check_devices(job.tp, job.dp, job.accelerator)
    words = [*words, *launcher.split_words(job)]
    return launcher.run_program(Path(__file__).resolve(), job.ranks, job.accelerator, words, job.config.timeout_s)


def entry() -> NoReturn:
    """The command ``llama-harness-accuracy``."""
    collect_seldom()
    leave(main())


if __name__ == "__main__":
    entry()
