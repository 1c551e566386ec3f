"""The command line: parses it and runs one of the `commands`."""

import re
import sys
from itertools import pairwise

import tyro

from headscope.commands.end_to_end import Demo, Report
from headscope.commands.indexes import Effects, Families, Heads, Index, Proxies, Survey
from headscope.commands.pages import Dive, Export, Serve
from headscope.commands.saes import Convert, Eval, Info
from headscope.commands.training import Runs, Sweep, Train, preset_of
from headscope.errors import INTERRUPTED, HeadscopeError, OptionError
from headscope.limits import check_fields
from headscope.memory import keep_freed_memory

Command = (
    Demo
    | Train
    | Sweep
    | Runs
    | Eval
    | Info
    | Convert
    | Index
    | Serve
    | Export
    | Proxies
    | Effects
    | Families
    | Heads
    | Dive
    | Survey
    | Report
)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run one command; errors of the user's input end with status 2."""
    keep_freed_memory()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        _check_not_empty(arguments)
        with preset_of(arguments):
            command = tyro.cli(Command, args=arguments, prog="headscope", description=_DESCRIPTION)
        check_fields(command)
        command.run()
    except HeadscopeError as error:
        sys.stderr.write(f"headscope: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("headscope: interrupted\n")
        sys.exit(INTERRUPTED)


def _check_not_empty(arguments: list[str]) -> None:
    """Refuse an empty argument, which as a path would be the current folder: most often a variable that is not set."""
    for before, argument in pairwise(["headscope", *arguments]):
        if not argument or re.fullmatch(r"--[\w-]+=", argument):
            raise OptionError(
                f"an empty argument, {argument or f'after {before}'}",
                expected="a value",
                do="check that the shell variable given there is set",
            )


_DESCRIPTION = "Find and explain what the attention layers of language models compute."
