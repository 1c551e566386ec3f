"""Make the tables of an index folder from the results of the passes."""

import glob
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int

from headscope import attribution
from headscope.index.config import N_LOGITS, N_SOURCE_TOKENS, IndexPlan
from headscope.index.nulls import KINDS as NULL_KINDS
from headscope.index.parts import SortedParts
from headscope.index.passes import MOMENTS, SOURCE_COLUMNS, SOURCE_TOTALS, Subject, source_sums
from headscope.index.sources import merge_by_key
from headscope.index.sweep import KINDS, Distributions, Groups, Rows, runs
from headscope.index.vocabulary import TokenValues, copying_columns
from headscope.index.writing import (
    SMALL_ROW_GROUP,
    fixed_lists,
    lists,
    nullable,
    nullable_lists,
    parquet_writer,
    rounded,
)
from headscope.models.hf import Model

_COSINE_ROWS = 1024


# ------------------------------------------------------------------------------------------------------------ features
@dataclass(frozen=True)
class Totals:
    """Sums over all parts of one subject."""

    moments: Float[np.ndarray, "latent column"]
    heads: Float[np.ndarray, "latent three head"]
    """Sums of C_h, C_h^2 and C_h p."""
    maximum: Float[np.ndarray, " latent"]
    n_tokens: int

    @classmethod
    def of(cls, pairs: SortedParts, n_heads: int, n_tokens: int) -> "Totals":
        """Read the totals from the parts."""
        moments = pairs.totals("moments")
        heads = moments[:, len(MOMENTS) :].reshape(len(moments), 3, n_heads)
        return cls(moments[:, : len(MOMENTS)], heads, pairs.maxima("maximum").astype(np.float64), n_tokens)

    def _sum(self, name: str) -> Float[np.ndarray, " latent"]:
        return self.moments[:, MOMENTS.index(name)]

    @property
    def n_active(self) -> Int[np.ndarray, " latent"]:
        """Active tokens."""
        return self._sum("n").astype(np.int64)

    @property
    def mean(self) -> Float[np.ndarray, " latent"]:
        """Mean activation over active tokens; 0 for a dead latent."""
        return self._sum("f") / np.maximum(self._sum("n"), 1)

    @property
    def top_head(self) -> Int[np.ndarray, " latent"]:
        """The head with the largest share of squared DFA; -1 for a dead latent."""
        return np.where(self.n_active > 0, np.argmax(self.heads[:, 1], axis=1), -1)

    def over_all_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation of the activation, zeros included."""
        mean = self._sum("f") / self.n_tokens
        return mean, np.sqrt(np.maximum(self._sum("f2") / self.n_tokens - mean**2, 0))

    def columns(self, central: Float[np.ndarray, "latent power"]) -> dict[str, Any]:
        """Return moments and DFA shares of each latent; null where undefined. `central`: as in `Distributions`."""
        n = self._sum("n")
        dead = n == 0
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = self._sum("f") / n
            variance, skew, kurtosis = _central(*(central / n[:, None]).T)
            share, covariance, means = head_shares(n, self._sum("p"), self._sum("p2"), self.heads)
        constant = dead | (variance <= 1e-12 * mean**2)
        return {
            "n_active": pa.array(self.n_active),
            "density": n / self.n_tokens,
            "mean": nullable(mean, dead),
            "std": nullable(np.sqrt(np.maximum(variance, 0)), dead),
            "skew": nullable(skew, constant),
            "kurtosis": nullable(kurtosis, constant),
            "maximum": nullable(self.maximum, dead),
            "dfa_share": nullable_lists(share),
            "dfa_covariance": nullable_lists(covariance),
            "dfa_mean": nullable_lists(means),
        }


def _central(m1: np.ndarray, m2: np.ndarray, m3: np.ndarray, m4: np.ndarray) -> tuple[np.ndarray, ...]:
    """Compute variance, skew and kurtosis from moments about a point near the mean."""
    variance = m2 - m1**2
    third = m3 - 3 * m1 * m2 + 2 * m1**3
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    return variance, third / variance**1.5, fourth / variance**2


def head_shares(
    n: Float[np.ndarray, " row"],
    p: Float[np.ndarray, " row"],
    p2: Float[np.ndarray, " row"],
    heads: Float[np.ndarray, "row three head"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the shares of squared DFA, of covariance with p, and of the mean, from sums; NaN where undefined."""
    first, squares, products = heads[:, 0], heads[:, 1], heads[:, 2]
    n, p, p2 = n[:, None], p[:, None], p2[:, None]
    variance = p2 / n - (p / n) ** 2
    covariance = (products / n - first / n * (p / n)) / np.where(variance > 1e-12 * p2 / n, variance, np.nan)
    return squares / squares.sum(1, keepdims=True), covariance, first / first.sum(1, keepdims=True)


