"""Formatting of a report's numbers."""

from headscope.report.records import Claim, Unit

DASH = "\u2013"
"""Placeholder for missing numbers."""


def said(value: int | float | str | None, unit: Unit = "") -> str:
    """Format a value: `0.873`, `87.3 %` for a share, `+0.012` for a small loss; a dash if missing."""
    if value is None:
        return DASH
    if isinstance(value, str):
        return value
    if unit == "share":
        return f"{100 * value:.1f} %" if value == 0 or abs(value) >= 0.001 else f"{100 * value:.2g} %"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def number(claim: Claim) -> str:
    """Format our number, or the reason why there is none."""
    return claim.missing or DASH if claim.ours is None else said(claim.ours, claim.unit)


def interval(claim: Claim) -> str:
    """Format the interval: `[0.86, 0.88]`; empty if missing."""
    if claim.interval is None:
        return ""
    low, high = (said(end, claim.unit) for end in claim.interval)
    return f"[{low.removesuffix(' %')}, {high.removesuffix(' %')}]"


def beside(claim: Claim) -> str:
    """Format n and null: `n 1,024; null 0.01`; empty if both are missing."""
    parts = [f"n {claim.n:,}"] if claim.n is not None else []
    if claim.null is not None:
        parts.append(f"null {said(claim.null, claim.unit)}")
    return "; ".join(parts)


def duration(seconds: int | float) -> str:
    """Format a duration: `42 s`, `7.1 min`."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
