"""Which files of a local directory are the rows of a Hugging Face data set, split by split."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.basics.errors import UserError, quoted

DATA_FILE = re.compile(r"(?P<stem>[^.].*?)\.(?P<kind>parquet|arrow|jsonl|json|csv)(\.gz)?")
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # of a set, not in it
SHARD = re.compile(r"[-_.][0-9]+(-of-[0-9]+)?(-[0-9a-f]{16})?$")  # train-00000-of-00002
SPLITS = ("train", "test", "validation", "valid", "val", "dev")  # a folder of that name is one
DEEPEST = 4  # folders below the one given


def holds_data(path: str) -> bool:
    """Returns whether a directory looks like a data set."""
    return os.path.isfile(os.path.join(path, "dataset_dict.json")) or any(True for _ in _walked(Path(path)))


def files_of(path: str, split: str | None) -> list[Path]:
    """Returns the files that hold a split's rows, sorted, all of one kind.

    Args:
        path: of what ``save_to_disk`` has written, or of a folder with parquet, arrow, jsonl, json or csv files.
        split: which of several; None where there is but one.

    Raises:
        UserError: there is none, or which ones they are cannot be told.
    """
    root = Path(path)
    try:
        if not root.is_dir():
            raise _error("a file, not a directory" if root.exists() else "no such directory", path)
        if (root / "dataset_dict.json").is_file():
            names = _described(root / "dataset_dict.json").get("splits")
            if not isinstance(names, list) or not all(_plain(name) for name in names):
                raise _error("its dataset_dict.json names no splits", path)
            return _saved(root / _chosen(names, split, path), None)
        if (root / "state.json").is_file():
            return _saved(root, split)
        return _in_folder(root, split)
    except OSError as error:
        raise _error(f"cannot be read ({error.strerror or error})", path) from error
    except ValueError as error:  # a NUL or a lone surrogate in the path
        raise _error(f"not a path ({error})", path) from error


def _error(found: str, path: str | Path, remedy: str = "give the path of a Hugging Face data set") -> UserError:
    return UserError("dataset.path", f"{found}: {quoted(str(path), 300)}", remedy)


def _plain(name: Any) -> bool:
    """Returns whether a name in a file is one of a file or folder beside it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def _described(path: Path) -> dict[str, Any]:
    """Returns a small JSON object; raises UserError."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise _error("no JSON object", path, "copy the data set again")
    return found


def _chosen(names: Sequence[str], split: str | None, path: str) -> str:
    """Returns the split that is read; raises UserError where it is not one of those there are."""
    there = f"{quoted(path, 200)} has the splits {quoted(list(names), 150)}"
    if split is None and len(names) == 1:
        return names[0]
    if split is None:
        raise UserError("dataset.split", f"not given, but {there}", "name one of them with dataset.split=")
    if split not in names:
        raise UserError("dataset.split", f"{quoted(split)} is none: {there}", "name one of those")
    return split


def _saved(folder: Path, split: str | None) -> list[Path]:
    """Returns the files that a saved split's ``state.json`` names."""
    state = _described(folder / "state.json")
    if split is not None and split != state.get("_split"):
        _chosen([str(state.get("_split"))], split, str(folder))
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise _error("its rows are chosen by an index", folder, "save it again after flatten_indices()")
    entries = state.get("_data_files")
    entries = entries if isinstance(entries, list) else []
    names = [one.get("filename") if isinstance(one, dict) else None for one in entries]
    if not names or not all(_plain(name) for name in names):
        raise _error("its state.json names no data files", folder, "copy the data set again")
    return sorted(folder / str(name) for name in names)


def _walked(root: Path) -> Iterator[tuple[Path, re.Match[str]]]:
    """Yields the data files in a folder and those below it, hidden ones left out."""
    for place, folders, names in os.walk(root):
        deep = len(Path(place).relative_to(root).parts)
        folders[:] = [] if deep >= DEEPEST else sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name not in DESCRIPTIONS and (found := DATA_FILE.fullmatch(name)):
                yield Path(place) / name, found


def _in_folder(root: Path, split: str | None) -> list[Path]:
    """Returns the files of a split in a folder as hubs have them, the split being in a file's or a folder's name."""
    splits: dict[str, dict[tuple[Path, str], list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path, found in _walked(root):
        within = path.parent.name if path.parent != root else ""
        stem = SHARD.sub("", found["stem"])
        name = within if within in SPLITS or (stem.isdigit() and within) else stem
        splits[name][path.parent, found["kind"]].append(path)
    if not splits:
        raise _error("no parquet, arrow, jsonl, json or csv file in it", root)
    name = _chosen(sorted(splits), split, str(root))
    if len(splits[name]) > 1:
        groups = sorted({os.path.join(os.path.relpath(folder, root), f"*.{kind}") for folder, kind in splits[name]})
        remedy = "give the path of one of its folders, or of one file with its own dataset= option"
        raise _error(f"the split {quoted(name)} is there more than once, in {quoted(groups, 150)}", root, remedy)
    return sorted(path for files in splits[name].values() for path in files)