def feature_table(
    model: Model,
    subject: Subject,
    totals: Totals,
    distributions: Distributions,
    correlated: tuple[np.ndarray, np.ndarray],
    example_tokens: list[list[int]],
    values: TokenValues,
    report: Callable[[str, int, int], None],
) -> pa.Table:
    """Make one row per latent; columns that only a live latent has are null for a dead one."""
    sae, weights, n_heads = subject.sae, subject.weights, model.spec.n_heads
    columns: dict[str, Any] = {
        "latent": pa.array(range(sae.d_sae), pa.int32()),
        **totals.columns(distributions.central),
    }
    dead = totals.n_active == 0
    for name in ("quantiles", "histogram", "mass"):
        columns[name] = nullable_lists(getattr(distributions, name), dead)
    shares = {
        "decoder_share": attribution.decoder_share(sae, n_heads),
        "decoder_out_share": attribution.decoder_share_through_output(sae, model),
        "encoder_share": attribution.encoder_share(weights),
        "encoder_in_share": attribution.encoder_share_through_value(weights, model, subject.layer),
    }
    columns |= {name: fixed_lists(share.float().cpu().numpy()) for name, share in shares.items()}
    columns["bias"] = pa.array(weights.bias.float().cpu().numpy())
    effects = attribution.direct_logit_effects(sae, model, N_LOGITS, on_latents=partial(report, "logits"))
    for name in ("top_tokens", "top_values", "bottom_tokens", "bottom_values"):
        columns[f"logit_{name}"] = pa.array(list(getattr(effects, name).cpu().numpy()))
    for name in ("mean", "std", "skew", "kurtosis"):
        columns[f"logit_{name}"] = pa.array(getattr(effects, name).cpu().numpy())
    top_logit = effects.top_tokens[:, 0].cpu().numpy()
    columns |= copying_columns(model, subject, totals.top_head, top_logit, values, partial(report, "copying"))
    latents, pearson = correlated
    cosine = _cosines(sae.W_dec, latents)
    exists = latents >= 0
    n = exists.sum(1)
    columns["correlated_latents"] = lists(latents[exists], n, pa.int32())
    columns["correlated_pearson"] = lists(pearson[exists], n, pa.float32())
    columns["correlated_cosine"] = lists(cosine[exists], n, pa.float32())
    columns["example_tokens"] = pa.array(example_tokens, pa.list_(pa.int32()))
    return pa.table(columns)


def _cosines(
    rows: Float[torch.Tensor, "latent d"], others: Int[np.ndarray, "latent k"]
) -> Float[np.ndarray, "latent k"]:
    """Compute the cosine of each row with some others, in chunks: their vectors take k times the memory of the rows."""
    unit = torch.nn.functional.normalize(rows, dim=1)
    chosen = torch.from_numpy(others).to(rows.device)
    pairs = zip(unit.split(_COSINE_ROWS), chosen.split(_COSINE_ROWS), strict=True)
    return torch.cat([torch.einsum("jd,jkd->jk", own, unit[of]) for own, of in pairs]).float().cpu().numpy()


