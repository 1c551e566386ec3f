"""Command line: parse the arguments and run one of the `commands`."""

import inspect
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import version
from itertools import pairwise
from typing import Any, get_args

import tyro

from headscope.commands import studies
from headscope.commands.end_to_end import Demo, Report
from headscope.commands.indexes import Index, Survey
from headscope.commands.pages import Dive, Export, Serve
from headscope.commands.saes import Convert, Eval, Info
from headscope.commands.short_help import ALL as ALL_HELP
from headscope.commands.short_help import shortened
from headscope.commands.studies import Study
from headscope.commands.training import Runs, Sweep, Train, preset_of
from headscope.errors import INTERRUPTED, HeadscopeError, OptionError
from headscope.limits import check_fields
from headscope.memory import keep_freed_memory

Command = Demo | Train | Sweep | Runs | Eval | Info | Convert | Index | Study | Serve | Export | Dive | Survey | Report


_STUDIES = ("proxies", "effects", "families", "heads")
"""Studies that may be named without `study` before them."""


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run one command.

    Invalid input exits with status 2; Ctrl-C, SIGTERM and SIGHUP with `INTERRUPTED`.
    """
    keep_freed_memory()
    _print_in_any_encoding()
    is_process, command = arguments is None, None
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in _STUDIES:
        arguments = ["study", *arguments]
    try:
        with _interruptible():
            if arguments == ["--version"]:
                sys.stdout.write(f"headscope {version('headscope')}\n")
                return
            _check_not_empty(arguments)
            _check_command(arguments)
            command = _parsed(arguments)
            check_fields(command)
            command.run()
        sys.stdout.flush()
        if is_process and getattr(command, "serves", False):
            # a computation may go on in a thread: torch aborts, and DuckDB complains, if they are torn down under it
            os._exit(0)
    except HeadscopeError as error:
        sys.stderr.write(f"headscope: {error}\n")
        sys.exit(2)
    except BrokenPipeError:  # the reader of the pipe, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(INTERRUPTED)
    except KeyboardInterrupt:
        again = "resumes" if getattr(command, "resumes", False) else "starts again"
        sys.stderr.write(f"headscope: interrupted; the same command {again}\n")
        sys.exit(INTERRUPTED)


def _parsed(arguments: list[str]) -> Any:
    """Parse the arguments into a command with its options."""
    with preset_of(arguments):
        if {"-h", "--help"} & set(arguments[1:]):
            _print_short_help(arguments[0])
        arguments = ["--help" if argument == ALL_HELP else argument for argument in arguments]
        if arguments[:1] == ["study"] and len(arguments) > 1:
            return studies.parse(arguments[1:], registry=_numbers())
        return tyro.cli(Command, args=arguments, prog="headscope", description=_DESCRIPTION, registry=_numbers())


def _print_short_help(name: str) -> None:
    """Print the main options of a command that has many, and exit; otherwise return."""
    command = next((command for command in get_args(Command) if command.__name__.lower() == name), None)
    short = command and shortened(command)
    if short and short.n_hidden:
        more = f"The main options; {short.n_hidden} more: headscope {name} {ALL_HELP}"
        said = f"{inspect.getdoc(short.command)}\n\n{more}"
        tyro.cli(short.command, args=["--help"], prog=f"headscope {name}", description=said)


def _check_not_empty(arguments: list[str]) -> None:
    """Reject an empty argument, which as a path would be the current folder: most often an unset variable."""
    for before, argument in pairwise(["headscope", *arguments]):
        if not argument or re.fullmatch(r"--[\w-]+=", argument):
            raise OptionError(
                f"an empty argument, {argument or f'after {before}'}",
                expected="a value",
                do="check that the shell variable given there is set",
            )


def _check_command(arguments: list[str]) -> None:
    """Reject an unknown command, and suggest the closest one."""
    known = [command.__name__.lower() for command in get_args(Command)]
    if not arguments or arguments[0].startswith("-") or arguments[0] in known:
        return
    similar = get_close_matches(arguments[0], known, n=1)
    raise OptionError(
        f"no command {arguments[0]!r}",
        expected=f"one of {', '.join(known)}",
        do=f"did you mean `headscope {similar[0]}`?" if similar else "see `headscope --help`",
    )


def _numbers() -> tyro.constructors.ConstructorRegistry:
    """Parse numbers, and leave invalid ones unchanged: the check of the command's fields reports them by name."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def number(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec[int | float | str] | None:
        kind = info.type
        if kind not in (int, float):
            return None

        def read(arguments: list[str]) -> int | float | str:
            try:
                return kind(arguments[0])
            except ValueError:
                return arguments[0]

        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=kind.__name__.upper(),
            instance_from_str=read,
            is_instance=lambda value: isinstance(value, int if kind is int else int | float),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _print_in_any_encoding() -> None:
    """Print `?` for characters that a non-UTF-8 terminal or log cannot encode, rather than fail at the end."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Make SIGTERM and SIGHUP end the block as Ctrl-C does, so that it cleans up after itself.

    Raises:
        KeyboardInterrupt: on one of them; also where a library (DuckDB) reports it as its own error.
    """
    asked = False

    def interrupt(_number: int, _frame: object) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    ours = {number: known for number, known in before.items() if known in (signal.SIG_DFL, signal.default_int_handler)}
    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield
    except Exception as error:
        if asked:
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, known in ours.items():
            signal.signal(number, known)


_DESCRIPTION = "Find and explain what the attention layers of language models compute."
