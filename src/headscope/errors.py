"""Errors caused by a user's input, one class per cause.

HeadscopeError
 ├── ModelError       a model that is missing, truncated, of another family, or lacks a requested part
 ├── SAEError         an SAE folder that is missing, truncated, or does not fit the model
 ├── CorpusError      text that is missing, empty, too short, or not UTF-8
 ├── OptionError      an invalid number, name or device
 ├── OutputError      a folder that already holds a run, cannot be written, or a disk that is full
 ├── TrainingError    training that cannot continue (not finite, no data)
 ├── IndexFormatError an index that is incomplete, damaged, or of another version
 ├── LabelError       an invalid label, sample of features or labels.jsonl
 ├── StudyError       a study with invalid options or data
 ├── ProxyError       a proxy that cannot be read, names no token, or cannot be evaluated
 ├── FigureError      a figure whose library is not installed
 ├── ServerError      a port that is not available
 └── ExportError      a page that cannot be written as requested

Every message states what was got, what was expected, and what to do.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

INTERRUPTED = 130
"""Exit status of a command that was ended by Ctrl-C or SIGTERM, even if it saved its results."""


class HeadscopeError(Exception):
    """The root of all errors that a user's input can cause."""

    def __init__(self, got: str, *, expected: str, do: str) -> None:
        """Join the three parts into one message: what was `got`, what was `expected`, what to `do`."""
        super().__init__(f"{got}\n  expected: {expected}\n  do: {do}")
        self.got, self.expected, self.do = got, expected, do

    def __reduce__(self) -> tuple[Callable[..., "HeadscopeError"], tuple]:
        """Support pickling, for errors raised in another process."""
        return partial(type(self), expected=self.expected, do=self.do), (self.got,)


class ModelError(HeadscopeError):
    """A model that is missing, truncated, of another family, or lacks a requested part."""


class SAEError(HeadscopeError):
    """An SAE folder that is missing, truncated, or does not fit the model."""


class CorpusError(HeadscopeError):
    """Text that is missing, empty, too short, or not UTF-8."""


class OptionError(HeadscopeError):
    """An invalid number, name or device."""


class OutputError(HeadscopeError):
    """A folder that already holds a run or cannot be written, or a disk that is full."""

    found: Any = None
    """What was computed, if only the output failed: it can still be shown."""


class TrainingError(HeadscopeError):
    """Training that cannot continue."""


class IndexFormatError(HeadscopeError):
    """An index that is incomplete, damaged, or of another version."""


class LabelError(HeadscopeError):
    """An invalid label, sample of features or labels.jsonl."""


class StudyError(HeadscopeError):
    """A study with invalid options or data."""


class ProxyError(HeadscopeError):
    """A proxy that cannot be read, names no token of the vocabulary, or cannot be evaluated."""


class FigureError(HeadscopeError):
    """A figure whose library is not installed."""


class ServerError(HeadscopeError):
    """A port that is not available."""


class ExportError(HeadscopeError):
    """A page that cannot be written as requested."""
