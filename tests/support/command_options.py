"""The options of every command, read off the dataclasses that declare them."""

import dataclasses
import typing
from collections.abc import Iterator
from types import NoneType
from typing import Annotated, Any

import tyro

from headscope import cli

COMMANDS: tuple[type, ...] = typing.get_args(cli.Command)


def parts_of(hint: Any) -> tuple[set[type], set[Any]]:
    """The plain types that an annotation is made of, and what annotates them."""
    if typing.get_origin(hint) is Annotated:
        base, *notes = typing.get_args(hint)
        kinds, more = parts_of(base)
        return kinds, more | {note for note in notes if isinstance(note, typing.Hashable)}
    inner = [parts_of(part) for part in typing.get_args(hint) if part not in (NoneType, ...)]
    if typing.get_origin(hint) is typing.Literal or not inner:
        return {hint}, set()
    return set().union(*(kinds for kinds, _ in inner)), set().union(*(notes for _, notes in inner))


def fields_of(record: type) -> Iterator[tuple[type, dataclasses.Field]]:
    """Every option of a command with the dataclass that declares it, nested ones included."""
    for field in dataclasses.fields(record):
        nested = [kind for kind in parts_of(field.type)[0] if dataclasses.is_dataclass(kind)]
        yield from fields_of(nested[0]) if nested else [(record, field)]


def options_of(command: type) -> set[str]:
    """The options of a command as they are typed."""
    found = {"--help"}
    for _, field in fields_of(command):
        kinds, notes = parts_of(field.type)
        if tyro.conf.Positional not in notes:
            name = field.name.replace("_", "-")
            found |= {f"--{name}", f"--no-{name}"} if bool in kinds else {f"--{name}"}
    return found