# ------------------------------------------------------------------------------------------------------------- sources
def source_tables(
    model: Model, pairs: SortedParts, shared: dict[str, np.ndarray], plan: IndexPlan
) -> tuple[pa.Table, pa.Table]:
    """Make the tables of each latent's largest source tokens above each threshold, and of the totals."""
    n_levels, n_heads, d_vocab = len(plan.thresholds), model.spec.n_heads, model.spec.d_vocab
    totals = pairs.totals("source_totals").reshape(-1, n_levels, len(SOURCE_TOTALS) + 3 * n_heads)
    sums = source_sums(d_vocab, len(totals) * n_levels, plan)
    for part in pairs.each(["source_keys", "source_sums"]):
        sums.add(torch.from_numpy(part["source_keys"]), torch.from_numpy(part["source_sums"]))
    key, values = sums.result()
    totals = totals[:, ::-1].cumsum(1)[:, ::-1]  # those above a threshold are above all smaller ones
    attention = pairs.totals("attention")
    tables, of_totals = [], []
    for level, threshold in enumerate(plan.thresholds):
        above = key // d_vocab % n_levels >= level
        own = totals[:, level]
        chosen_key = key[above] // (d_vocab * n_levels) * d_vocab + key[above] % d_vocab
        chosen = _largest_tokens(*merge_by_key(chosen_key, values[above]), d_vocab, model.bos)
        tables.append(_source_rows(*chosen, own, attention, shared, threshold))
        d2 = own[:, SOURCE_TOTALS.index("d2")]
        scale = np.where(d2 > 0, d2, np.nan)
        everything, kept, bos = np.split(own[:, len(SOURCE_TOTALS) :], 3, axis=1)
        of_heads = np.where(everything > 0, everything, np.nan)
        of_totals.append(
            pa.table(
                {
                    "latent": pa.array(range(len(own)), pa.int32()),
                    "threshold": pa.array(np.full(len(own), threshold)),
                    "n_active": pa.array(own[:, SOURCE_TOTALS.index("n")].astype(np.int64)),
                    "kept": nullable(own[:, SOURCE_TOTALS.index("kept")] / scale, np.isnan(scale)),
                    "bos_share": nullable(own[:, SOURCE_TOTALS.index("bos")] / scale, np.isnan(scale)),
                    "kept_by_head": fixed_lists(kept / of_heads),
                    "bos_share_by_head": fixed_lists(bos / of_heads),
                }
            )
        )
    order = [("latent", "ascending"), ("threshold", "ascending")]
    return (
        pa.concat_tables(tables).sort_by([*order, ("share", "descending"), ("token", "ascending")]),
        pa.concat_tables(of_totals).sort_by(order),
    )


