"""Run all studies of heads, and write their results into the index."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float

from headscope.errors import IndexFormatError, StudyError
from headscope.index.columns import add_columns
from headscope.index.head_table import add_head_table, measure_row
from headscope.index.live import LiveIndex
from headscope.index.store import FeatureIndex
from headscope.limits import Count, Seed, Shuffles, check_fields
from headscope.stats import Measure
from headscope.studies.heads import superposition
from headscope.studies.heads.ablation import (
    HeadEffects,
    OffRule,
    effects_of,
    firing_under_ablation,
    other_features,
)
from headscope.studies.heads.catalogue import HeadMass, catalogue, head_mass
from headscope.studies.heads.roles import HeadRoles, copying, head_roles
from headscope.studies.heads.scores import DEFINITIONS, head_scores, prefix_curves
from headscope.studies.induction.behaviour import SELECTED
from headscope.studies.support.replacement import Kind, Replacement

WEIGHTS = ("dfa", "decoder", "decoder_out", "encoder", "encoder_in")

Progress = Callable[[str, int, int], None]
"""Progress callback: called with the stage, the work done and the total."""


@dataclass(frozen=True)
class HeadPlan:
    """Sample sizes of the studies of heads, on the corpus and on random tokens."""

    n_shuffles: Shuffles = 99
    """Models with shuffled weights, for the roles of heads; with fewer than 99 no role is found at 1 %."""
    mean_blocks: Count | None = 1024
    """Blocks for the mean and the resampled z; None: all."""
    fire_blocks: Count | None = 96
    """Blocks on which features are encoded under ablation of each head."""
    source_blocks: Count | None = 1024
    """Blocks on which the sources of a feature's heads are compared."""
    seed: Seed = 0
    """Seed of all random draws."""

    def __post_init__(self) -> None:
        """Reject numbers out of bounds.

        Raises:
            StudyError: for the first of them.
        """
        check_fields(self, StudyError)


