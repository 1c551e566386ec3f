"""Numbers for JSON, rounded in bulk: a card holds thousands, and has milliseconds to be made in."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

_EXACT = 22  # powers of ten up to this one are exact in float64
_FEW = 24  # numbers that are rounded sooner one by one


def significant(values: Sequence[Any] | np.ndarray, digits: int = 4) -> list[Any]:
    """Round numbers of any shape to some significant digits, as nested lists; what is not finite becomes None."""
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
