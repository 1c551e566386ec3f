"""A study as a value: a question about a feature or a dictionary, its options, and how it is run and shown.

The page, the command line and the report read studies from `studies.registry`; none of them knows a study by name. A
study's own file imports what computes it inside `run`, so that a page without a model, and `--help`, load no torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from headscope.errors import StudyError
from headscope.limits import check_fields

if TYPE_CHECKING:
    from headscope.encode import Json
    from headscope.studies.subject import Subject

Group = Literal["when", "what", "how", "heads", "induction"]
"""The question that a study helps to answer: when a feature fires, what it does, how it is computed; or about heads
and induction."""


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """Options of a study that takes none."""


@dataclass(frozen=True)
class Tab:
    """A tab of a feature's card."""

    name: str
    """In the page's address; static/tabs/<name>.js draws it, or the page's table of a record where there is none."""
    label: str


@dataclass(frozen=True, kw_only=True)
class FeatureStudy:
    """A study of one feature of an index: an address of the page, `headscope study NAME INDEX LATENT`."""

    name: str
    """Lower-case letters, digits and underscores; unique among all studies."""
    group: Group
    question: str
    """What it answers, in one line."""
    run: "Callable[[Subject, int, Any], Any]"
    """`(subject, latent, options) -> record`, a frozen dataclass that `encode` takes."""
    options: type = NoOptions
    """A frozen dataclass; its fields are the parameters of the address and the options of the command."""
    needs_model: bool = False
    quick: bool = False
    """Only looks something up: it does not wait for studies that compute."""
    tabs: tuple[Tab, ...] = ()
    """The tabs that show its record."""
    show: "Callable[[Subject, int, Any, Any], Json] | None" = None
    """`(subject, latent, options, record) -> JSON`, where a page needs more than the record; else its fields."""
    python: "Callable[[Subject, int, Any, Any], str | dict[str, str]] | None" = None
    """`(subject, latent, options, record) ->` the calls that compute the record again; one text for each of several
    parts."""
    on_page: bool = True
    """Whether the page may ask for it, and a file of one feature holds it."""
    in_report: bool = False
    """Whether a report has a row for each `Measure` of its record, of every exemplar."""

    def record(self, subject: "Subject", latent: int, options: Any = None) -> Any:
        """Run it on one feature, one run of the model at a time.

        Raises:
            IndexFormatError: no such latent.
            HeadscopeError: what the study refuses; a StudyError where it needs a model and the subject has none.
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
        """What a page is told: the record, which feature and corpus it is of, and the Python that computes it again.

        Raises:
            HeadscopeError: as of `record`.
        """
        from headscope.encode import encode

        options = self.options() if options is None else options
        found = self.record(subject, latent, options)
        shown = encode(found) if self.show is None else self.show(subject, latent, options, found)
        corpus = subject.index.manifest["corpus"]
        shown |= {"latent": latent, "corpus": f"{corpus['name']}, {corpus['split']}"}
        return shown if self.python is None else shown | {"python": self.python(subject, latent, options, found)}


@dataclass(frozen=True, kw_only=True)
class DictionaryStudy:
    """A study of all features of an index, kept beside it: `headscope study NAME INDEX`."""

    name: str
    """As of a `FeatureStudy`."""
    group: Group
    question: str
    run: "Callable[[Subject, Any], Any]"
    """`(subject, options) -> record`; it writes the columns. A record with `lines()` says what to print."""
    columns: str
    """The columns that it adds to the index, by name (`index.columns`): when they are there, the study is done."""
    resumes: bool = False
    """Whether an interrupted run keeps what it has finished."""
    options: type = NoOptions
    needs_model: bool = False

    def record(self, subject: "Subject", options: Any = None) -> Any:
        """Run it, one run of the model at a time, and write what it finds.

        Raises:
            HeadscopeError: as of a `FeatureStudy`; an OutputError where the columns cannot be written.
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
    """Options from the parameters of an address, as `at=512&path=1.3`.

    Raises:
        StudyError: an unknown parameter, one given twice, one that is missing, or no number where one is expected.
    """
    known = {field.name: field for field in fields(study.options)}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise StudyError(
            f"parameter {unknown[0][:80]!r}", expected=", ".join(known) or "none", do="leave it out of the address"
        )
    values = {name: _parsed(name, texts, known[name].type) for name, texts in given.items()}
    required = [name for name, field in known.items() if field.default is MISSING]
    for name in required:
        if name not in values:
            raise StudyError(f"no {name}", expected=f"one {name}", do=f"add it to the address: ?{name}=...")
    return study.options(**values)


def _parsed(name: str, texts: Sequence[str], annotation: Any) -> Any:
    """One parameter: a whole number, whole numbers separated by commas, or text.

    Raises:
        StudyError: it is given more than once, or is no number where one is expected.
    """
    if len(texts) != 1:
        raise StudyError(f"{len(texts)} values of {name}", expected="one", do="give one")
    [text] = texts
    bare = next((part for part in get_args(annotation) if isinstance(part, type)), annotation)
    if get_origin(bare) is tuple or get_origin(annotation) is tuple:
        return tuple(dict.fromkeys(_whole(name, part) for part in text.split(","))) if text else ()
    return _whole(name, text) if bare is int else text


def _whole(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 15):
        raise StudyError(f"{name} {text[:80]!r}", expected="a whole number", do=f"write it so: ?{name}=12")
    return int(text)