def _largest_tokens(
    key: torch.Tensor, values: torch.Tensor, d_vocab: int, bos: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (latent, token, sums) of the largest source tokens of each latent, without non-text, stored as BOS."""
    latent, token, sums = (key // d_vocab).numpy(), (key % d_vocab).numpy(), values.numpy()
    text = token != bos
    latent, token, sums = latent[text], token[text], sums[text]
    order = np.lexsort((token, -sums[:, SOURCE_COLUMNS.index("d2")] if len(sums) else token, latent))
    latent, token, sums = latent[order], token[order], sums[order]
    rank = np.arange(len(latent)) - np.repeat(*runs(latent))
    keep = rank < N_SOURCE_TOKENS
    return latent[keep], token[keep], sums[keep]


def _source_rows(
    latent: np.ndarray,
    token: np.ndarray,
    sums: np.ndarray,
    totals: np.ndarray,
    attention: np.ndarray,
    shared: dict[str, np.ndarray],
    threshold: float,
) -> pa.Table:
    n_heads = attention.shape[1]
    sums = sums.reshape(len(latent), len(SOURCE_COLUMNS) + 2 * n_heads)
    n, d2, d = (sums[:, SOURCE_COLUMNS.index(name)] for name in ("n", "d2", "d"))
    by_head, attended = np.split(sums[:, len(SOURCE_COLUMNS) :], 2, axis=1)
    own = totals[latent]
    elsewhere = shared["source_pairs"][token] - n
    with np.errstate(divide="ignore", invalid="ignore"):
        columns = {
            "share": d2 / own[:, SOURCE_TOTALS.index("d2")],
            "share_linear": d / own[:, SOURCE_TOTALS.index("d")],
            "share_by_head": by_head / own[:, len(SOURCE_TOTALS) : len(SOURCE_TOTALS) + n_heads],
            "attention": attended / n[:, None],
            "attention_elsewhere": (attention[token] - attended) / np.where(elsewhere > 0, elsewhere, np.nan)[:, None],
            "frequency": shared["token_counts"][token] / shared["token_counts"].sum(),  # of text
        }
    return pa.table(
        {
            "latent": pa.array(latent, pa.int32()),
            "threshold": pa.array(np.full(len(latent), threshold)),
            "token": pa.array(token, pa.int32()),
            "n": pa.array(n.astype(np.int64)),
            **{name: fixed_lists(v) if v.ndim == 2 else pa.array(v) for name, v in columns.items()},
        }
    )


def null_table(subject: Subject, pairs: SortedParts, n_heads: int) -> pa.Table:
    """Make one row per null direction."""
    sums = pairs.totals("null_moments")
    n, p, p2 = sums[:, 0], sums[:, 1], sums[:, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        share, covariance, _ = head_shares(n, p, p2, sums[:, 3:].reshape(len(sums), 3, n_heads))
    return pa.table(
        {
            "kind": pa.array([NULL_KINDS[k] for k in subject.nulls.kind.tolist()], pa.string()),
            "latent": pa.array(subject.nulls.latent.cpu().numpy(), pa.int32()),
            "n_active": pa.array(n.astype(np.int64)),
            "dfa_share": nullable_lists(share),
            "dfa_covariance": nullable_lists(covariance),
        }
    )


# ------------------------------------------------------------------------------------------------------------ examples
def group_table(groups: Groups, totals: Totals) -> pa.Table:
    """Make one row per group of examples."""
    whole = totals.moments[groups.latent.astype(np.int64)]
    return pa.table(
        {
            "latent": pa.array(groups.latent, pa.int32()),
            "kind": pa.array([KINDS[k] for k in groups.kind], pa.string()),
            "number": pa.array(groups.number, pa.int32()),
            "low": pa.array(groups.low, pa.float32()),
            "high": pa.array(groups.high, pa.float32()),
            "n": pa.array(groups.n, pa.int64()),
            "share_active": pa.array(groups.n / whole[:, MOMENTS.index("n")], pa.float64()),
            "share_mass": pa.array(groups.mass / whole[:, MOMENTS.index("f")], pa.float64()),
            "sampled": pa.array(groups.sampled, pa.bool_()),
            "positions": lists(groups.position, groups.n_chosen, pa.int64()),
            "duplicates": lists(groups.duplicates, groups.n_chosen, pa.int32()),
        }
    )


_EXAMPLE_COLUMNS = ("position", "pre", "bias", "residual", "heads", "source", "source_heads", "source_pattern", "rest")


def write_examples(folder: Path, examples: SortedParts, block_size: int, range_rows: int, n_heads: int) -> None:
    """Write `examples.parquet` from its parts and the activations, which are already written."""
    activations = f"{glob.escape(str(folder))}/activations/*.parquet".replace("'", "''")
    connection, writer = duckdb.connect(), None
    ranges = [(a, b) for a, b in examples.ranges(range_rows) if examples.counts[a:b].any()]
    for first, last in ranges or [(0, 0)]:
        rows = examples.rows(first, last, _EXAMPLE_COLUMNS) if last else _no_examples(n_heads)
        table = _example_table(rows, block_size, n_heads)
        chosen = {"latent": rows["latent"], "position": rows["position"], "number": np.arange(len(rows["latent"]))}
        connection.register("chosen", pa.table(chosen))
        active = connection.sql(
            f"""SELECT c.number, a.position % {block_size} AS at, a.activation, a.position = c.position AS own
            FROM read_parquet('{activations}') a JOIN chosen c
            ON a.latent = c.latent AND a.position // {block_size} = c.position // {block_size}
            WHERE a.latent >= {first} AND a.latent < {last} ORDER BY c.number, a.position"""
        ).to_arrow_table()
        number, own = active["number"].to_numpy(), active["own"].to_numpy()
        n = np.bincount(number, minlength=len(table))
        table = table.add_column(2, "activation", pa.array(active["activation"].to_numpy()[own], pa.float32()))
        table = table.append_column("active_at", lists(active["at"].to_numpy(), n, pa.int32()))
        table = table.append_column("active_value", lists(active["activation"].to_numpy(), n, pa.float32()))
        writer = writer or parquet_writer(folder / "examples.parquet", table.schema, use_dictionary=False)
        writer.write_table(table, row_group_size=SMALL_ROW_GROUP)
    assert writer is not None
    writer.close()


def _no_examples(n_heads: int) -> Rows:
    whole, single = np.empty(0, np.int64), np.empty(0, np.float32)
    by_head, by_source = np.empty((0, n_heads), np.float32), np.empty((0, 1, n_heads), np.float32)
    columns = (whole, single, single, single, by_head, whole[:, None], by_source, by_source, by_head)
    return {"latent": whole, **dict(zip(_EXAMPLE_COLUMNS, columns, strict=True))}


def _example_table(rows: Rows, block_size: int, n_heads: int) -> pa.Table:
    kept = rows["source"] <= (rows["position"] % block_size)[:, None]  # later positions contribute exactly 0
    n = kept.sum(1)
    by_head = {name: rows[name][kept].reshape(-1) for name in ("source_heads", "source_pattern")}
    return pa.table(
        {
            "latent": pa.array(rows["latent"], pa.int32()),
            "position": pa.array(rows["position"], pa.int64()),
            "pre": rows["pre"],
            "bias": rows["bias"],
            "residual": rows["residual"],
            "heads": fixed_lists(rows["heads"]),
            "source": lists(rows["source"][kept], n, pa.int32()),
            "source_heads": lists(by_head["source_heads"], n * n_heads, pa.float32()),
            "source_pattern": lists(rounded(by_head["source_pattern"][:, None])[:, 0], n * n_heads, pa.float32()),
            "rest": fixed_lists(rows["rest"]),
        }
    )
