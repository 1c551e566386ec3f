"""Many cases in one test: listed ones, where `parametrize` would make a test of each, and Hypothesis' examples."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import settings

Test = Callable[..., None]


def each(names: str | tuple[str, ...], cases: Iterable[Any]) -> Callable[[Test], Test]:
    """Run a test for every case, on the same fixtures; takes what `pytest.mark.parametrize` takes, and stacks as it.

    All cases run. The first failure is raised, with a note that lists every case that failed. A case cannot skip the
    test, which would hide the cases after it: the test returns from a case that does not apply.
    """
    named = (names,) if isinstance(names, str) else names
    listed = [dict(zip(named, (case,) if isinstance(names, str) else case, strict=True)) for case in cases]
    assert listed, "a test without cases proves nothing"

    def decorate(test: Test) -> Test:
        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            __tracebackhide__ = True
            failed: list[tuple[dict[str, Any], BaseException]] = []
            for case in listed:
                try:
                    test(**fixtures, **case)
                except pytest.skip.Exception as skipped:
                    raise AssertionError(f"a case may not skip, as {case} did: {skipped}") from skipped
                except (Exception, pytest.fail.Exception) as error:
                    failed.append((case, error))
            if failed:
                error = failed[0][1]
                error.add_note(f"{len(failed)} of {len(listed)} cases failed: {[case for case, _ in failed]}")
                raise error

        signature = inspect.signature(test)
        fixtures = [argument for name, argument in signature.parameters.items() if name not in named]
        run.__signature__ = signature.replace(parameters=fixtures)  # pytest looks for fixtures here
        del run.__wrapped__
        return run

    return decorate


FULL, QUICK = 60, 10
"""Examples of a property, in the profiles of `conftest.py`."""


def examples(n: int) -> settings:
    """Hypothesis settings for `n` examples; the quick profile runs the same fraction of them as of all others."""
    return settings(max_examples=max(1, n * settings().max_examples // FULL))
