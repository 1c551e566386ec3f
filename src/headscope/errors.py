"""What can go wrong for a user, one class a cause.

HeadscopeError
 ├── ModelError       a model that is missing, truncated, of another family, or lacks what was asked of it
 ├── SAEError         an SAE folder that is missing, truncated, or does not fit the model
 ├── CorpusError      text that is missing, empty, too short, or not UTF-8
 ├── OptionError      a number, a name or a device with which nothing can be done
 ├── OutputError      a folder that already holds a run, cannot be written, or a disk that is full
 ├── TrainingError    training that cannot go on (not finite, no data)
 ├── IndexFormatError an index that is incomplete, damaged, or of another version
 ├── LabelError       a label, a sample of features or a labels.jsonl that is not as it must be
 ├── StudyError       a study asked for with options or data that do not fit
 ├── ProxyError       a proxy that cannot be read, names no token, or cannot be evaluated
 ├── FigureError      a figure whose library is not installed
 ├── ServerError      a port that cannot be had
 └── ExportError      a page that cannot be written as asked

Every message says what was got, what was expected, and what to do.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

INTERRUPTED = 130
"""Status of a command that was ended from outside, by Ctrl-C or SIGTERM, also where it saved what it had."""


class HeadscopeError(Exception):
    """The root of all errors that a user's input can cause."""

    def __init__(self, got: str, *, expected: str, do: str) -> None:
        """Join the three parts into one message: what was `got`, what was `expected`, what to `do`."""
        super().__init__(f"{got}\n  expected: {expected}\n  do: {do}")
        self.got, self.expected, self.do = got, expected, do

    def __reduce__(self) -> tuple[Callable[..., "HeadscopeError"], tuple]:
        """So that one raised in another process arrives as itself."""
        return partial(type(self), expected=self.expected, do=self.do), (self.got,)


class ModelError(HeadscopeError):
    """A model that is missing, truncated, of another family, or lacks what was asked of it."""


class SAEError(HeadscopeError):
    """An SAE folder that is missing, truncated, or does not fit the model."""


class CorpusError(HeadscopeError):
    """Text that is missing, empty, too short, or not UTF-8."""


class OptionError(HeadscopeError):
    """A number, a name or a device with which nothing can be done."""


class OutputError(HeadscopeError):
    """A folder that already holds a run or cannot be written, or a disk that is full."""

    found: Any = None
    """What was computed, where that is all that is missing: it can still be shown."""


class TrainingError(HeadscopeError):
    """Training that cannot go on."""


class IndexFormatError(HeadscopeError):
    """An index that is incomplete, damaged, or of another version."""


class LabelError(HeadscopeError):
    """A label, a sample of features or a labels.jsonl that is not as it must be."""


class StudyError(HeadscopeError):
    """A study asked for with options or data that do not fit."""


class ProxyError(HeadscopeError):
    """A proxy that cannot be read, names no token of the vocabulary, or cannot be evaluated."""


class FigureError(HeadscopeError):
    """A figure whose library is not installed."""


class ServerError(HeadscopeError):
    """A port that cannot be had."""


class ExportError(HeadscopeError):
    """A page that cannot be written as asked."""
