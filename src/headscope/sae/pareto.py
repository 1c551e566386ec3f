"""Results of a sweep: sparsity and quality of each SAE on held-out text; no torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import isnan, nan
from pathlib import Path
from typing import Any

from headscope.artefact import read_json, write_json
from headscope.errors import SAEError
from headscope.stats import Estimate

MEASURES = {
    "ce_loss_score": "(CE_zero - CE_sae) / (CE_zero - CE_clean); raw zero, special tokens skipped (SAELens')",
    "loss_recovered": "(CE_c - CE_sae) / (CE_c - CE_clean); z set to the constant c, BOS included (the post's)",
    "dead": "share of latents that never fire on the evaluated tokens",
    "reconstruction_bias": "mean ||x_hat||^2 / mean x . x_hat; below 1 is shrinkage",
}
"""Measures plotted against L0, with their definitions."""
DEFINITIONS = {
    "l0": "active latents per token, without BOS",
    **MEASURES,
    "explained_variance": "1 - sum ||x - x_hat||^2 / sum ||x - mean||^2, without BOS",
    "loss_recovered_by_mean": "null: what the mean activation alone recovers, without any SAE",
}
"""Definitions of all figures; 95 % intervals by resampling blocks, Wilson's for `dead`."""
_CELLS = {
    "l0": "{:.2f}",
    "ce_loss_score": "{:.3f}",
    "loss_recovered": "{:.3f}",
    "explained_variance": "{:.3f}",
    "dead": "{:.3f}",
    "reconstruction_bias": "{:.3f}",
}
_OF_EACH = ("variant", "target_l0")  # what a sweep varies


@dataclass(frozen=True, kw_only=True)
class Point:
    """One SAE with its measurements."""

    name: str
    """Its folder within the sweep's."""
    variant: str
    target_l0: float
    n_tokens: int
    """Evaluated tokens, without BOS: n of all figures but `dead`."""
    n_blocks: int
    d_sae: int
    """Number of latents: n of `dead`."""
    l0: Estimate
    ce_loss_score: Estimate
    loss_recovered: Estimate
    explained_variance: Estimate
    dead: Estimate
    reconstruction_bias: Estimate
    loss_recovered_by_mean: Estimate
    recipe: Mapping[str, Any]
    """As `TrainConfig.as_dict`, without the activation cache."""

    @classmethod
    def of(cls, name: str, quality: Mapping[str, Any], recipe: Mapping[str, Any]) -> "Point":
        """Make a point from an SAE's `Quality.as_dict` and its recipe."""
        return cls(
            name=name,
            variant=recipe["variant"],
            target_l0=float(recipe["target_l0"]),
            n_tokens=quality["n_tokens"],
            n_blocks=quality["n_blocks"],
            d_sae=recipe["d_sae"],
            reconstruction_bias=_estimate(quality["relative_reconstruction_bias"]),
            recipe={option: value for option, value in recipe.items() if option != "cache"},
            **{f.name: _estimate(quality[f.name]) for f in fields(cls) if f.type == Estimate and f.name in quality},
        )

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Point":
        """Read a point written by `as_dict`."""
        estimates = {f.name: _estimate(record[f.name]) for f in fields(cls) if f.type == Estimate}
        return cls(**{**{f.name: record[f.name] for f in fields(cls)}, **estimates})

    def as_dict(self) -> dict[str, Any]:
        """Return the point as JSON types; NaN becomes None."""
        record = asdict(self)
        estimates = {f.name: record[f.name] for f in fields(self) if f.type == Estimate}
        return record | {
            name: {end: None if isnan(value) else value for end, value in estimate.items()}
            for name, estimate in estimates.items()
        }

    def cells(self) -> list[str]:
        """Return a row under `HEADINGS`: values with their intervals."""
        return [self.variant, f"{self.target_l0:g}", *(_cell(getattr(self, n), form) for n, form in _CELLS.items())]


HEADINGS = (
    "variant",
    "target L0",
    *(
        name.replace("l0", "L0").replace("reconstruction_", "reconstruction ").replace("explained_", "explained ")
        for name in _CELLS
    ),
)
"""Headings of a table of points."""


