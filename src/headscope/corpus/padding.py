"""Masks and positions that accompany the token ids of a row, as written by tokenizers and collators of `transformers`.

Padding is removed where a row is read, so that no model and no statistic ever sees it. The rest gives the same
activations as the padded row under its mask: padding is not attended to, and positions are counted without it.
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
_MASK, _SPECIAL, _POSITIONS, _LABELS = "attention_mask", "special_tokens_mask", "position_ids", "labels"
_SAYS_MORE = re.compile(
    r"att(entio)?n_?masks?|(^|_)(pad(ding)?|inputs?|tokens?|ids|valid|src|source|seq(uence)?)_?masks?$|^masks?$"
    r"|^(is|non|not|un)?_?pad(s|ding|ded)?(_?(len(gth)?s?|tokens?|positions?))?$",
    re.IGNORECASE,
)
"""Names of columns that define which tokens see one another; only those in `companions` are read."""
_SAYS_MORE_IN_LISTS = re.compile(
    r"(^|_)(cu_?|max_?)?seq(uence)?_?(lens?|len(gth)?s?|ids?|idx|starts?|ends?|boundaries)(_|$)|(^|_)segment"
    r"|(^|_)doc(ument)?s?_?(ids?|idx|lens?|len(gth)?s?|starts?|ends?|boundaries)(_|$)"
    r"|^((inputs?|tokens?)_?)?pos(ition)?s?(_?ids?)?$",
    re.IGNORECASE,
)
"""Likewise, for columns with a list in each row: `doc_id` may also be the name of a document."""
LAYOUT = frozenset({_MASK, _POSITIONS})
"""Those of `companions` that indicate padding, or where sequences start."""
_NO_LABEL = -100
"""The label that torch's losses ignore."""
_LENGTH = re.compile(
    r"((inputs?|ids|tokens?|seq(uence)?|real|true|actual|valid|unpadded|original)_?)?len(gth)?s?"
    r"|(n|nb|num|number_?of)_?tokens|tokens?_?count",
    re.IGNORECASE,
)
"""Names of columns with the number of tokens of a row, without padding."""
_LOOKED_AT = 1024  # rows, or numbers of a stream
_OTHER_ARRAYS = re.compile(
    r"mask|label|position_?id|token_?type|segment|(^|_)(len(gth)?s?|loss(es)?)(_|$)", re.IGNORECASE
)


@dataclass(frozen=True)
class Piece:
    """Tokens that attend only to one another, without padding; their positions count from 0."""

    ids: Int[np.ndarray, " token"]
    marked: frozenset[int] = frozenset()
    """Those of the ids that the row marks as special."""


def companions(field: str, names: Sequence[str]) -> dict[str, str]:
    """Return the columns that accompany one of token ids, by content: for `x_input_ids`, `x_attention_mask`.

    Columns with numbers of tokens are returned under their own names.
    """
    found = {kind: name for kind, name in _named(field).items() if name in names}
    return found | {name: name for name in names if name != field and _LENGTH.fullmatch(name)}


def _named(field: str) -> dict[str, str]:
    kinds = _MASK, _SPECIAL, _POSITIONS, _LABELS
    return {kind: field.replace(_IDS, kind) if _IDS in field else kind for kind in kinds}


def check_unread(field: str, lists: Mapping[str, bool], where: str) -> None:
    """Reject an unsupported column of padding or sequence boundaries.

    Columns of other token ids, and their companions, are allowed.

    Args:
        field: the column of token ids.
        lists: the name of each column, and whether it has a list in each row.
        where: their location, for messages.

    Raises:
        CorpusError: there is one.
    """
    others = [name for name in lists if _IDS in name or name == "tokens"]
    known = {name for ids in (field, *others) for name in _named(ids).values()}
    own_mask = re.sub(r"_ids$", "_mask", field)
    for name, is_list in lists.items():
        says_more = _SAYS_MORE.search(name) or (
            is_list and (_SAYS_MORE_IN_LISTS.search(name) or _LENGTH.fullmatch(name))
        )
        if (says_more or name == own_mask) and name not in (field, *known):
            raise CorpusError(
                f"{where} has {name} beside the token ids in {field}, which is not read",
                expected=f"masks and positions called {', '.join([*_named(field).values()][:3])}",
                do="rename the column, or write the sequences as rows of their own, without padding",
            )


