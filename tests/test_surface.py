import pickle
import re
import subprocess
import sys

import pytest

import headscope
from headscope import errors

PUBLIC = [
    "Corpus",
    "FeatureIndex",
    "HeadscopeError",
    "IndexPlan",
    "LiveIndex",
    "Model",
    "SAE",
    "Site",
    "TrainConfig",
    "build_index",
    "dfa",
    "evaluate",
    "jobs",
    "load_corpus",
    "load_model",
    "load_sae",
    "save_sae",
    "study",
    "train_sae",
]


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_public_names_are_pinned_and_at_most_twenty() -> None:
    assert sorted(headscope.__all__) == PUBLIC
    assert len(PUBLIC) <= 20


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert getattr(headscope, name).__doc__


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        headscope.nothing  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    loaded = run_python("import sys, headscope; print(*(m for m in sys.modules if '.' not in m))").split()
    assert set(loaded) & {"torch", "transformers", "numpy", "scipy", "duckdb", "tyro", "starlette"} == set()


def test_naming_one_thing_imports_only_what_it_needs() -> None:
    loaded = run_python("import sys; from headscope import Site, TrainConfig, HeadscopeError; print(*sys.modules)")
    assert "torch" not in loaded.split()


# -------------------------------------------------------------------------------------------------------------- errors
def classes_below(root: type) -> set[str]:
    return {c.__name__ for c in root.__subclasses__()} | {n for c in root.__subclasses__() for n in classes_below(c)}


def test_the_tree_of_errors_is_drawn_as_it_is() -> None:
    drawn = set(re.findall(r"[├└]── (\w+)", errors.__doc__))
    assert drawn == {n for n in classes_below(errors.HeadscopeError) if hasattr(errors, n)}
    assert drawn == classes_below(errors.HeadscopeError), "an error defined elsewhere"


def test_a_message_says_what_was_got_what_was_expected_and_what_to_do() -> None:
    error = errors.SAEError("a teapot", expected="an SAE", do="train one")
    assert str(error) == "a teapot\n  expected: an SAE\n  do: train one"


def test_an_error_from_another_process_arrives_as_itself() -> None:
    error = pickle.loads(pickle.dumps(errors.ProxyError("a", expected="b", do="c")))
    assert type(error) is errors.ProxyError
    assert (error.got, error.expected, error.do, str(error)) == ("a", "b", "c", "a\n  expected: b\n  do: c")
