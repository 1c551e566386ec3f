"""The quality of an SAE as a table of printed figures, each with its definition; no torch."""

from dataclasses import dataclass
from typing import Any

_NONE = "-"  # for NaN: a ratio of nothing, or losses that overflowed


@dataclass(frozen=True)
class Row:
    """One printed figure: ours, the post's, and its definition."""

    name: str
    value: str
    post: str
    definition: str


def quality_rows(q: dict[str, Any]) -> list[Row]:
    """Make the rows of `Quality.as_dict()`, next to the post's figures for gelu-2l layer 1 (Kissane et al., 2024)."""
    n, ce = f"{q['n_tokens']:,} tokens", q["ce"]
    site = q.get("site", "z")  # files written before sites were recorded are of z
    predicting = f"{q['n_loss_tokens']:,} predicting tokens" if "n_loss_tokens" in q else "all tokens"  # an older file
    c = "the constant c" if site == "z" else "c, which is zero at all sites but z"
    return [
        Row("L0", _plain(q["l0"]), "12", f"active latents per token, {n} without BOS"),
        Row("L0 with BOS", _number(q["l0_with_bos"], ".2f"), "", "the same, BOS positions counted"),
        Row(
            "loss_recovered",
            _percent(q["loss_recovered"]),
            "87 %",
            f"(CE_c - CE_sae) / (CE_c - CE_clean); {site} set to {c}, BOS included (the post's); "
            f"losses of {predicting}",
        ),
        Row(
            "ce_loss_score",
            _percent(q["ce_loss_score"]),
            "",
            f"(CE_zero - CE_sae) / (CE_zero - CE_clean); {site} set to zero, special tokens skipped (SAELens')",
        ),
        Row(
            "loss_recovered, mean ablation",
            _percent(q["loss_recovered_mean_ablation"]),
            "",
            f"(CE_mean - CE_sae) / (CE_mean - CE_clean); {site} set to its mean over the corpus",
        ),
        Row(
            "null: the mean alone",
            _percent(q["loss_recovered_by_mean"]),
            "",
            "(CE_c - CE_mean) / (CE_c - CE_clean): what one constant recovers without any SAE",
        ),
        Row(
            "CE clean / SAE",
            _losses(ce, "clean", "sae"),
            "",
            f"mean over {predicting}, nats; without BOS positions",
        ),
        Row(
            "CE zero / mean / c",
            _losses(ce, "zero", "mean", "c"),
            "",
            f"the same, {site} ablated",
        ),
        Row(
            "CE with BOS: clean / SAE / c",
            _losses(ce, "clean_bos", "sae_bos", "c_bos"),
            "",
            "nats a token over all positions, edits at all positions",
        ),
        Row(
            "explained variance",
            _percent(q["explained_variance"]),
            "",
            "1 - sum ||x - x_hat||^2 / sum ||x - mean||^2, without BOS",
        ),
        Row(
            "reconstruction bias",
            _plain(q["relative_reconstruction_bias"]),
            "",
            "mean ||x_hat||^2 / mean x . x_hat; below 1 is shrinkage",
        ),
        Row(
            "log10 density, -7 to 0",
            _sparkline(q["density_histogram"]),
            "",
            f"latents by the share of tokens on which they fire; {q['n_below']['1e-05']:,} fire on less than 1e-5",
        ),
        Row("dead", _percent(q["dead"]), "24 %", f"latents that never fire on {n}"),
    ]


def _sparkline(counts: list[int]) -> str:
    """Draw counts as text, three bins per character, relative to the highest: [1, 0, 0, 4, 0, 0] -> ▂█."""
    sums = [sum(counts[i : i + 3]) for i in range(0, len(counts), 3)]
    return "".join(" ▁▂▃▄▅▆▇█"[-(-8 * n // max(*sums, 1))] for n in sums)


def _number(value: float | None, form: str) -> str:
    return _NONE if value is None else format(value, form)


def _losses(ce: dict[str, float | None], *conditions: str) -> str:
    return " / ".join(_number(ce[condition], ".4f") for condition in conditions)


def _plain(e: dict[str, Any]) -> str:
    if None in e.values():
        return _NONE
    return f"{e['value']:.3g} [{e['low']:.3g}, {e['high']:.3g}]"


def _percent(e: dict[str, Any]) -> str:
    if None in e.values():
        return _NONE
    return f"{100 * e['value']:.1f} % [{100 * e['low']:.1f}, {100 * e['high']:.1f}]"
