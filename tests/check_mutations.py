"""Plants faults into copies of the harness and forges finished runs; sees that every check that should notices.

    python tests/check_mutations.py [NAME ...] [--no-tests] [--list]

Each copy runs six requests of the sample on a small model in float32 with ``verify=6``. Then come the checks: the
run's own end (``run``), ``harness.verify`` by itself (``recount``), ``--against`` a run of the honest code, and
``--model``; the verifier is this tree's, not the copy's. ``tests`` runs the unit tests that lie nearest, in the copy.
Every check must pass without a fault. What "forges ..." are edits to the files of the honest run, which only the
verifier can notice.

``caught``: found wrong; ``refused``: the verifier said that the runs are not of the same work; ``-``: there was nothing
to check, as in a copy that ends without completions, which its ``run`` has caught then.

Exit status 0: all faults and forgeries were caught by all the checks named for them; 1: one was not; 2: a fault's place
in the code was not found, or is not the only one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.forgeries import FORGERIES, Forgery, findings, forge
from support.models import save_small_demo
from support.runs import ROOT, variables

from harness.models import demo
from harness.results.table import read_rows
from harness.verify import __main__ as verify

JOB = [
    "dataset.num_samples=6",
    "generation.max_output_len=8",
    "model.dtype=float32",
    "engine.kernels=torch",
    "verify=6",
]
OWN_CHECK = "its own check found"  # how the verifier tells what verify=6 has found
CHECKS = ("run", "recount", "against", "model")
PASSES, CAUGHT, REFUSED, NOTHING = "passes", "caught", "refused", "-"
FASTGEN, RESULTS = "tests/test_fastgen_engine.py", "tests/test_results.py"


@dataclass(frozen=True)
class Fault:
    """A piece of code and what stands in its place; which checks must notice, and whose unit tests must fail."""

    name: str
    old: str
    new: str
    caught_by: tuple[str, ...] = CHECKS
    tests: str = FASTGEN

    def places(self, tree: Path) -> list[Path]:
        """Returns the file that has the piece, once for each time that it is there: one, if all is well."""
        texts = {path: path.read_text() for path in sorted((tree / "harness").rglob("*.py"))}
        return [path for path, text in texts.items() for _ in range(text.count(self.old))]


FAULTS = (
    Fault(
        "drops a token",
        "sequence.uid, sequence.prompt_len, ids, reason,",
        "sequence.uid, sequence.prompt_len, ids[:3] + ids[4:], reason,",
    ),
    Fault(
        "counts padding",
        "sequence.uid, sequence.prompt_len, ids, reason,",
        "sequence.uid, -(-sequence.prompt_len // 64) * 64, ids, reason,",
        ("run", "against", "model"),  # without a tokenizer the sums are consistent with each other
    ),
    Fault(
        "swaps two sequences' caches",
        "        room = self.token_budget - decodes\n",
        "        room = self.token_budget - decodes\n"
        "        if decodes > 1:\n"
        "            one, two = running[0].blocks, running[1].blocks\n"
        "            one[0], two[0] = two[0], one[0]\n",
        ("run", "against", "model"),  # the counts are as they were
    ),
    Fault(
        "ignores the end of sequence",
        "            if token in watched and (reason := ends.reason(sequence.tokens, place)) is not None:\n",
        "            if (reason := None) is not None:\n",
        ("run", "against", "model"),
        "tests/test_scheduler.py",
    ),
    Fault(
        "computes at the position before",
        "                positions.append(start)\n",
        "                positions.append(start - 1)\n",
        ("run", "against", "model"),
    ),
    Fault(
        "gives rows to the wrong sequences",
        "        token_ids = launched.wait()\n",
        "        token_ids = launched.wait()[::-1]\n",
        ("run", "against", "model"),
    ),
    Fault(
        "loses a request",
        '        self.append(json_bytes(entry) + b"\\n")\n',
        '        self.append((json_bytes(entry) + b"\\n") * (completion.index != 3))\n',
        ("run",),  # which is failed then, and says so: nothing is left that contradicts it
        tests="tests/test_replicas.py tests/test_main.py::test_two_replicas_share_one_queue",
    ),
    Fault(
        "writes a request twice",
        '        self.append(json_bytes(entry) + b"\\n")\n',
        '        self.append((json_bytes(entry) + b"\\n") * (1 + (completion.index == 3)))\n',
        tests="tests/test_replicas.py tests/test_main.py::test_two_replicas_share_one_queue",
    ),
    Fault(
        "adds requests to the sum of tokens",
        "        total_tokens = self.prompt_tokens + self.output_tokens\n",
        "        total_tokens = self.prompt_tokens + self.output_tokens + self.completed\n",
        ("recount", "against", "model"),  # the run's own check is of tokens
        RESULTS,
    ),
    Fault(
        "stops the clock early",
        '            figures["total_tokens_per_s"] = total_tokens / elapsed_s\n',
        '            figures["total_tokens_per_s"] = total_tokens / (0.9 * elapsed_s)\n',
        ("recount", "against", "model"),
        RESULTS,
    ),
)


def copied(place: Path, fault: Fault | None) -> Path:
    """Returns a copy of the tree, with the fault in it."""
    left_out = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "*.egg-info")

    def ignored(directory: str, names: list[str]) -> set[str]:
        return left_out(directory, names) | ({"results"} if Path(directory) == ROOT else set())

    tree = shutil.copytree(ROOT, place / "tree", ignore=ignored)
    if fault is not None:
        found = fault.places(tree)
        if len(found) != 1:
            print(f"error: {fault.name}: its place in the code is there {len(found)} times", file=sys.stderr)
            sys.exit(2)
        found[0].write_text(found[0].read_text().replace(fault.old, fault.new))
    return tree


def python(tree: Path, *arguments: str) -> int:
    """Runs Python on the code in ``tree`` and returns its exit status."""
    environment = variables(PYTHONPATH=str(tree))
    line = [sys.executable, *arguments]
    return subprocess.run(line, cwd=tree, env=environment, capture_output=True, timeout=900).returncode


def verified(directory: Path, *arguments: str, may_refuse: bool = False) -> str:
    """Returns what ``harness.verify`` finds by itself, whatever the run has noticed of it before."""
    if not (directory / "completions.jsonl").is_file():
        return NOTHING
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = verify.main([str(directory), "--json", *arguments])
    said = errors.getvalue()
    if may_refuse and status == 2 and said.startswith("error: --") and said.count("\n") == 1:
        return REFUSED
    if status not in (0, 1):  # a verifier that breaks down has caught nothing
        sys.exit(f"error: {directory}: harness.verify {' '.join(arguments)}: {said.strip()}")
    found = json.loads(output.getvalue())
    noticed = (
        found["wrong"] or found["unexplained"] or [text for text in findings(found) if not text.startswith(OWN_CHECK)]
    )
    return CAUGHT if noticed else PASSES


def planted(
    fault: Fault | None, place: Path, model: Path, honest: Path | None, tests: bool
) -> tuple[dict[str, str], Path]:
    """Runs a copy and all checks; returns what each said, and the run's directory."""
    tree, results = copied(place, fault), place / "results"
    status = python(tree, "harness/main.py", *JOB, f"model.path={model}", f"results_dir={results}")
    rows = read_rows(results / "runs.csv") if (results / "runs.csv").is_file() else []
    directory = results / (rows[0]["run_id"] if rows else "none")
    right = status == 0 and [row["status"] for row in rows] == ["ok"]
    said = {"run": PASSES if right else CAUGHT}
    for check, arguments in _arguments(honest).items():
        said[check] = verified(directory, *arguments)
    if tests:
        for_all = {each for one in FAULTS for each in one.tests.split()}
        named = sorted(for_all) if fault is None else fault.tests.split()
        passed = python(tree, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--all", *named) == 0
        said["tests"] = PASSES if passed else CAUGHT
    shutil.rmtree(tree)
    return said, directory


def forged(forgery: Forgery, place: Path, honest: Path) -> dict[str, str]:
    """Forges a copy of the honest run and returns what each check said."""
    shutil.copytree(honest.parent, place / "results")
    directory = place / "results" / honest.name
    forge(directory, forgery.change)
    checks = _arguments(honest).items()
    return {check: verified(directory, *arguments, may_refuse=True) for check, arguments in checks}


def _arguments(honest: Path | None) -> dict[str, list[str]]:
    """Returns how the verifier is called for each of its checks."""
    return {"recount": [], "against": ["--against", str(honest)] if honest is not None else [], "model": ["--model"]}


def missed(change: Fault | Forgery | None, said: dict[str, str]) -> list[str]:
    """Returns the checks that did not say what they must."""
    if change is None:
        return [check for check in said if said[check] != PASSES]
    must = [*change.caught_by, *(["tests"] if isinstance(change, Fault) else [])]
    wrong = [check for check in said if check in must and said[check] == PASSES]
    if NOTHING in said.values() and said.get("run") == PASSES:  # only a run that says so may leave nothing to check
        wrong.append("run")
    return list(dict.fromkeys(wrong))


def main() -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults to plant, forgeries to make (all)")
    parser.add_argument("--no-tests", action="store_true", help="leave out the unit tests")
    parser.add_argument("--list", action="store_true", help="print their names and end")
    options = parser.parse_args()
    changes: list[Fault | Forgery] = [*FAULTS, *FORGERIES]
    if options.list:
        print("\n".join(change.name for change in changes))
        return 0
    if unknown := set(options.names) - {change.name for change in changes}:
        print(f"error: NAME: no fault {sorted(unknown)[0]!r}; see --list", file=sys.stderr)
        return 2
    checks = (*CHECKS, *(() if options.no_tests else ("tests",)))
    print(f"{'fault':36}" + "".join(f"{check:>10}" for check in checks), flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as base:
        model = save_small_demo(Path(base) / "model", demo.ensure())
        honest: Path | None = None
        chosen = [change for change in changes if not options.names or change.name in options.names]
        for number, change in enumerate([None, *chosen]):
            place = Path(base) / str(number)
            place.mkdir()
            if isinstance(change, Forgery):
                assert honest is not None
                said = forged(change, place, honest)
            else:
                said, directory = planted(change, place, model, honest, not options.no_tests)
                honest = honest or directory
            wrong = missed(change, said)
            failed += len(wrong)
            cells = [said.get(check, NOTHING) + " !" * (check in wrong) for check in checks]
            print(f"{change.name if change else '(none)':36}" + "".join(f"{cell:>10}" for cell in cells), flush=True)
    print(f"{failed} checks did not do what they must (!)" if failed else "every fault was caught, and nothing else")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
