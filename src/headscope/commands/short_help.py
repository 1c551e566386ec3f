"""Short help of commands with many options: `--help` lists the main ones, `--help-all` all of them."""

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from typing import Annotated, Any, get_args, get_origin

import tyro

from headscope.commands.options import FLAT
from headscope.jobs.inputs import CorpusChoice
from headscope.sae.config import TrainConfig

ALL = "--help-all"
MAIN: Mapping[type, tuple[str, ...]] = {
    CorpusChoice: ("corpus", "split", "block_size", "max_tokens"),
    TrainConfig: ("variant", "d_sae", "target_l0", "tokens", "batch", "lr", "cache", "seed"),
}
"""The options listed by `--help`, by the record that declares them; of other records, all options are listed."""


@dataclass(frozen=True)
class ShortHelp:
    """A command whose help lists only its main options."""

    command: type
    n_hidden: int


def shortened(command: type) -> ShortHelp:
    """Hide the options of a command that are not in `MAIN`; defaults are unchanged."""
    own, n_hidden = [], 0
    for part in fields(command):
        parts: tuple[Any, ...] = get_args(part.type) if get_origin(part.type) is Annotated else (None,)
        if parts[0] in MAIN:
            short = _hiding(parts[0])
            own.append((part.name, Annotated[short, FLAT], field(default_factory=lambda p=part, s=short: _as(s, p))))
            n_hidden += len(fields(parts[0])) - len(MAIN[parts[0]])
    named = {"__doc__": command.__doc__}
    made = make_dataclass(command.__name__, own, bases=(command,), frozen=True, kw_only=True, namespace=named)
    return ShortHelp(made, n_hidden)


def _hiding(record: type) -> Any:
    """A record with only its main options listed."""
    hidden = [part for part in fields(record) if part.name not in MAIN[record]]
    own = [(part.name, Annotated[part.type, tyro.conf.Suppress], _default(part)) for part in hidden]
    return make_dataclass(record.__name__, own, bases=(record,), frozen=True, kw_only=True)


def _default(part: Field[Any]) -> Any:
    factory: Any = part.default_factory
    return field(default_factory=factory) if part.default is MISSING else part.default


def _as(record: Any, part: Field[Any]) -> Any:
    """Return the default value of a field as an instance of another class with the same fields."""
    factory: Any = part.default_factory
    default = factory()
    return record(**{own.name: getattr(default, own.name) for own in fields(default)})
