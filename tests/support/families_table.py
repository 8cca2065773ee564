"""Which families the engines compute as Hugging Face does: collected, shown, and written as Markdown.

``PYTHONPATH=.:tests python tests/support/families_table.py`` tries all of them and writes
``harness/engines/FAMILIES.md``.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from packaging.version import Version

from support import families, families_check
from support.families_check import BFLOAT16, COLUMNS, DS_INFERENCE, FASTGEN, NATIVE, PARALLEL, Column

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENT = ROOT / "harness" / "engines" / "FAMILIES.md"

Outcomes = dict[str, dict[str, str]]  # by name, by column


def collect(names: Iterable[str], place: Path, columns: Iterable[Column] = COLUMNS) -> Outcomes:
    """Returns what becomes of each name.

    Args:
        place: a directory to write the models to.
    """
    columns = list(columns)
    found: Outcomes = {}
    sharp = {name: place / name.replace("/", "--").replace(" ", "_") for name in names}
    mild = {name: place / "mild" / directory.name for name, directory in sharp.items()}
    for name in sharp:
        built = families_check.outcome(partial(families.save, name, sharp[name]))
        if isinstance(built, str):
            found[name] = {"not built": built.removeprefix("TRACEBACK ")}
        elif set(columns) & set(BFLOAT16):
            families_check.outcome(partial(families.save, name, mild[name], sharp=1.0))
    directories = [directory for name, directory in sharp.items() if name not in found]
    parallel = on_two_ranks(directories, place) if set(columns) & set(PARALLEL) else {}
    for name, directory in sharp.items():
        if name not in found:
            found[name] = families_check.outcomes(directory, mild[name], parallel.get(directory.name, {}), columns)
    return {name: found[name] for name in sharp}


def on_two_ranks(directories: list[Path], place: Path) -> dict[str, dict[str, Any]]:
    """Returns what becomes of each directory's model on two ranks, by column; they start again where they hung."""
    from support.runs import deepspeed, python

    listed, lines = place / "parallel.txt", place / "parallel.jsonl"
    found: dict[str, dict[str, Any]] = {directory.name: {} for directory in directories}
    while left := [directory for directory in directories if len(found[directory.name]) < len(PARALLEL)]:
        listed.write_text("\n".join(map(str, left)))
        done = python(
            *deepspeed(2, "--log_level", "critical"),
            *map(str, (families_check.__file__, listed, lines)),
            timeout=7200,
            OMP_NUM_THREADS="1",
            PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}",
        )
        before = sum(map(len, found.values()))
        for name, title, outcome in families_check.read_parallel(lines):
            found[name].setdefault(title, outcome)
        if sum(map(len, found.values())) == before:  # it ended without an error message
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            for column in PARALLEL:
                found[left[0].name].setdefault(column.title, f"TRACEBACK of the launch: {last}")
    return found


def failures(outcomes: Outcomes) -> list[str]:
    """Returns a line for each outcome that must not be."""
    return [
        f"{name}, {title}: {outcome}"
        for name, row in outcomes.items()
        for title, outcome in row.items()
        if outcome.startswith(("WRONG", "TRACEBACK"))
    ]


def shown(outcomes: Outcomes) -> str:
    """Returns the outcomes as lines, those that are alike together, and counts by column."""
    lines: list[str] = []
    for name, row in outcomes.items():
        alike: dict[str, list[str]] = {}
        for title, outcome in row.items():
            alike.setdefault(outcome, []).append(title)
        lines += [f"{name:32} {', '.join(titles)}: {outcome}" for outcome, titles in alike.items()]
    for title in ("not built", *(column.title for column in COLUMNS)):
        kinds = Counter(row[title].split()[0].rstrip(":") for row in outcomes.values() if title in row)
        counts = {"models": sum(kinds.values())} if title == "not built" else kinds
        lines.append(f"{title:32} {', '.join(f'{number} {kind}' for kind, number in sorted(counts.items()))}")
    return "\n".join(lines)


def markdown(outcomes: Outcomes) -> str:
    """Returns the document: families and variants that an engine takes, and those that none does."""
    import transformers

    titles = [column.title for column in (FASTGEN, NATIVE, DS_INFERENCE)]
    lines = [
        "# Families that the engines compute",
        "",
        f"Written by `tests/support/families_table.py` for transformers {transformers.__version__}: a tiny random",
        "model of each causal LM, and of known traps (`family/variant`), its tokens in float32 compared with Hugging",
        "Face's `generate` of each request alone. What an engine does not compute it refuses in one line, before the",
        "clock.",
        "",
        "`/short`: within the model's windows, as `model.max_context` can have it. `/decoder`: an encoder's, or an",
        "encoder-decoder's, decoder. `tp=2`: both engines over two ranks.",
        "",
        "| family | fastgen torch | fastgen native | ds_inference | tp=2 |",
        "|---|---|---|---|---|",
    ]
    taken = {name: row for name, row in outcomes.items() if "right" in row.values()}
    for name, row in taken.items():
        parallel = [column.engine for column in PARALLEL if row.get(column.title) == "right"]
        cells = [_cell(row.get(title, "")) for title in titles]
        cells.append("yes" if len(parallel) == len(PARALLEL) else ", ".join(parallel) or "no")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    refused = [f"`{name}`" for name, row in outcomes.items() if name not in taken and "not built" not in row]
    lines += ["", f"No engine but baseline takes: {', '.join(refused) or 'none'}.", ""]
    reasons = {name: row["not built"].replace("`", "'") for name, row in outcomes.items() if "not built" in row}
    unbuilt = [f"- `{name}`: {reason}" for name, reason in reasons.items()]
    return "\n".join([*lines, *(["Not tried, for there is no such tiny model:", "", *unbuilt, ""] if unbuilt else [])])


def listed(document: str) -> list[str]:
    """Returns the families that a document of :func:`markdown` names, without their variants."""
    _, _, lists = document.partition("| family |")
    return sorted(name for name in re.findall(r"`([^`]+)`", lists) if "/" not in name)


def version(document: str) -> Version:
    """Returns the version of transformers that a document of :func:`markdown` is about."""
    return Version(re.findall(r"for transformers (\S+):", document)[0])


def _cell(outcome: str) -> str:
    return "yes" if outcome == "right" else "no" if outcome.startswith("refused") else "**wrong**"


def main() -> None:
    """Tries all families; writes the document."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as place:
        columns = [column for column in COLUMNS if column not in BFLOAT16]
        outcomes = collect(families.entries(), Path(place), columns)
    print(shown(outcomes))
    DOCUMENT.write_text(markdown(outcomes))
    sys.exit(bool(failures(outcomes)))


if __name__ == "__main__":
    main()
