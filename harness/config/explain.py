"""Hydra's and OmegaConf's exceptions as one line that names the field, the value and the way out."""

from __future__ import annotations

import difflib
import re
import shlex

from harness.basics.errors import UserError, one_line, quoted
from harness.config import greedy
from harness.config.engine_schemas import owners, registered
from harness.config.reference import KINDS, every

HOW_TO_WRITE = "write group=option or group.key=value, special characters in quotes inside the shell's: \"key='a,b'\""
CHECKPOINT_ALONE = "model.path=DIR alone is enough, for a checkpoint has its own config"
SEE_HELP = "see --help for the keys and their values"
PARSER_S_WORDS = "mismatched input|no viable alternative|extraneous input|token recognition|NoViableAlt|missing .* at "


def explain(error: BaseException) -> UserError:
    """Returns ``error``, raised while a config was composed, as a line for the user."""
    text = _messages(error)
    if match := re.search(
        r"Could not find '([^']+)/([^'/]+)'.*?Available options in '[^']+':\n((?:\t\S+\n)+)", text, re.S
    ):
        return _no_option(match[1], match[2], match[3].split())
    if match := re.search(
        r"Value '(.*?)' of type '(\w+)' could not be converted to (\w+).*?full_key: (\S+)", text, re.S
    ):
        return UserError(match[4], f"'{match[1]}' is no {_kind(match[3])}", _wanted(match[4], f"a {_kind(match[3])}"))
    if match := re.search(r"Value '(.*?)' is not a valid bool.*?full_key: (\S+)", text, re.S):
        return UserError(match[2], f"'{match[1]}' is no true or false", _wanted(match[2], "true or false"))
    if match := re.search(r"Invalid value '(.*?)', expected one of \[(.*?)\].*?full_key: (\S+)", text, re.S):
        strings = f"; for a text generation.stop_strings=['{match[1]}']" if match[3] == "generation.stop" else ""
        return UserError(match[3], f"'{match[1]}' is not known", f"choose one of {match[2]}{strings}")
    if match := re.search(
        r"non optional field '?(\S+?)'? cannot be assigned None|field '(\S+)' is not Optional.*?full_key: (\S+)",
        text,
        re.S,
    ):
        return UserError((match[3] or match[1]), "cannot be null", "give a value or leave it out")
    if match := re.search(r"full_key: (\S+)", text):
        key = match[1]
        if re.search(r"Key '.*?' (is )?not (in|a member)|Could not override", text):
            return _of_another_engine(key, text) or _no_such(key, text)
        return _no_list(key, text) or UserError(key, one_line(text.splitlines()[0], 200), SEE_HELP)
    if match := re.search(r"Could not override '([^']+)'", text):
        return _no_such(match[1], text)
    if match := re.search(r"Could not append to config\. An item is already at '([^']+)'", text):
        return UserError(match[1], "is there already", f"leave out the +: {match[1]}=...")
    if re.search(r"Merge error: \w+ is not a subclass of \w+", text):  # of two engines' own keys
        return not_one("engine")
    first = text.strip().split("\n")[0]
    if (word := getattr(error, "override", None)) is not None:
        parts = [
            line for line in str(error).splitlines() if not line.startswith(("Error parsing override", "See http"))
        ]
        why = "" if re.search(PARSER_S_WORDS, text) or not parts else f": {one_line(parts[0], 200)}"
        remedy = HOW_TO_WRITE if why else _list_of_texts(word) or _in_quotes(word) or HOW_TO_WRITE
        return UserError("command line", f"{quoted(word, 200)} cannot be read{why}", remedy)
    if match := re.search(r"Ambiguous value for argument '(.*)'\n", text):
        advice = _list_of_texts(match[1]) or _in_quotes(match[1])
        remedy = "for a sweep add -m" + (f"; {advice}" if advice else "")
        return UserError("command line", f"{quoted(match[1], 200)} may be several values", remedy)
    if match := re.search(r"Could not find '([^']+)/'", text):
        return UserError(match[1], "no option given", f"choose one: {match[1]}=...; see --help")
    if "nterpolation" in first:
        return UserError("command line", one_line(first, 200), "a ${...} stands for another key; check its name")
    if key := getattr(error, "full_key", None):
        return UserError(key, one_line(first, 200), SEE_HELP)
    return UserError("command line", one_line(first, 200), HOW_TO_WRITE)


def _no_option(group: str, name: str, options: list[str]) -> UserError:
    """Returns the refusal of an option that there is not: a model's or a file's own place is not an option."""
    found, remedy = f"no option named '{name}'", f"choose one of {', '.join(options)}"
    first, _, place = f"{group}/{name}".partition("/")
    if group == "hydra/sweeper":
        remedy += f", or install the package hydra-{name}-sweeper"
    elif first == "dataset" and group != first:
        group, found = first, f"no option named '{place}'"
        remedy = f"give the file as dataset.path={place}, and {remedy.replace('one of', 'its format, one of')}"
    elif first == "model":
        near = difflib.get_close_matches(name, options, 4)
        others = f"choose one such as {', '.join(near)}" if near else "--help has the options"
        alone = CHECKPOINT_ALONE.replace("DIR", place) if group != first else CHECKPOINT_ALONE
        group, found, remedy = first, f"no option named '{place}'", f"{alone}; for random weights and plans {others}"
    return UserError(group, found, remedy)


