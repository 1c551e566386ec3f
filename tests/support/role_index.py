"""The small index of dive_index with what studies of families and heads add to it, all numbers known."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dive_index import N_LATENTS, built
from headscope.explorer.families import IndexFamilies
from headscope.explorer.head_pages import IndexHeads
from headscope.explorer.page_routes import PageRoutes
from headscope.index.columns import add_columns
from headscope.index.head_table import ROLES, add_head_table, measure_row
from headscope.index.labels import Judgement, LabelStore
from headscope.index.store import FeatureIndex
from headscope.stats import Estimate, Measure

HOSTILE = "</script><img src=x onerror=alert(1)>\u202e"
MEMBERS = (4, 6, 8, 10)
LABELLED = 6
KINDS = ("ablation", "mean")
CRITERIA = {
    "rate": 0.6,
    "least": 10,
    "source_share": 0.5,
    "copy_rank": 0.01,
    "off": 0.5,
    "reading": {"unit": "token", "first": "fails", "expected": "before B"},
}
_NUMBERS = ("token", "n_expected", "rate", "first_rate", "source_share", "head", "copy_rank", "off", "off_control")
_INDUCTION = (*_NUMBERS, "verdict")  # as `induction_store.save_columns` writes them


def live_latents(index: FeatureIndex) -> list[int]:
    return np.flatnonzero(index.table()["n_active"].to_numpy() > 0).tolist()


def add_induction(index: FeatureIndex, members: tuple[int, ...] = MEMBERS, **criteria: Any) -> None:
    """Members pass all tests; others fail one each in turn, and some have no earlier B's at all."""
    rows: dict[str, list[Any]] = {"latent": list(range(N_LATENTS)), **{name: [] for name in _INDUCTION}}
    live = set(live_latents(index))
    for latent in range(N_LATENTS):
        passes, turn = latent in members, latent % 4
        tested = {
            "token": latent % 7 + 1,
            "n_expected": 20,
            "rate": 0.75 if passes or turn != 1 else 0.6,  # 0.6 is not above 0.6
            "first_rate": 0.1,
            "source_share": 0.9 - latent / 100 if passes or turn != 2 else 0.25,
            "head": latent % index.n_heads,
            "copy_rank": 0.005 if passes or turn != 3 else 0.5,
            "off": 0.875 if passes else (0.25 if turn == 0 else None),
            "off_control": 0.125 if passes or turn == 0 else None,
            "verdict": passes,
        }
        if not passes and turn == 2 and latent > 12:
            tested |= dict.fromkeys(("source_share", "head", "copy_rank"))
        for name in _INDUCTION:
            rows[name].append(tested[name] if latent in live else None)
    add_columns(
        index,
        "induction",
        pa.table(rows),
        {"settings": CRITERIA | criteria, "definitions": {n: f"what {n} is" for n in _INDUCTION}, "n": "made up"},
    )


def add_kinds(index: FeatureIndex) -> None:
    """Proxies: a third of the live features are of the family token, none of the high-level context."""
    live = set(live_latents(index))
    names = ["kind", "proxy"]
    rows: dict[str, list[Any]] = {"latent": list(range(N_LATENTS))}
    rows["kind"] = [
        None if j not in live else ("token", "local context", "unexplained")[j % 3] for j in range(N_LATENTS)
    ]
    rows["proxy"] = [None if j not in live else HOSTILE for j in range(N_LATENTS)]
    for short in ("local", "context", "token"):
        rows[f"{short}_proxy"] = [HOSTILE if j in live else None for j in range(N_LATENTS)]
        names.append(f"{short}_proxy")
        for column in ("precision", "recall", "auc", "pearson"):
            names.append(f"{short}_{column}")
            rows[names[-1]] = [
                None if j not in live or j == 1 else 0.9 - 0.3 * (j % 3) - j / 1000 for j in range(N_LATENTS)
            ]
    add_columns(
        index,
        "proxies",
        pa.table(rows),
        {
            "settings": {"min_pearson": 0.3, "min_active": 30},
            "definitions": {n: f"what {n} is" for n in names},
            "n": "made up",
        },
    )