@dataclass
class _Study:
    live: LiveIndex
    plan: HeadPlan
    report: Progress
    said: dict[str, Any] = field(default_factory=dict)

    @property
    def index(self) -> FeatureIndex:
        return self.live.index

    @property
    def layer(self) -> int:
        return self.live.sae.site.layer

    def of(self, stage: str) -> Callable[[int, int], None]:
        """Make the progress callback of one stage."""
        return lambda done, total: self.report(stage, done, total)

    def write(self, name: str, rows: Sequence[dict[str, Any]] | pa.Table) -> None:
        """Write one of the tables of heads."""
        add_head_table(self.index, name, rows, self.said)

    # ---------------------------------------------------------------------------------------------------------- scores
    def scores(self) -> None:
        """Score all heads of all layers, on repeated random tokens."""
        model, seed = self.live.model, self.plan.seed
        n = min(100, (model.spec.context - 1) // 2)
        scored, copied = head_scores(model, n=n, seed=seed), copying(model, seed=seed)
        roles = head_roles(model, n_shuffles=self.plan.n_shuffles, seed=seed, on_progress=self.of("roles"))
        length = min(128, model.spec.context, model.spec.d_vocab)
        curves = prefix_curves(model, longest=max(1, min(9, (length - 1) // 2 - 1)), length=length, seed=seed)
        rows = []
        for layer in range(model.spec.n_layers):
            for head in range(model.spec.n_heads):
                row: dict[str, Any] = {"layer": layer, "head": head, "roles": ", ".join(roles.names(layer, head))}
                for name in DEFINITIONS:
                    low, high = _ends(scored.intervals[name][:, layer, head].tolist())
                    value = float(getattr(scored, name)[layer, head])
                    row |= _score_row(roles, name, (layer, head), (value, low, high), scored.even[name])
                low, high = _ends(copied.interval[:, layer, head].tolist())
                value = float(copied.share[layer, head])
                row |= _score_row(roles, "copying", (layer, head), (value, low, high), 0.01)
                row |= {"prefix": curves.attention[:, layer, head].tolist()}
                row |= {"prefix_null": curves.null[:, layer, head].tolist()}
                ends = curves.interval[:, :, layer, head]
                if not ends.isnan().any():
                    row |= {"prefix_low": ends[0].tolist(), "prefix_high": ends[1].tolist()}
                rows.append(row)
        self.write("scores", rows)

    # ------------------------------------------------------------------------------------------------------- catalogue
    def catalogue(self, mass: HeadMass) -> None:
        """Group the features of each head of the SAE's layer into families."""
        cards, clusters = [], []
        for i, by in enumerate(WEIGHTS):
            self.report("catalogue", i, len(WEIGHTS))
            for card in catalogue(self.index, by=by, mass=mass, seed=self.plan.seed):
                key = {"layer": self.layer, "head": card.head, "weights": by}
                measured = {
                    name: getattr(card, name) for name in ("effective_features", "effective_families", "largest")
                }
                row = {**key, "n_features": card.n_features, "top": card.top.tolist(), "top_in_one": card.top_in_one}
                cards.append(row | {k: v for name, of in measured.items() for k, v in measure_row(name, of).items()})
                clusters += [
                    {**key, "family": own.family, "n": own.n, "share": own.share, "latents": own.latents.tolist()}
                    for own in card.clusters
                ]
        self.report("catalogue", len(WEIGHTS), len(WEIGHTS))
        self.write("catalogue", cards)
        self.write("clusters", clusters)

    # -------------------------------------------------------------------------------------------------------- ablation
    def ablation(self, replacements: dict[Kind, Replacement]) -> HeadEffects:
        """Write features x heads, exact from the index, and the features of each family that each head silences."""
        effects = effects_of(self.live, list(replacements.values()), self.of("ablation"))
        tables, rows = [], []
        for found in effects:
            live = np.flatnonzero(found.n_active > 0)
            n = found.n_active[live]
            tables.append(
                pa.table(
                    {
                        "kind": [found.kind] * len(live),
                        "latent": live,
                        "n_active": n,
                        "off": _by_head(found.fraction_off[live]),
                        "retained": _by_head(found.retained[live]),
                        "undecided": _by_head(found.n_undecided[live] / n[:, None]),
                    }
                )
            )
            rows += self._turned_off(found)
        self.write("ablation", pa.concat_tables(tables))
        self.write("turned_off", rows)
        return effects[0]

    def _turned_off(self, found: HeadEffects) -> list[dict[str, Any]]:
        table, rows = self.index.table(), []
        live = found.n_active > 0
        top = table["top_head"].to_numpy(zero_copy_only=False)
        induction = self.induction()
        for head in range(found.n_heads):
            decoder = self.index.shares["decoder"][:, head]
            members = {"live": live, "own": live & (top == head), "selected": live & (decoder >= SELECTED)}
            members |= {} if induction is None else {"induction": live & induction}
            for family, of in members.items():
                for rule in get_args(OffRule):
                    key = {"layer": self.layer, "head": head, "kind": found.kind, "rule": rule, "family": family}
                    chosen = np.flatnonzero(of)
                    off = found.turned_off(chosen, head, rule) if len(chosen) else _no_member(family)
                    rows.append(key | measure_row("off", off))
        return rows

    def induction(self) -> Bool[np.ndarray, " latent"] | None:
        """Return the verdicts of the composite test, if there are any."""
        try:
            verdict = self.index.columns("induction")["verdict"]
        except IndexFormatError:
            return None
        return verdict.fill_null(False).to_numpy(zero_copy_only=False).astype(bool)

    def firing(self, replacement: Replacement, mass: HeadMass) -> None:
        """Find features switched on and off on some blocks, and the features of each head that are not induction."""
        found = firing_under_ablation(
            self.live,
            replacement,
            max_blocks=self.plan.fire_blocks,
            seed=self.plan.seed,
            on_progress=self.of("firing"),
        )
        induction = self.induction()
        family = np.zeros(self.index.n_latents, dtype=bool) if induction is None else induction
        rows = []
        for head in range(self.index.n_heads):
            others = other_features(found, mass.total, family, head)
            rows.append(
                {
                    "layer": self.layer,
                    "head": head,
                    "kind": found.kind,
                    "n_tokens": found.n_tokens,
                    "n_clean": int(found.n_clean.sum()),
                    "n_lost": int(found.n_clean.sum() - found.n_both[:, head].sum()),
                    "n_gained": int(found.n_turned_on[:, head].sum()),
                    **{name: getattr(others, name).tolist() for name in ("firing", "lost", "by_dfa")},
                    "family": "nothing" if induction is None else "induction",
                }
            )
        self.write("ablated", rows)

    # --------------------------------------------------------------------------------------------------- superposition
    def superposition(self, replacement: Replacement, effects: HeadEffects) -> None:
        """Write the number of heads each feature rests on and whether it needs them all, one column each, and nulls."""
        index, seed = self.index, self.plan.seed
        columns: dict[str, np.ndarray] = {}
        definitions: dict[str, str] = {}
        measures: dict[str, Measure] = {}
        curves = []
        for by in superposition.DEFINITIONS:
            found = superposition.concentration(index, by, seed=seed)
            measures[f"several heads by {by}"] = found.several
            for name, values in (("top", found.top), ("participation", found.participation)):
                columns[f"{name}_{by}"] = _spread(index, found.latents, values)
            definitions |= {
                f"top_{by}": f"largest share of a head by {by}",
                f"participation_{by}": f"1 / sum share^2 by {by}: how many heads it rests on",
            }
            curves += _curves(found)
        self.write("concentration", curves)
        joint = superposition.redundancy(self.live, replacement, seed=seed)
        measures["made by several heads"] = joint.several()
        measures |= {outcome: joint.share(outcome) for outcome in superposition.OUTCOMES}
        own = joint.features
        agreement = superposition.source_agreement(
            self.live, own, max_blocks=self.plan.source_blocks, seed=seed, on_progress=self.of("sources")
        )
        measures["divergence of sources"] = agreement.mean
        self.write(
            "measures_superposition",
            [
                {"measure": name, "definition": of.definition, **measure_row("value", of)}
                for name, of in measures.items()
            ],
        )
        by_row = {
            "n_heads": (own.heads.sum(1).astype(float), "heads with at least 0.1 of its squared DFA"),
            "super_additivity": (own.super_additivity, "(activation lost jointly - singly) / jointly, mean ablation"),
            "correlation": (own.correlation, "mean correlation between the contributions of its heads"),
            "divergence": (agreement.divergence, "mean divergence of the sources of its heads, bits"),
            "divergence_elsewhere": (agreement.elsewhere, "the same between one of its heads and another head"),
        }
        for i, outcome in enumerate(superposition.OUTCOMES):
            said = f"share of active tokens at which ablating its heads singly and jointly is '{outcome}'"
            by_row[outcome.replace(" ", "_")] = (own.counts[:, i] / np.maximum(own.n, 1), said)
        for name, (values, said) in by_row.items():
            columns[name] = _spread(index, own.latents, values)
            definitions[name] = said
        least = np.where(np.isnan(effects.retained).all(1), np.nan, np.nan_to_num(effects.retained, nan=np.inf).min(1))
        columns["retained"] = least
        definitions["retained"] = "least activation left when one head is mean-ablated, as a share of what it was"
        self._columns(columns, definitions)

    def _columns(self, columns: dict[str, np.ndarray], definitions: dict[str, str]) -> None:
        table = {"latent": pa.array(np.arange(self.index.n_latents), pa.int32())}
        table |= {name: pa.array(values, mask=~np.isfinite(values)) for name, values in columns.items()}
        add_columns(self.index, "heads", pa.table(table), {**self.said, "definitions": definitions})


def study_heads(live: LiveIndex, plan: HeadPlan | None = None, on_progress: Progress | None = None) -> None:
    """Run all studies of heads of the model and of all features by head, and write them into the index.

    Writes the tables `scores`, `catalogue`, `clusters`, `ablation`, `turned_off`, `ablated`, `concentration` and
    `measures_superposition` of `index.head_table`, and the columns `heads.*`. Each is whole or absent; induction
    features are distinguished if `induction_store.save_family` has run before.

    Raises:
        StudyError: a TopK SAE.
        IndexFormatError: a damaged index.
        OutputError: it cannot be written.
    """
    plan = plan or HeadPlan()
    said = {"settings": vars(plan), "n": f"{live.index.manifest['corpus']['n_tokens']} text tokens"}
    study = _Study(live, plan, on_progress or (lambda _stage, _done, _total: None), said)
    study.scores()
    mass = head_mass(live.index)
    study.catalogue(mass)
    kinds = get_args(Kind)
    replacements = Replacement.several(
        live, kinds, max_blocks=plan.mean_blocks, seed=plan.seed, on_progress=study.of("mean of z")
    )
    effects = study.ablation(replacements)
    study.superposition(replacements["mean"], effects)
    study.firing(replacements["mean"], mass)


def _score_row(
    roles: HeadRoles, name: str, at: tuple[int, int], value: tuple[float, float | None, float | None], even: float
) -> dict[str, Any]:
    test = next(test for test in roles.tests if test.role == name)
    null = test.null[:, *at]
    own, low, high = value
    return {
        name: own,
        f"{name}_low": low,
        f"{name}_high": high,
        f"{name}_even": even,
        f"{name}_null": float(null.mean()),
        f"{name}_null_high": float(null.max()),
        f"{name}_p": float(test.p[at]),
    }


def _ends(interval: list[float]) -> tuple[float | None, float | None]:
    low, high = (None if np.isnan(end) else end for end in interval)
    return low, high


def _by_head(values: Float[np.ndarray, "row head"]) -> pa.Array:
    return pa.array(values.tolist(), pa.list_(pa.float64()))


def _spread(index: FeatureIndex, latents: np.ndarray, values: np.ndarray) -> np.ndarray:
    whole = np.full(index.n_latents, np.nan)
    whole[latents] = values
    return whole


def _no_member(family: str) -> Measure:
    return Measure("share of these features that are off when the head is ablated", 0, missing=f"no {family} feature")


def _curves(found: superposition.Concentration) -> list[dict[str, Any]]:
    _, own, nulls = found.histogram()
    rows = {"features": (own, found.participation)}
    rows |= {kind: (nulls[kind], found.participation_null[kind]) for kind in nulls}
    return [
        {
            "weights": found.by,
            "of": of,
            "n": len(values),
            "top": counts.tolist(),
            "participation": np.quantile(values, np.linspace(0, 1, 11)).tolist() if len(values) else [],
        }
        for of, (counts, values) in rows.items()
    ]