@dataclass(frozen=True)
class Pareto:
    """All SAEs of one or several sweeps."""

    model: str
    site: str
    """Name of the hook."""
    corpus: Mapping[str, Any]
    """The evaluated text."""
    points: tuple[Point, ...]

    @classmethod
    def joined(cls, sweeps: Sequence["Pareto"]) -> "Pareto":
        """Merge several sweeps.

        Raises:
            SAEError: they differ in model, site or text, or have an SAE of the same recipe.
        """
        first, *others = [{"model": s.model, "site": s.site, **s.corpus} for s in sweeps]
        for other in others:
            unlike = [what for what in {**first, **other} if first.get(what) != other.get(what)]
            if unlike:
                got = "; ".join(f"{what} {first.get(what)} and {other.get(what)}" for what in unlike)
                raise SAEError(
                    f"sweeps that were measured on something else: {got}",
                    expected="SAEs of one model and site, measured on the same text",
                    do="leave one out, or sweep again with the same --model, --site, --layer, text and --eval-tokens",
                )
        points = tuple(point for sweep in sweeps for point in sweep.points)
        for i, point in enumerate(points):
            if any(point.recipe == before.recipe for before in points[:i]):
                raise SAEError(
                    f"{point.name} is in two sweeps with the same recipe",
                    expected="each recipe once",
                    do="leave one out, or sweep over other targets",
                )
        return replace(sweeps[0], points=points)

    def common(self) -> dict[str, Any]:
        """Recipe options shared by all SAEs, except variant and target."""
        return {option: value for option, value in self._options() if option not in self._differing()}

    def own(self) -> dict[str, dict[str, Any]]:
        """The other options, by curve; None where an SAE predates an option."""
        return {
            name: {option: points[0].recipe.get(option) for option in self._differing()}
            for name, points in self.curves().items()
        }

    def curves(self) -> dict[str, list[Point]]:
        """Return the points sorted by L0, grouped by recipes that differ only in their target.

        A curve is named by its variant and what differs from the first SAE's recipe: `batchtopk, prefixes 64 512`.
        """
        base, differing = self.points[0].recipe, self._differing()
        found: dict[str, list[Point]] = {}
        for point in self.points:
            values = {option: point.recipe.get(option) for option in differing}
            changed = [f"{option} {said(v)}" for option, v in values.items() if v != base.get(option)]
            found.setdefault(", ".join([point.variant, *changed]), []).append(point)
        return {name: sorted(points, key=lambda point: point.l0.value) for name, points in found.items()}

    def _options(self) -> Iterable[tuple[str, Any]]:
        """Return all options, each with the first value found."""
        found: dict[str, Any] = {}
        for point in self.points:
            found = {**point.recipe, **found}
        return ((option, value) for option, value in found.items() if option not in _OF_EACH)

    def _differing(self) -> list[str]:
        return [option for option, v in self._options() if any(p.recipe.get(option) != v for p in self.points)]

    def write(self, path: Path) -> None:
        """Write pareto.json.

        Raises:
            OutputError: it cannot be written.
        """
        points = [point.as_dict() for point in self.points]
        about = {"model": self.model, "site": self.site, "corpus": dict(self.corpus), "definitions": DEFINITIONS}
        write_json(path, about | {"saes": points})

    @classmethod
    def read(cls, path: Path) -> "Pareto":
        """Read pareto.json.

        Raises:
            SAEError: it is missing or damaged.
        """
        try:
            record = read_json(path)
            points = tuple(map(Point.read, record["saes"]))
            return cls(record["model"], record["site"], record["corpus"], points)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SAEError(
                f"{path}: {error!r}", expected="the pareto.json that `headscope sweep` writes", do="run the sweep"
            ) from error


def said(value: object) -> str:
    """Format a recipe's value for the command line."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return str(value)


def _estimate(record: Mapping[str, Any]) -> Estimate:
    return Estimate(**{end: nan if record[end] is None else float(record[end]) for end in ("value", "low", "high")})


def _cell(estimate: Estimate, form: str) -> str:
    if isnan(estimate.value):
        return "not defined"
    value, low, high = (form.format(end) for end in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"
