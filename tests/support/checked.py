"""Annotations are executed as jaxtyping's import hook has it, in a fraction of its time.

The hook decorates every function. Two kinds take most of the time of the tests, and are checked here in a cheaper way:

* A function inside another is a new one at each call of the other, and compiling its annotations into checks takes
  milliseconds. They are compiled once for all that come from one place in the source.
* A function without arrays in its annotations has no shapes to compare: the type checker alone is enough.

To be imported before what is checked.
"""

import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any, ForwardRef, get_args

import jaxtyping
from beartype.roar import BeartypeCallHintViolation

_jaxtyped = jaxtyping.jaxtyped
_known: dict[tuple[str, CodeType], Callable[..., Any]] = {}
_called = threading.local()


@contextmanager
def unchecked() -> Iterator[None]:
    """Run as an installation does: annotations are not executed, so that an error of our own is what is raised."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def _is_plain(annotation: Any) -> bool:
    """Whether there is no array in it, and no name that stands for something later or elsewhere."""
    if isinstance(annotation, list | tuple):
        return all(map(_is_plain, annotation))
    if isinstance(annotation, str | ForwardRef):
        return False
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return False
    return _is_plain(get_args(annotation))


def _compiled(function: Callable[..., Any], typechecker: Any) -> Callable[..., Any]:
    """Checks the annotations of `function` and calls `_called.function`, which has the same."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return _called.function(*args, **kwargs)

    template = functools.wraps(function)(forward)
    template.__signature__ = inspect.signature(function)
    del template.__wrapped__  # it would keep alive what the first definition closes over
    return _jaxtyped(template, typechecker=typechecker)


def _inner(function: Callable[..., Any], typechecker: Any) -> Callable[..., Any]:
    place = function.__code__.co_filename, function.__code__
    if place not in _known:
        _known[place] = _compiled(function, typechecker)
    checks = _known[place]

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        outer, _called.function = getattr(_called, "function", None), function
        try:
            return checks(*args, **kwargs)
        finally:
            _called.function = outer

    return wrapped


def _plain(function: Callable[..., Any], typechecker: Any) -> Callable[..., Any]:
    checks = typechecker(function)

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        try:
            return checks(*args, **kwargs)
        except BeartypeCallHintViolation as violation:  # which is no TypeError, as jaxtyping's is
            raise jaxtyping.TypeCheckError(str(violation)) from violation

    return wrapped


def _decorate(function: Any, typechecker: Any) -> Any:
    if inspect.isclass(function) and "<locals>" not in function.__qualname__:
        own = vars(function).get("__init__")
        if dataclasses.is_dataclass(function) and not hasattr(own, "__wrapped__") and own is not None:
            function.__init__ = _decorate(own, typechecker)
        return function
    if not inspect.isfunction(function):
        return _jaxtyped(function, typechecker=typechecker)
    if "<locals>" in function.__qualname__:
        return _inner(function, typechecker)
    if _is_plain(tuple(function.__annotations__.values())):
        return _plain(function, typechecker)
    return _jaxtyped(function, typechecker=typechecker)


jaxtyping.jaxtyped = lambda *, typechecker: functools.partial(_decorate, typechecker=typechecker)