def foreign_key(key: str, value: object, engine: str, where: str = "") -> UserError:
    """Returns the refusal of a key that other engines have, and this one has not.

    Args:
        value: as given; None where it is not known.
        where: what sets it, if that is not the command line.
    """
    having = owners(key)
    listed = " and ".join([*filter(None, [", ".join(having[:-1])]), *having[-1:]])
    found = f"engine={engine} has no such key, {listed} {'has' if len(having) == 1 else 'have'}"
    found = found if value is None else f"{one_line(str(value), 60)}: {found}"
    found = f"{found} ({where} sets it)" if where else found
    return UserError(f"engine.{key}", found, f"leave it out, or use engine={' or '.join(having)}")


def _no_such(key: str, text: str) -> UserError:
    """Returns the refusal of a key that does not exist; ``text`` is what Hydra and OmegaConf say."""
    given = re.search(rf"\+?{re.escape(key)}=(.*)", text)
    return greedy.refusal(key, given[1] if given else None) or UserError(key, "no such key", _nearest(key))


def _no_list(key: str, text: str) -> UserError | None:
    """Returns the refusal of a single value where a list belongs; None where that is not what is wrong."""
    given = re.search(rf"override {re.escape(key)}=(.*)", text)
    if given is None or not re.search(
        r"Cannot assign \w+ to ListConfig|Invalid value assigned: .* is not a ListConfig", text
    ):
        return None
    value = given[1].strip("'\"")
    shown = value if re.fullmatch(r"[\w.-]+", value) else f"'{value}'"
    return UserError(key, f"{quoted(value)} is no list", f'write "{key}=[{shown}]"')


def _of_another_engine(key: str, text: str) -> UserError | None:
    """Returns the refusal if that is what OmegaConf's message is about."""
    leaf = key.removeprefix("engine.")
    chosen = re.search(r"object_type=(\w+)", text)
    engines = {config.__name__: name for name, config in registered().items()}
    if chosen is None or chosen[1] not in engines or not owners(leaf):
        return None
    value = re.search(rf"\+?{re.escape(key)}=(.*)", text)
    where = re.search(r"In '(experiment/[^']+)'", text)
    return foreign_key(leaf, value[1] if value else None, engines[chosen[1]], where[1] if where else "")


def not_one(group: str) -> UserError:
    """Returns the refusal of a command line that chooses no option of a group, or several."""
    return UserError(group, "no option, or several", f"choose one, or sweep over them with -m {group}=a,b")


def _list_of_texts(word: str) -> str | None:
    """Returns how stop strings are written, as advice; None for another key."""
    if not word.lstrip("+").startswith("generation.stop_strings="):
        return None
    return "put each text in quotes, and all of it: \"generation.stop_strings=['###','User:']\""


def _in_quotes(word: str) -> str | None:
    """Returns how an override is written whose value is text with signs that Hydra reads, as advice; else None."""
    key, _, value = word.partition("=")
    text = re.search(r"[^\W\d]", value) and value[0] not in "'\"" and len(word) <= 200
    if not text or not re.fullmatch(r"[\w.@/+~-]+", key):
        return None
    inner = value.replace("'", "\\'")
    whole = f"{key}='{inner}'"
    shown = f'"{whole}"' if not re.search(r'[\\"$`!]', whole) else shlex.quote(whole)
    return f"a value with commas, brackets or quotes needs quotes inside the shell's: {shown}"


def _nearest(key: str) -> str:
    """Returns what the key may have been meant to be, as advice."""
    known = list(every())
    group, dot, leaf = key.lstrip("+").rpartition(".")
    if dot:
        near = difflib.get_close_matches(
            leaf, [name[len(group) + 1 :] for name in known if name.startswith(group + ".")]
        )
        near = [f"{group}.{name}" for name in near]
    else:
        near = difflib.get_close_matches(leaf, known + sorted({name.split(".")[0] for name in known if "." in name}))
        # The group was left out: token_budget for engine.token_budget.
        near = [name for name in known if name.split(".")[-1] == leaf] or near
    return f"did you mean {near[0]}?" if near else "see --help for the keys"


def _wanted(key: str, kind: str) -> str:
    """Returns what to give for a key, as advice: what the schema allows, or ``kind``, and what it is for."""
    said = every().get(key)
    if said is None:
        return f"give {kind}"
    own = said.allowed.replace("`", "")
    allowed = kind if said.allowed in KINDS.values() else own
    allowed += f" ({said.unit})" if said.unit else ""
    return f"give {allowed}: {said.meaning.replace('`', '')}"


def _kind(type_name: str) -> str:
    return {"Integer": "whole number", "Float": "number", "Boolean": "true or false"}.get(type_name, type_name)


def _messages(error: BaseException) -> str:
    """Returns the messages of ``error`` and of what caused it, outermost first."""
    parts: list[str] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        parts.append(str(current))
        current = current.__cause__ or current.__context__
    return "\n".join(parts) + "\n\n"
