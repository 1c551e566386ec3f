"""A test of many cases runs all of them, and a failure names those that failed."""

import inspect

import pytest

from cases import each


def test_every_combination_is_run_on_the_same_fixtures():
    seen = []

    @each("kind", ["q", "k"])
    @each(("layer", "head"), [(0, 1), (1, 0)])
    def test(model, kind, layer, head):
        seen.append((model, kind, layer, head))

    assert list(inspect.signature(test).parameters) == ["model"]
    test(model="gpt2")
    assert seen == [("gpt2", "q", 0, 1), ("gpt2", "q", 1, 0), ("gpt2", "k", 0, 1), ("gpt2", "k", 1, 0)]


def test_a_failure_names_all_cases_that_failed_and_is_the_first_ones():
    @each("n", range(5))
    def test(n):
        assert n % 2 == 0, f"{n} is odd"

    with pytest.raises(AssertionError, match="1 is odd") as failure:
        test()
    assert failure.value.__notes__ == ["2 of 5 cases failed: [{'n': 1}, {'n': 3}]"]


def test_what_was_not_raised_is_a_failure_too():
    @each("error", [ValueError, KeyError])
    def test(error):
        with pytest.raises(error):
            raise KeyError

    with pytest.raises(KeyError) as failure:
        test()
    assert "1 of 2 cases failed" in failure.value.__notes__[0]

    @each("error", [KeyError])
    def nothing_raised(error):
        with pytest.raises(error):
            pass

    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        nothing_raised()


def test_a_case_that_skips_and_no_cases_at_all_are_refused():
    @each("n", range(2))
    def test(n):
        pytest.skip("this machine has no such thing")

    with pytest.raises(AssertionError, match=r"may not skip.*'n': 0.*no such thing"):
        test()
    with pytest.raises(AssertionError, match="proves nothing"):
        each("n", [])
