"""`headscope study`: a command for every study of the registry, and one that runs all studies of a dictionary."""

import json
from dataclasses import dataclass, make_dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from headscope import jobs
from headscope.commands.display import Display
from headscope.commands.options import FLAT, OfIndex
from headscope.limits import Input, Latent, Name, check_fields
from headscope.studies.registry import STUDIES
from headscope.studies.study import DictionaryStudy, FeatureStudy
from headscope.studies.study import Study as AnyStudy

_INDEX = Annotated[Input, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX", help="An index folder.")]
_LATENT = Annotated[Latent, tyro.conf.Positional, tyro.conf.arg(metavar="LATENT", help="The feature.")]
_JSON = Annotated[bool, tyro.conf.arg(help="Print the page's data as JSON.")]
_SAES = Annotated[tuple[Name, ...], tyro.conf.arg(help="SAEs of earlier components of the model, such as `tiny-mlp0`.")]


@dataclass(frozen=True, kw_only=True)
class All(OfIndex):
    """Run every study of the whole dictionary that has no results yet; an interrupted run resumes."""

    resumes: ClassVar[bool] = True

    index: _INDEX
    again: bool = False
    """Also rerun the studies that have results."""

    def run(self) -> None:
        """Run the studies with a progress bar."""
        with Display() as display:
            found = jobs.study_all(
                self.index,
                model=self.model,
                sae=self.sae,
                device=self.device,
                again=self.again,
                on_progress=display.on_progress,
            )
        for name, record in found.items():
            display.say(f"{name}:")
            for line in _lines(record):
                display.say(f"  {line}")
        display.say(f"{len(found)} studies were run: look at them with headscope serve --index {self.index}")


@dataclass(frozen=True, kw_only=True)
class OneStudy(OfIndex):
    """Base of the commands of single studies; `command_of` adds a study's own options."""

    index: _INDEX

    def run(self) -> None:
        """Run the study with a progress bar and print its results."""
        study = STUDIES[type(self).__name__]
        given: Any = self  # with the fields that `command_of` adds
        check_fields(given.options)
        with Display() as display:
            subject = jobs.subject(
                self.index,
                with_model=study.needs_model,
                model=self.model,
                sae=self.sae,
                device=self.device,
                upstream_saes=getattr(self, "upstream_sae", ()),
                on_progress=display.on_progress,
            )
            if isinstance(study, DictionaryStudy):
                found = study.record(subject, given.options)
            elif given.json:
                found = study.answer(subject, given.latent, given.options)
            else:
                found = study.record(subject, given.latent, given.options)
        if isinstance(study, FeatureStudy) and given.json:
            display.say(json.dumps(found, allow_nan=False))
            return
        for line in _lines(found):
            display.say(line)
        if isinstance(study, DictionaryStudy):
            display.say(f"columns: {Path(self.index) / 'columns' / study.columns}.parquet")


def command_of(study: AnyStudy) -> type:
    """Make the command of one study: its question as the help, its options, and the latent for a study of a feature."""
    of_feature = isinstance(study, FeatureStudy)
    own: list[tuple] = [("options", Annotated[study.options, FLAT])]
    if of_feature:
        own = [("latent", _LATENT), *own, ("json", _JSON, False)]
    if of_feature and study.needs_model:
        own.append(("upstream_sae", _SAES, ()))
    said = {
        "__doc__": f"{study.question[0].upper()}{study.question[1:]}",
        "resumes": isinstance(study, DictionaryStudy) and study.resumes,
    }
    return make_dataclass(study.name, own, bases=(OneStudy,), frozen=True, kw_only=True, namespace=said)


def parse(arguments: list[str], *, registry: Any = None) -> Any:
    """Parse the arguments after `headscope study` into a command that is ready to run."""
    if arguments and not arguments[0].startswith("-"):
        arguments = [arguments[0].replace("-", "_"), *arguments[1:]]
        if arguments[0] != "all":
            jobs.study_of(arguments[0])
    commands: list[Any] = [Annotated[All, tyro.conf.subcommand(name="all")]]
    commands += [Annotated[command_of(study), tyro.conf.subcommand(name=study.name)] for study in STUDIES.values()]
    any_of: Any = reduce(or_, commands)
    return tyro.cli(any_of, args=arguments, prog="headscope study", description=Study.__doc__, registry=registry)


@dataclass(frozen=True, kw_only=True)
class Study:
    """Study the features of an index: one study by name, or `all` that add columns; see `headscope study --help`."""

    def run(self) -> None:
        """Print the available studies."""
        parse(["--help"])


def _lines(record: Any) -> list[str]:
    """Return the lines to print for a record: its own summary, or its measures and plain values, no arrays."""
    if hasattr(record, "lines"):
        return record.lines()
    import numpy as np

    from headscope.encode import leaves
    from headscope.stats import Measure

    plain = (type(None), Measure, bool, int, float, str, np.generic)
    return [
        f"{'.'.join(names) or 'found'}: {'none' if leaf is None else leaf}"
        for names, leaf in leaves(record, Measure)
        if isinstance(leaf, plain)
    ]
