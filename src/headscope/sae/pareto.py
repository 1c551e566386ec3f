"""What a sweep found: for each SAE how sparse and how good it is on held-out text; no torch."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
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
"""What is drawn against L0, with its definition."""
DEFINITIONS = {
    "l0": "active latents per token, without BOS",
    **MEASURES,
    "explained_variance": "1 - sum ||x - x_hat||^2 / sum ||x - mean||^2, without BOS",
    "loss_recovered_by_mean": "null: what the mean activation alone recovers, without any SAE",
}
"""Of all figures; intervals are of 95 %, by resampling blocks, Wilson's for `dead`."""
_CELLS = {
    "l0": "{:.2f}",
    "ce_loss_score": "{:.3f}",
    "loss_recovered": "{:.3f}",
    "explained_variance": "{:.3f}",
    "dead": "{:.3f}",
    "reconstruction_bias": "{:.3f}",
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One SAE, measured."""

    name: str
    """Its folder in the sweep's."""
    variant: str
    target_l0: float
    n_tokens: int
    """Evaluated, BOS excluded: n of all figures but `dead`."""
    n_blocks: int
    d_sae: int
    """Latents: n of `dead`."""
    l0: Estimate
    ce_loss_score: Estimate
    loss_recovered: Estimate
    explained_variance: Estimate
    dead: Estimate
    reconstruction_bias: Estimate
    loss_recovered_by_mean: Estimate
    recipe: Mapping[str, Any]
    """As `TrainConfig.as_dict`, but for where activations were kept."""

    @classmethod
    def of(cls, name: str, quality: Mapping[str, Any], recipe: Mapping[str, Any]) -> "Point":
        """One of what `Quality.as_dict` says of an SAE, and of its recipe."""
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
        """One of what `as_dict` made."""
        estimates = {f.name: _estimate(record[f.name]) for f in fields(cls) if f.type == Estimate}
        return cls(**{**{f.name: record[f.name] for f in fields(cls)}, **estimates})

    def as_dict(self) -> dict[str, Any]:
        """For a file; what is not a number is None."""
        record = asdict(self)
        estimates = {f.name: record[f.name] for f in fields(self) if f.type == Estimate}
        return record | {
            name: {end: None if isnan(value) else value for end, value in estimate.items()}
            for name, estimate in estimates.items()
        }

    def cells(self) -> list[str]:
        """A row under `HEADINGS`: values with their intervals."""
        return [self.variant, f"{self.target_l0:g}", *(_cell(getattr(self, n), form) for n, form in _CELLS.items())]


HEADINGS = (
    "variant",
    "target L0",
    *(
        name.replace("l0", "L0").replace("reconstruction_", "reconstruction ").replace("explained_", "explained ")
        for name in _CELLS
    ),
)
"""Of a table of points."""


@dataclass(frozen=True)
class Pareto:
    """All SAEs of a sweep."""

    model: str
    site: str
    """Name of the hook."""
    corpus: Mapping[str, Any]
    """The evaluated text."""
    points: tuple[Point, ...]

    def curves(self) -> dict[str, list[Point]]:
        """Points by variant, each by L0."""
        ordered = sorted(self.points, key=lambda point: point.l0.value)
        return {
            variant: [p for p in ordered if p.variant == variant] for variant in unique(p.variant for p in self.points)
        }

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


def unique(names: Iterable[str]) -> list[str]:
    """Names in the order of their first appearance."""
    return list(dict.fromkeys(names))


def _estimate(record: Mapping[str, Any]) -> Estimate:
    return Estimate(**{end: nan if record[end] is None else float(record[end]) for end in ("value", "low", "high")})


def _cell(estimate: Estimate, form: str) -> str:
    if isnan(estimate.value):
        return "not defined"
    value, low, high = (form.format(end) for end in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"
