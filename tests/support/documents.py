"""The project's documents taken apart: blocks, the commands in them, and tables."""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# What a reader must have beside this project for a block's commands: written behind its language, as in ``bash gpu``.
MARKS = frozenset({"gpu", "hosts", "files"})
LANGUAGES = frozenset({"bash", "text", "python", "yaml", "json"})
WORDS = ("bash", "deepspeed", "pip", "pytest", "python", "sbatch", "source", "taskset", "time")  # commands begin with
_FENCE = re.compile(r"( *)(```+)(.*)")
_VARIABLE = re.compile(r"[A-Z_]+=.*", re.S)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: where it begins, what it says it is, and its lines."""

    document: str
    line: int
    info: tuple[str, ...]
    text: str

    @property
    def place(self) -> str:
        """Where it is, for messages and names of cases."""
        return f"{self.document}:{self.line}"


@dataclass(frozen=True, slots=True)
class Command:
    """One command as a reader would type it, without its comment.

    Attributes:
        variables: what stands before it, such as ``OMP_NUM_THREADS=2``.
        words: the rest, without ``taskset -c 0`` and ``time``.
        marks: of its block; see :data:`MARKS`.
        inline: whether it stands in a sentence, where it is mentioned rather than shown.
    """

    place: str
    variables: tuple[str, ...]
    words: tuple[str, ...]
    marks: frozenset[str]
    inline: bool = False

    def __str__(self) -> str:
        return f"{self.place} {shlex.join(self.words)}"


def documents() -> list[Path]:
    """Returns the Markdown files that git tracks or would."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    names = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [ROOT / name for name in sorted(set(names)) if (ROOT / name).is_file()]


def parts(document: Path) -> tuple[list[Block], list[tuple[int, str]]]:
    """Returns the fenced blocks, and the lines outside them with their numbers."""
    name = document.relative_to(ROOT).as_posix()
    blocks: list[Block] = []
    prose: list[tuple[int, str]] = []
    opened: tuple[int, int, str, tuple[str, ...]] | None = None  # line, indentation, fence, info
    held: list[str] = []
    for number, line in enumerate(document.read_text(encoding="utf-8").split("\n"), 1):
        match = _FENCE.fullmatch(line)
        if opened is None and match is not None:
            opened, held = (number, len(match[1]), match[2], tuple(match[3].split())), []
        elif opened is None:
            prose.append((number, line))
        elif match is not None and match[2] == opened[2] and not match[3].strip():
            blocks.append(Block(name, opened[0], opened[3], "\n".join(held)))
            opened = None
        else:
            held.append(line[opened[1] :])
    assert opened is None, f"{name}:{opened[0] if opened else 0}: a block without an end"
    return blocks, prose


def commands(block: Block) -> list[Command]:
    """Returns the commands of a block of simple ones; a loop is none, and comes back empty."""
    if re.search(r"^\s*(for|while|if)\b", block.text, re.M):
        return []
    marks = frozenset(block.info[1:])
    lines = re.sub(r"\\\n", " ", block.text).split("\n")
    split = [shlex.split(line, comments=True) for line in lines]
    return [command(block.place, words, marks) for words in split if words]


def command(place: str, words: list[str], marks: frozenset[str] = frozenset(), inline: bool = False) -> Command:
    """Returns one command whose words are known."""
    count = 0
    while count < len(words) and _VARIABLE.fullmatch(words[count]):
        count += 1
    variables, rest = words[:count], words[count:]
    if rest[:1] == ["time"]:
        rest = rest[1:]
    if rest[:2] == ["taskset", "-c"]:
        rest = rest[3:]
    return Command(place, tuple(variables), tuple(rest), marks, inline)


def mentioned(document: Path) -> list[Command]:
    """Returns the commands in a document's sentences and tables: whatever stands in backticks and begins like one."""
    found = []
    name = document.relative_to(ROOT).as_posix()
    lines = parts(document)[1]
    text = "\n".join(line for _, line in lines)
    for match in re.finditer(r"`([^`]+)`", text):
        begin = re.sub(r"^([A-Z_]+=(\$\([^)]*\)|\S*) )+", "", match[1]).split()
        if len(begin) > 1 and (begin[0] in WORDS or begin[0].startswith(".venv/bin/")):
            number = lines[text[: match.start()].count("\n")][0]
            words = shlex.split(re.sub(r"\$\([^)]*\)", "X", match[1].replace("\n", " ")))
            found.append(command(f"{name}:{number}", words, inline=True))
    return found


def tables(document: Path) -> list[tuple[str, list[list[str]]]]:
    """Returns a document's tables, each with the heading above it; a ``|`` within backticks parts no cells."""
    found: list[tuple[str, list[list[str]]]] = []
    heading, before = "", ""
    for _, line in parts(document)[1]:
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if line.startswith("|"):
            row = [cell.strip() for cell in re.split(r"\|(?=(?:[^`]*`[^`]*`)*[^`]*$)", line.strip().strip("|"))]
            if not before.startswith("|"):
                found.append((heading, []))
            if not re.fullmatch(r"[|\s:-]+", line):
                found[-1][1].append(row)
        before = line
    return found
