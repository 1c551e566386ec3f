"""A study as a value: a question about a feature or a dictionary, its options, and how to run and show it.

The page, the command line and the report get studies from `studies.registry`; none refers to a study by name. A study's
file imports its computation inside `run`, so that a page without a model, and `--help`, load no torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from headscope.errors import StudyError
from headscope.limits import check_fields

if TYPE_CHECKING:
    from headscope.encode import Json
    from headscope.studies.subject import Subject

Group = Literal["when", "what", "how", "heads", "induction"]
"""Group of a study by its question: when a feature fires, what it does, how it is computed; or about heads and
induction."""


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """Options of a study that takes none."""


@dataclass(frozen=True)
class Tab:
    """A tab of a feature's card."""

    name: str
    """Name in the page's URL; static/tabs/<name>.js draws it, or the page's table of a record if there is none."""
    label: str


@dataclass(frozen=True, kw_only=True)
class FeatureStudy:
    """A study of one feature of an index: a URL of the page, `headscope study NAME INDEX LATENT`."""

    name: str
    """Lower-case letters, digits and underscores; unique among all studies."""
    group: Group
    question: str
    """Its question, in one line."""
    run: "Callable[[Subject, int, Any], Any]"
    """`(subject, latent, options) -> record`, a frozen dataclass supported by `encode`."""
    options: type = NoOptions
    """A frozen dataclass; its fields are the parameters of the URL and the options of the command."""
    needs_model: bool = False
    quick: bool = False
    """Whether it is a look-up that does not wait for studies that compute."""
    tabs: tuple[Tab, ...] = ()
    """The tabs that show its record."""
    show: "Callable[[Subject, int, Any, Any], Json] | None" = None
    """`(subject, latent, options, record) -> JSON`, where a page needs more than the record; default: its fields."""
    python: "Callable[[Subject, int, Any, Any], str | dict[str, str]] | None" = None
    """`(subject, latent, options, record) ->` the calls that reproduce the record; one text for each of several parts.
    """
    on_page: bool = True
    """Whether the page may request it, and a file of one feature includes it."""
    in_report: bool = False
    """Whether a report has a row for each `Measure` of its record, for every exemplar."""

    def record(self, subject: "Subject", latent: int, options: Any = None) -> Any:
        """Run the study on one feature, one run of the model at a time.

        Raises:
            IndexFormatError: no such latent.
            HeadscopeError: invalid input of the study; a StudyError where it needs a model and the subject has none.
        """
        subject.index.check_latent(latent)
        options = self.options() if options is None else options
        check_fields(options, StudyError)
        if not self.needs_model:
            return self.run(subject, latent, options)
        subject.check_model()
        with subject.lock:
            return self.run(subject, latent, options)

    def answer(self, subject: "Subject", latent: int, options: Any = None) -> "Json":
        """Return the page's data: the record, its feature and corpus, and the Python that reproduces it.

        Raises:
            HeadscopeError: as in `record`; a StudyError for a record that JSON cannot hold.
        """
        from headscope.encode import encode

        options = self.options() if options is None else options
        found = self.record(subject, latent, options)
        try:
            shown = encode(found) if self.show is None else self.show(subject, latent, options, found)
        except TypeError as error:
            raise self._unfit(str(error)) from error
        if not isinstance(shown, dict):
            raise self._unfit(f"a {type(found).__name__}")
        if {"corpus", "python"} & set(shown) or shown.get("latent", latent) != latent:
            raise self._unfit("a record with a field called latent, corpus or python, which the page has for its own")
        corpus = subject.index.manifest["corpus"]
        shown |= {"latent": latent, "corpus": f"{corpus['name']}, {corpus['split']}"}
        return shown if self.python is None else shown | {"python": self.python(subject, latent, options, found)}

    def _unfit(self, got: str) -> StudyError:
        return StudyError(
            f"{self.name} found {got}",
            expected="a dataclass of numbers, text, arrays, tuples and mappings of these",
            do="change the study's record, or give the study a `show`",
        )


@dataclass(frozen=True, kw_only=True)
class DictionaryStudy:
    """A study of all features of an index, with results stored in it: `headscope study NAME INDEX`."""

    name: str
    """As in `FeatureStudy`."""
    group: Group
    question: str
    run: "Callable[[Subject, Any], Any]"
    """`(subject, options) -> record`; it writes the columns. A record with `lines()` defines its printed form."""
    columns: str
    """Name of the columns that it adds to the index (`index.columns`): when they exist, the study is done."""
    resumes: bool = False
    """Whether an interrupted run keeps its finished work."""
    options: type = NoOptions
    needs_model: bool = False

    def record(self, subject: "Subject", options: Any = None) -> Any:
        """Run the study, one run of the model at a time, and write its results.

        Raises:
            HeadscopeError: as in `FeatureStudy`; an OutputError where the columns cannot be written.
        """
        options = self.options() if options is None else options
        check_fields(options, StudyError)
        if not self.needs_model:
            return self.run(subject, options)
        subject.check_model()
        with subject.lock:
            return self.run(subject, options)


Study = FeatureStudy | DictionaryStudy


# ------------------------------------------------------------------------------------------------ options of an address
def parse_options(study: FeatureStudy, given: Mapping[str, Sequence[str]]) -> Any:
    """Parse options from URL parameters, such as `at=512&path=1.3`.

    Raises:
        StudyError: an unknown, repeated, missing or non-numeric parameter.
    """
    known = {field.name: field for field in fields(study.options)}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise StudyError(
            f"parameter {unknown[0][:80]!r}", expected=", ".join(known) or "none", do="leave it out of the address"
        )
    values = {name: _parsed(name, texts, known[name].type) for name, texts in given.items()}
    required = [name for name, of in known.items() if of.default is MISSING and of.default_factory is MISSING]
    for name in required:
        if name not in values:
            raise StudyError(f"no {name}", expected=f"one {name}", do=f"add it to the address: ?{name}=...")
    return study.options(**values)


def _parsed(name: str, texts: Sequence[str], annotation: Any) -> Any:
    """Parse one parameter by its annotation; several values are separated by commas, each counted once.

    Raises:
        StudyError: it is repeated, or not of the annotated type.
    """
    if len(texts) != 1:
        raise StudyError(f"{len(texts)} values of {name}", expected="one", do="give one")
    kind = _plain(annotation)
    if get_origin(kind) is tuple:
        of = _plain(get_args(kind)[0])
        return tuple(dict.fromkeys(_value(name, part, of) for part in texts[0].split(","))) if texts[0] else ()
    return _value(name, texts[0], kind)


def _plain(annotation: Any) -> Any:
    """The type that an annotation is about, without bounds and without None."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return next(_plain(part) for part in get_args(annotation) if part is not type(None))
    return annotation


def _value(name: str, text: str, kind: Any) -> Any:
    """Parse a whole number, a number, a truth value or text.

    Raises:
        StudyError: it is none.
    """
    if kind is int and not (text.isascii() and text.isdigit() and len(text) < 15):
        raise StudyError(f"{name} {text[:80]!r}", expected="a whole number", do=f"write it so: ?{name}=12")
    if kind is bool and text not in ("true", "false"):
        raise StudyError(f"{name} {text[:80]!r}", expected="true or false", do=f"write it so: ?{name}=true")
    if kind is bool:
        return text == "true"
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError as error:
        raise StudyError(f"{name} {text[:80]!r}", expected="a number", do=f"write it so: ?{name}=0.5") from error
