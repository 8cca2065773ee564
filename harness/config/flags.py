"""Hydra's flags, refused in one line where Hydra would print its usage or go on with something else."""

from __future__ import annotations

import argparse
from typing import NoReturn

from harness.basics.errors import UserError, quoted

SEE_HELP = "write group.key=value; the flags are --help, --version, --cfg job, -m and those of --hydra-help"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns Hydra's flags and overrides among ``arguments``, its own parser's names for them.

    Raises:
        UserError: a flag is unknown, lacks its value, or makes no sense beside another.
    """
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.__class__ = _Parser
    parser.set_defaults(version=False)
    parser._option_string_actions["--version"].__class__ = _Version
    flags = parser.parse_args(arguments)
    commands = {
        "-m": flags.multirun,
        "--help": flags.help,
        "--hydra-help": flags.hydra_help,
        "--version": flags.version,
        "--cfg": flags.cfg,
        "--info": flags.info,
        "--run": flags.run,
        "--shell-completion": flags.shell_completion,
    }
    given = [name for name, value in commands.items() if value]
    if len(given) > 1:
        first, second = given[:2]
        of_one_job = "leave out -m, and give one value a key: the jobs of a sweep differ only in what it varies"
        remedy = of_one_job if first == "-m" else "give one"
        raise UserError("command line", f"{first} and {second} do not go together", remedy)
    for name in ("package", "resolve"):
        if getattr(flags, name) and not flags.cfg:
            raise UserError("command line", f"--{name} says how --cfg prints, and there is none", "add --cfg job")
    if flags.experimental_rerun is not None:
        found = "--experimental-rerun reads a pickle, which can run code"
        raise UserError("command line", found, "give the overrides again: a run's record.json has its command_line")
    return flags


def only_prints(flags: argparse.Namespace) -> bool:
    """Returns whether a command line asks to be told something, and runs nothing."""
    return any((flags.help, flags.hydra_help, flags.version, flags.cfg, flags.info, flags.shell_completion))


class _Version(argparse.Action):
    """Notes that the version is asked for, where Hydra's action would print Hydra's."""

    def __call__(self, parser: object, namespace: argparse.Namespace, *values: object) -> None:
        namespace.version = True


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print below its usage, and end the process."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message and not unknown.startswith("-"):
            found = f"{quoted(unknown, 200)} stands apart from the overrides before a flag"
            raise UserError("command line", found, "write all flags first, then the overrides")
        if unknown != message:
            raise UserError("command line", f"no such flag: {quoted(unknown, 200)}", SEE_HELP)
        raise UserError("command line", message, SEE_HELP)
