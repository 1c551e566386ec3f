"""Encode records as JSON: dataclasses, arrays and numbers, rounded in bulk, since a card holds thousands of them."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

Json = dict[str, Any]
DIGITS = 7
"""Significant digits of numbers in a record: those of float32."""

_EXACT = 22  # powers of ten up to this one are exact in float64
_FEW = 24  # counts of numbers that are faster to round individually


def significant(values: Sequence[Any] | np.ndarray, digits: int = 4) -> list[Any]:
    """Round numbers of any shape to some significant digits, as nested lists; non-finite ones become None."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 1 and len(array) <= _FEW:
        return [short(value, digits) if math.isfinite(value) else None for value in array.tolist()]
    finite = np.isfinite(array)
    size = np.abs(np.where(finite, array, 0.0))
    power = digits - 1 - np.floor(np.log10(np.where(size > 0, size, 1.0)))
    up, down = 10.0 ** np.clip(power, 0, _EXACT), 10.0 ** np.clip(-power, 0, _EXACT)
    # one exact power divides and one multiplies, so that the result is the float nearest to the short decimal
    rounded = np.rint(np.where(finite, array, 0.0) * up / down) / up * down
    if finite.all():
        return rounded.tolist()
    either = rounded.astype(object)
    either[~finite] = None
    return either.tolist()


def short(value: float | None, digits: int = 4) -> float | None:
    """Round one number; None stays None."""
    return None if value is None else float(f"{value:.{digits}g}")


def encode(value: Any, digits: int = DIGITS) -> Any:
    """Encode a record for JSON: fields by name, arrays as lists, floats rounded, NaN and infinity as None.

    Args:
        value: a dataclass, a mapping, a sequence, an array, or a plain value; nested in any way.
        digits: significant digits of floats.

    Raises:
        TypeError: a value of another type.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float() | np.floating():
            return short(float(value), digits) if math.isfinite(value) else None
        case np.ndarray() if value.dtype.kind == "f":
            return significant(value, digits)
        case np.ndarray() if value.dtype.kind in "biuU":
            return value.tolist()
        case np.integer() | np.bool_() | np.str_():
            return value.item()
        case Mapping():
            return {str(name): encode(of, digits) for name, of in value.items()}
        case tuple() | list():
            return [encode(of, digits) for of in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name), digits) for field in fields(value)}
    raise TypeError(f"a {type(value).__name__} has no form in JSON")


def leaves(value: Any, whole: type, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every value inside a record with the names that lead to it.

    Args:
        value: a dataclass, a mapping or a sequence, nested in any way; anything else is a leaf itself.
        whole: dataclass that is a leaf too.
        names: names that lead to `value`; places in a sequence count from 0, as heads do.
    """
    inside: Iterable[tuple[str, Any]]
    if is_dataclass(value) and not isinstance(value, (type, whole)):
        inside = ((field.name, getattr(value, field.name)) for field in fields(value))
    elif isinstance(value, Mapping):
        inside = ((str(key), of) for key, of in value.items())
    elif isinstance(value, tuple | list):
        inside = ((str(i), of) for i, of in enumerate(value))
    else:
        yield names, value
        return
    for name, of in inside:
        yield from leaves(of, whole, (*names, name))
