"""Bounds of numbers and names: declared once, in an annotation, and checked wherever such a value is passed.

An option is annotated `Count`, `Seed`, `Name` and so on: in a dataclass that calls `check_fields(self)` on creation, or
in a function under `@checked`.
"""

import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ParamSpec, TypeVar, Union, get_args, get_origin

from headscope.errors import HeadscopeError, OptionError
from headscope.names import at_home

LARGEST = 2**31 - 1
"""Maximum of a count or of a latent's number: files store them in 32 bits."""
_LARGEST_SEED = 2**63 - 1
_LARGEST_READ = 10**13
_NAME_BYTES, _PATH_BYTES = 255, 4095
_BESIDE = 24  # bytes by which names of temporary files exceed that of an output

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Number:
    """Finite numbers from `low` to `high`; integers where the annotation is of an `int`."""

    low: int | float
    high: int | float = math.inf
    excluded: tuple[int | float, ...] = ()
    """Ends that are excluded."""
    because: str = ""
    """Reason for the bound."""

    def expected(self, value: Any, kind: Any) -> str | None:
        """Return what is expected instead of a value; None if it is within the bounds."""
        if self._holds(value, Integral if kind is int else Real):
            return None
        number = "a whole number" if kind is int else "a finite number"
        above = f"above {self.low:g}" if self.low in self.excluded else f"of at least {self.low:g}"
        between = f"from {self.low:,} to {self.high:,}" + "".join(f", {end:,} excluded" for end in self.excluded)
        said = f"{number} {above if self.high == math.inf else between}"
        return f"{said} ({self.because})" if self.because else said

    def _holds(self, value: Any, kind: type) -> bool:
        if isinstance(value, bool) or not isinstance(value, kind):
            return False
        number: Any = value
        return self.low <= number <= self.high and abs(number) < math.inf and number not in self.excluded


@dataclass(frozen=True)
class Spelling:
    """Names of files, folders and hub repositories: not empty, and of a length that file systems support.

    `~` is the home folder, as in a shell, which does not expand it in `--out=~/x`.
    """

    output: bool = False
    """Whether it names an output, next to which temporary files have longer names."""

    def expected(self, value: Any, _kind: Any) -> str | None:
        """Return what is expected instead of a value; None if it is a valid name."""
        text = str(value)
        if not text.strip():
            return "a name, not an empty one"
        if text.split("/")[0] == "~":
            return "a path that is written out, since no home folder is known"
        if self.output and Path(text).name in ("", ".."):
            return "the name of a new folder or file, neither the current folder nor one above it"
        try:
            encoded = os.fsencode(text)
        except UnicodeEncodeError:
            encoded = b"\0"
        if b"\0" in encoded:
            return "a name of characters that file systems take"
        most = _NAME_BYTES - (_BESIDE if self.output else 0)
        if max(map(len, encoded.split(b"/"))) > most or len(encoded) > _PATH_BYTES:
            return f"a name of at most {most} bytes, and a path of at most {_PATH_BYTES:,}"
        return None


@dataclass(frozen=True)
class Text:
    """Text of at most `most` characters, not blank unless `blank`."""

    most: int
    blank: bool = False

    def expected(self, value: Any, _kind: Any) -> str | None:
        """Return what is expected instead of a value; None if it is valid."""
        if not isinstance(value, str) or len(value) > self.most:
            return f"text of at most {self.most:,} characters"
        return None if self.blank or value.strip() else "text that is not blank"


@dataclass(frozen=True)
class DeviceName:
    """Names of devices that can compute."""

    def expected(self, value: Any, _kind: Any) -> str | None:
        """Return what is expected instead of a value; None if it is a valid device name."""
        named = re.fullmatch(r"([a-z]{2,20})(:\d{1,3})?", str(value))
        return None if named and named[1] != "meta" else "cpu, cuda, or cuda:1 and so on for one of several GPUs"


Rule = Number | Spelling | Text | DeviceName

Count = Annotated[int, Number(1, LARGEST)]
CountFrom0 = Annotated[int, Number(0, LARGEST)]
Latent = CountFrom0
Layer = CountFrom0
BlockSize = Annotated[int, Number(2, LARGEST, because="a BOS and text")]
Seed = Annotated[int, Number(0, _LARGEST_SEED)]
Port = Annotated[int, Number(1, 65_535)]
Shuffles = Annotated[int, Number(1, 10**6)]
Tokens = Annotated[int, Number(1, _LARGEST_READ, because="at a million a second, those take four months")]
Above0 = Annotated[float, Number(0, excluded=(0,))]
From0 = Annotated[float, Number(0)]
Share = Annotated[float, Number(0, 1)]
ShareBelow1 = Annotated[float, Number(0, 1, excluded=(1,))]

Name = Annotated[str, Spelling()]
NameOrPath = Annotated[str | Path, Spelling()]
Input = Annotated[Path, Spelling()]
Output = Annotated[Path, Spelling(output=True)]
Device = Annotated[str, DeviceName()]


def check_fields(record: Any, error: type[HeadscopeError] = OptionError) -> None:
    """Check the fields of a dataclass by their annotations; the fields become what `check` returns.

    Raises:
        HeadscopeError: of the type `error`, for the first value that is out of bounds.
    """
    for field in fields(record):
        value = getattr(record, field.name)
        within = check(field.name, value, field.type, error)
        if within is not value:
            object.__setattr__(record, field.name, within)


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Check the arguments of each call of a function by their annotations, before the call.

    Raises:
        OptionError: from each call, for the first value that is out of bounds.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            bound.arguments[name] = check(name, value, signature.parameters[name].annotation)
        return function(*bound.args, **bound.kwargs)

    return called


def check(name: str, value: Any, hint: Any, error: type[HeadscopeError] = OptionError) -> Any:
    """Check one value by an annotation, through `| None` and sequences.

    Returns:
        The value; a number as Python's own, a sequence of bounded items as a tuple, a name that begins with `~` as the
        path in the home folder.

    Raises:
        HeadscopeError: of the type `error`, if it is out of bounds.
    """
    origin: Any = get_origin(hint)
    parts = get_args(hint)
    if origin is Annotated:
        value = check(name, value, parts[0], error)
        for rule in parts[1:]:
            value = _within(name, value, parts[0], rule, error) if isinstance(rule, Rule) else value
    elif origin in (Union, UnionType) and value is not None:
        for part in parts:
            value = check(name, value, part, error)
    elif _is_sequence(origin) and get_origin(parts[0]) is Annotated:
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise _refused(name, value, "several, in a list or a tuple", error)
        value = tuple(check(name, item, parts[0], error) for item in value)
    return value


def _is_sequence(origin: Any) -> bool:
    return inspect.isclass(origin) and issubclass(origin, Sequence)


def _within(name: str, value: Any, kind: Any, rule: Rule, error: type[HeadscopeError]) -> Any:
    if isinstance(rule, Spelling) and isinstance(value, str | Path):
        value = at_home(value)
    expected = rule.expected(value, kind)
    if expected is not None:
        raise _refused(name, value, expected, error)
    return kind(value) if isinstance(rule, Number) and type(value) is not kind else value


def _refused(name: str, value: Any, expected: str, error: type[HeadscopeError]) -> HeadscopeError:
    said = repr(str(value) if isinstance(value, Path) else value)
    said = said if len(said) <= 80 else f"{said[:60]}... ({len(str(value)):,} characters)"
    return error(f"{name} = {said}", expected=expected, do=f"change {name}")
