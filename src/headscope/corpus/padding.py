"""What stands beside the token ids of a row: masks and positions, as tokenizers and collators of `transformers` write.

Padding is taken out where a row is read, so that no model and no statistic ever sees it. What is left gives the same
activations as the padded row under its mask: padding is attended to by nobody, and positions are counted without it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from headscope.errors import CorpusError

_IDS = "input_ids"
_MASK, _SPECIAL, _POSITIONS = "attention_mask", "special_tokens_mask", "position_ids"
_SAYS_MORE = re.compile(r"attention_?mask|pad(ding)?_?mask|(^|_)seq_?(lens|lengths?|idx)", re.IGNORECASE)
"""Names of columns that say which tokens see one another; of those, `companions` are read and no others."""


@dataclass(frozen=True)
class Piece:
    """Tokens that attend to one another and to nothing else, without padding; their positions count from 0."""

    ids: Int[np.ndarray, " token"]
    marked: frozenset[int] = frozenset()
    """Those of the ids that the row marks as special."""


def companions(field: str, names: Sequence[str]) -> dict[str, str]:
    """The columns that belong to one of token ids, by what they hold: to `x_input_ids`, `x_attention_mask`."""
    return {kind: name for kind, name in _named(field).items() if name in names}


def _named(field: str) -> dict[str, str]:
    return {kind: field.replace(_IDS, kind) if _IDS in field else kind for kind in (_MASK, _SPECIAL, _POSITIONS)}


def check_unread(field: str, names: Sequence[str], where: str) -> None:
    """Refuse a column beside token ids that says what is padding, or where sequences end, and that is not read.

    Columns of other token ids, and what belongs to these, may be there.

    Raises:
        CorpusError: there is one.
    """
    others = [name for name in names if _IDS in name or name == "tokens"]
    known = {name for ids in (field, *others) for name in companions(ids, names).values()}
    unread = [name for name in names if name not in known and _SAYS_MORE.search(name)]
    if unread:
        raise CorpusError(
            f"{where} has {unread[0]} beside the token ids in {field}, which is not read",
            expected=f"masks and positions called {', '.join(_named(field).values())}",
            do="rename the column, or write the sequences as rows of their own, without padding",
        )


def pieces(ids: Int[np.ndarray, " token"], beside: Mapping[str, Any], where: str) -> list[Piece]:
    """The pieces of a row: one, or one for each sequence that is packed into it.

    Args:
        ids: of the row.
        beside: what `companions` names, by what it holds.
        where: the row, for messages.

    Raises:
        CorpusError: masks or positions that do not fit the ids, or of which a run without padding is not the equal.
    """
    columns = {kind: _column(value, len(ids), kind, where) for kind, value in beside.items()}
    kept = _kept(columns.get(_MASK), len(ids), where)
    special = _binary(columns[_SPECIAL], _SPECIAL, where) if _SPECIAL in columns else np.zeros(len(ids), bool)
    starts = _starts(columns.get(_POSITIONS), kept, where, packed=_MASK not in columns)
    bounds = [*starts, kept.stop]
    return [
        Piece(ids[start:stop], frozenset(ids[start:stop][special[start:stop]].tolist()))
        for start, stop in pairwise(bounds)
    ]


def _column(value: Any, n: int, kind: str, where: str) -> np.ndarray:
    if value is None:
        raise CorpusError(
            f"{where} has no {kind}, where the column has one for other rows",
            expected="a number for each token id",
            do=f"write {kind} for every row, or leave the column out",
        )
    try:
        values = np.asarray(value)
    except ValueError:  # lists of different lengths
        values = np.empty((0, 0))
    if values.shape != (n,) or (n and values.dtype.kind not in "biuf"):
        raise CorpusError(
            f"{where} has {n} token ids and a {kind} of shape {values.shape}",
            expected="a number for each token id",
            do=f"mend {kind}, or leave the column out",
        )
    return values


def _binary(values: np.ndarray, kind: str, where: str) -> Bool[np.ndarray, " token"]:
    if not np.isin(values, (0, 1)).all():
        other = sorted(set(np.unique(values).tolist()) - {0, 1})[:3]
        raise CorpusError(
            f"{where} has {', '.join(map(str, other))} in its {kind}",
            expected="0 and 1 alone",
            do="write each sequence as a row of its own if the numbers tell sequences apart, or leave the column out",
        )
    return values.astype(bool)


def _kept(mask: np.ndarray | None, n: int, where: str) -> slice:
    """The tokens that are not padding, which must lie together."""
    if mask is None:
        return slice(0, n)
    kept = np.flatnonzero(_binary(mask, _MASK, where))
    if not len(kept):
        return slice(0, 0)
    if kept[-1] - kept[0] + 1 != len(kept):
        at = int(kept[np.flatnonzero(np.diff(kept) > 1)[0]]) + 1
        raise CorpusError(
            f"{where} has padding between tokens, at position {at}",
            expected="padding before all tokens or after them",
            do="write what lies between as rows of its own, or take it out",
        )
    return slice(int(kept[0]), int(kept[-1]) + 1)


def _starts(positions: np.ndarray | None, kept: slice, where: str, *, packed: bool) -> list[int]:
    """Where sequences begin in a row: where positions begin anew, if nothing but these tells them apart."""
    if kept.start == kept.stop:
        return []
    if positions is None:
        return [kept.start]
    own = positions[kept].astype(np.int64)
    starts = np.flatnonzero(np.diff(own, prepend=own[0] - 2) != 1)
    counted = np.arange(len(own)) - np.repeat(starts, np.diff(np.append(starts, len(own))))
    if not np.array_equal(own, counted):
        raise CorpusError(
            f"{where} has position_ids that begin at {own[starts[own[starts] != 0][0]]:g}",
            expected="positions that count the tokens of a sequence from 0, without padding",
            do="leave the column out, if the model is to count them so",
        )
    if (np.diff(np.append(starts, len(own)))[:-1] == 1).any():
        raise CorpusError(
            f"{where} has sequences of one token by its position_ids, as padding looks",
            expected="an attention_mask that says what is padding",
            do="add it, or leave position_ids out",
        )
    if len(starts) > 1 and not packed:
        raise CorpusError(
            f"{where} has {len(starts)} sequences by its position_ids, and an attention_mask that joins them",
            expected="sequences that do not see one another, or positions that go on",
            do="leave attention_mask out if they do not; transformers then keeps them apart, and so does headscope",
        )
    return [kept.start + int(start) for start in starts]
