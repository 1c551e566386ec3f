"""Annotations of a function that is defined inside another are compiled into checks once, not at each definition.

jaxtyping's import hook decorates every function, those inside others too. Compiling one takes milliseconds, and a
function inside another is a new one at each call of the other: without this, that is half of the tests' time.
"""

import functools
import inspect
import threading
from collections.abc import Callable
from types import CodeType
from typing import Any

import jaxtyping


def remember_definitions() -> None:
    """Let `jaxtyping.jaxtyped`, as the hook calls it, compile once what comes from one place in the source."""
    jaxtyped = jaxtyping.jaxtyped
    known: dict[tuple[str, CodeType], Callable[..., Any]] = {}
    called = threading.local()

    def checked(function: Callable[..., Any], typechecker: Any) -> Callable[..., Any]:
        """Checks the annotations of `function` and calls `called.function`, which has the same."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            return called.function(*args, **kwargs)

        template = functools.wraps(function)(forward)
        template.__signature__ = inspect.signature(function)
        del template.__wrapped__  # it would keep alive what the first definition closes over
        return jaxtyped(template, typechecker=typechecker)

    def decorate(function: Any, typechecker: Any) -> Any:
        if not inspect.isfunction(function) or "<locals>" not in function.__qualname__:
            return jaxtyped(function, typechecker=typechecker)
        place = function.__code__.co_filename, function.__code__
        if place not in known:
            known[place] = checked(function, typechecker)
        checks = known[place]

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            outer, called.function = getattr(called, "function", None), function
            try:
                return checks(*args, **kwargs)
            finally:
                called.function = outer

        return wrapped

    jaxtyping.jaxtyped = lambda *, typechecker: functools.partial(decorate, typechecker=typechecker)