def check_holds_ids(name: str, values: np.ndarray, where: str) -> None:
    """Reject an array that holds masks or positions instead of token ids, by its name or by holding only 0 and 1.

    Raises:
        CorpusError: it does.
    """
    is_named = any(kind.search(name) for kind in (_OTHER_ARRAYS, _SAYS_MORE, _SAYS_MORE_IN_LISTS))
    if is_named or (values.size > 1 and np.isin(values[:_LOOKED_AT], (0, 1)).all()):
        raise CorpusError(
            f"{where} holds {'no token ids by its name' if is_named else '0 and 1 alone, as a mask does'}",
            expected="files of token ids without padding; masks and labels beside these are not read",
            do="name the files of token ids alone (--corpus FOLDER/input_ids.npy), or write Parquet files with a "
            f"column {_IDS} and a column {_MASK}",
        )


def pieces(ids: Int[np.ndarray, " token"], beside: Mapping[str, Any], where: str) -> list[Piece]:
    """Split a row into pieces: one, or one for each sequence that is packed into it.

    Args:
        ids: token ids of the row.
        beside: the companions, by content.
        where: the row, for messages.

    Raises:
        CorpusError: masks or positions that do not fit the ids, or that a run without padding cannot reproduce.
    """
    own = {kind: value for kind, value in beside.items() if kind in (_MASK, _SPECIAL, _POSITIONS)}
    columns = {kind: _column(value, len(ids), kind, where) for kind, value in own.items()}
    kept = _kept(columns.get(_MASK), len(ids), where)
    special = _binary(columns[_SPECIAL], _SPECIAL, where) if _SPECIAL in columns else np.zeros(len(ids), bool)
    starts = _starts(columns.get(_POSITIONS), kept, where, packed=_MASK not in columns)
    if _MASK not in columns:
        _check_whole(ids, beside, where)
    bounds = [*starts, kept.stop]
    if len(starts) > 1 and bounds[-1] - bounds[-2] > 1 and len(set(ids[bounds[-2] : bounds[-1]].tolist())) == 1:
        raise _unmasked(f"{where} has by its position_ids a last sequence of one token again and again")
    return [
        Piece(ids[start:stop], frozenset(ids[start:stop][special[start:stop]].tolist()))
        for start, stop in pairwise(bounds)
    ]


def _check_whole(ids: Int[np.ndarray, " token"], beside: Mapping[str, Any], where: str) -> None:
    """Reject a row that is padded according to its labels or length, but has no mask."""
    for name, n in beside.items():
        if _LENGTH.fullmatch(name) and isinstance(n, int | float) and 0 <= n < len(ids):
            raise _unmasked(f"{where} has {len(ids)} token ids and says {name} = {n:g}")
    labels = np.asarray(beside.get(_LABELS))
    if labels.shape == ids.shape and len(ids) > 1:
        for ends in (slice(0, 2), slice(-2, None)):
            if (labels[ends] == _NO_LABEL).all() and ids[ends][0] == ids[ends][1]:
                raise _unmasked(f"{where} begins or ends with one token again and again, labelled {_NO_LABEL}")


def _unmasked(got: str) -> CorpusError:
    return CorpusError(
        f"{got}, as padding looks",
        expected="an attention_mask that says what is padding",
        do="add it, or leave the column out",
    )


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
    """Return the tokens that are not padding, which must be contiguous."""
    if mask is None:
        return slice(0, n)
    if n and mask.dtype.kind == "f" and not mask.any():
        raise CorpusError(
            f"{where} has 0.0 alone in its attention_mask, which is all padding, or, added to scores, none",
            expected="1 where a token is none of padding",
            do="write the mask as whole numbers",
        )
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
    """Return the starts of sequences in a row: where positions restart, if nothing else separates them."""
    if kept.start == kept.stop:
        return []
    if positions is None:
        return [kept.start]
    own = positions[kept].astype(np.int64)
    if not np.array_equal(own, positions[kept]):
        raise CorpusError(
            f"{where} has position_ids that are no whole numbers",
            expected="positions that count the tokens of a sequence from 0, without padding",
            do="leave the column out, if the model is to count them so",
        )
    starts = np.flatnonzero(np.diff(own, prepend=own[0] - 2) != 1)
    counted = np.arange(len(own)) - np.repeat(starts, np.diff(np.append(starts, len(own))))
    if not np.array_equal(own, counted):
        raise CorpusError(
            f"{where} has position_ids that begin at {own[starts[own[starts] != 0][0]]:g}",
            expected="positions that count the tokens of a sequence from 0, without padding",
            do="leave the column out, if the model is to count them so",
        )
    if (np.diff(np.append(starts, len(own)))[:-1] == 1).any():
        raise _unmasked(f"{where} has sequences of one token by its position_ids")
    if len(starts) > 1 and not packed:
        raise CorpusError(
            f"{where} has {len(starts)} sequences by its position_ids, and an attention_mask that joins them",
            expected="sequences that do not see one another, or positions that go on",
            do="leave attention_mask out if they do not; transformers then keeps them apart, and so does headscope",
        )
    return [kept.start + int(start) for start in starts]
