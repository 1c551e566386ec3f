"""The command line: parses it and runs one of the `commands`."""

import sys

import tyro

from headscope.commands.end_to_end import Demo, Report
from headscope.commands.indexes import Effects, Families, Heads, Index, Proxies, Survey
from headscope.commands.pages import Dive, Export, Serve
from headscope.commands.saes import Convert, Eval, Info
from headscope.commands.training import Runs, Sweep, Train, preset_of
from headscope.errors import INTERRUPTED, HeadscopeError
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
    try:
        with preset_of(sys.argv[1:] if arguments is None else arguments):
            command = tyro.cli(Command, args=arguments, prog="headscope", description=_DESCRIPTION)
        command.run()
    except HeadscopeError as error:
        sys.stderr.write(f"headscope: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("headscope: interrupted\n")
        sys.exit(INTERRUPTED)


_DESCRIPTION = "Find and explain what the attention layers of language models compute."