def add_heads(index: FeatureIndex) -> None:
    """Scores of all heads, the catalogue and ablations of those of the SAE's layer."""
    model, layer = index.manifest["model"], index.manifest["layer"]
    n_heads, live = model["n_heads"], live_latents(index)
    said = {"settings": {"seed": 0}, "n": "made up"}
    add_head_table(index, "scores", [_score(at, h) for at in range(model["n_layers"]) for h in range(n_heads)], said)
    cards, clusters = [], []
    for head in range(n_heads):
        for weights in ("dfa", "decoder"):
            key = {"layer": layer, "head": head, "weights": weights}
            effective = Measure("", 20, 6.5, 6.0, 7.0, "bootstrap", null=Estimate(9.0, 8.0, 10.0))
            largest = Measure("", 3, 0.5, 0.4, 0.6, "bootstrap", null=Estimate(0.25, 0.2, 0.3))
            none = Measure("", 3, 2.5, missing="no interval of weights")
            cards.append(
                key
                | {"n_features": len(live), "top": live[:10], "top_in_one": 7}
                | measure_row("effective_features", effective)
                | measure_row("effective_families", none)
                | measure_row("largest", largest)
            )
            for rank, family in enumerate([f"word > {HOSTILE}", "copies word", "digit > digit"]):
                own = live[rank::3]
                clusters.append(key | {"family": family, "n": len(own), "share": 0.5 / 2**rank, "latents": own[:10]})
    add_head_table(index, "catalogue", cards, said)
    add_head_table(index, "clusters", clusters, said)
    ablation, turned = [], []
    for kind in ("mean", "zero"):
        for latent in live:
            left = [(latent + 3 * h) % 10 / 10 + (kind == "zero") / 100 for h in range(n_heads)]
            off = [1 - share for share in left]
            ablation.append(
                {"kind": kind, "latent": latent, "n_active": 12, "off": off, "retained": left}
                | {"undecided": [0.0] * n_heads}
            )
        for head in range(n_heads):
            for family in ("live", "induction"):
                found = Measure("", 30, 0.25, 0.125, 0.5, "Wilson 95 %", null=Estimate(0.1, 0.0, 0.2))
                few = Measure("", 4, missing="4 features; at least 30 are needed")
                turned.append(
                    {"layer": layer, "head": head, "kind": kind, "rule": "every token", "family": family}
                    | measure_row("off", found if family == "live" else few)
                )
    add_head_table(index, "ablation", ablation, said)
    add_head_table(index, "turned_off", turned, said)
    resting = {"measure": "made by several heads", "definition": "a share"}
    several = Measure("", 20, 0.75, 0.5, 0.9, "Wilson 95 %", null=Estimate(0.9, 0.8, 1.0))
    add_head_table(index, "measures_superposition", [resting | measure_row("value", several)], said)
    passing = {"measure": "induction features", "definition": "a share"}
    share = Measure("", 20, 0.2, 0.1, 0.3, "Wilson 95 %", null=Estimate(0.05, 0.0, 0.1))
    add_head_table(index, "measures_induction", [passing | measure_row("value", share)], said)
    fires = {"kind": "mean", "n_tokens": 900, "n_clean": 400, "n_lost": 30, "n_gained": 20, "family": "induction"}
    lists = {"firing": live[:5], "lost": live[5:7], "by_dfa": []}
    add_head_table(index, "ablated", [{"layer": layer, "head": h, **fires, **lists} for h in range(n_heads)], said)


def score_of(layer: int, head: int, role: str) -> float:
    return round(((3 * layer + head) * 7 + ROLES.index(role)) % 10 / 10 + 0.05, 4)


def _score(layer: int, head: int) -> dict[str, Any]:
    row: dict[str, Any] = {"layer": layer, "head": head, "roles": "induction, copying" if head == 1 else ""}
    for role in ROLES:
        value = score_of(layer, head, role)
        parts = {
            "": value,
            "_low": value - 0.02,
            "_high": value + 0.02,
            "_even": 0.01,
            "_null": 0.02,
            "_null_high": 0.1,
        }
        row |= {f"{role}{part}": number for part, number in parts.items()} | {f"{role}_p": 0.01}
    curve = [0.1, 0.4, 0.6]
    return row | {
        "prefix": curve,
        "prefix_low": [v - 0.05 for v in curve],
        "prefix_high": [v + 0.05 for v in curve],
        "prefix_null": [0.01, 0.02, 0.01],
    }


def studied(random_model, random_corpus, random_sae, folder: Path) -> FeatureIndex:
    """The index with all of it, and a label that no page may take for markup."""
    index = built(random_model, random_corpus, random_sae, folder)
    add_induction(index)
    add_kinds(index)
    add_heads(index)
    LabelStore(index).add(LABELLED, "me", Judgement(verdict="interpretable", text=HOSTILE))
    return index


def pages_of(index: FeatureIndex) -> PageRoutes:
    return PageRoutes(IndexFamilies(index), IndexHeads(index))
