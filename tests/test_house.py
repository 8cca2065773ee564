"""The house: nothing is longer than ``harness/README.md`` says, and its top level is what it says there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from support import repeats

ROOT = Path(__file__).resolve().parent.parent
MODULE, CLASS, FUNCTION = 350, 250, 60  # lines
TEST_MODULE = 510  # one subject's tests are easier to find in one file
LISTED = re.compile(r"^\| `([^`]+)` \| \d+ \| \S.* \|$", re.MULTILINE)


def too_long(path: Path) -> Iterator[str]:
    """Yields a module, and what is in it, that has too many lines, as ``path`` or ``path: Class.method``."""
    text = path.read_text()
    name = str(path.relative_to(ROOT))
    if len(text.splitlines()) > (TEST_MODULE if name.startswith("tests/") else MODULE):
        yield name

    def inside(node: ast.AST, within: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                lines = (child.end_lineno or child.lineno) - child.lineno + 1
                called = f"{within}{child.name}"
                if lines > (CLASS if isinstance(child, ast.ClassDef) else FUNCTION):
                    yield f"{name}: {called}"
                yield from inside(child, f"{called}.")

    yield from inside(ast.parse(text), "")


def test_what_is_too_long_is_listed_with_its_reason() -> None:
    directories = ("harness", "launch", "tests")
    found = [one for place in directories for path in sorted((ROOT / place).rglob("*.py")) for one in too_long(path)]
    listed = LISTED.findall((ROOT / "harness" / "README.md").read_text())
    assert sorted(found) == sorted(listed)


def test_the_top_level_is_the_entry_the_commands_and_the_rooms() -> None:
    names = {path.name for path in (ROOT / "harness").iterdir() if path.name != "__pycache__"}
    commands = {"compare", "verify", "accuracy", "plan", "doctor"}
    rooms = {"basics", "config", "machine", "workload", "models", "costs", "ranks", "results", "engines", "running"}
    assert names == {"main.py", "__init__.py", "README.md"} | commands | rooms


def test_what_is_left_to_the_longer_tier_is_there() -> None:
    named = list(repeats.kept())
    assert named == sorted(named)
    for node in named:
        module, _, name = node.partition("::")
        tree = ast.parse((ROOT / module).read_text())
        assert name in {one.name for one in tree.body if isinstance(one, ast.FunctionDef)}, node
