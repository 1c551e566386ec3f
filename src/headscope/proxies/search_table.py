"""Write the proxy search as index columns, in batches; an interrupted run resumes."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from headscope.artefact import atomic_write
from headscope.index.columns import add_columns, index_identity
from headscope.index.store import FeatureIndex
from headscope.proxies.search import live_latents, search
from headscope.proxies.search_records import DEFINITIONS, FAMILIES, STATISTICS, FeatureProxies, SearchPlan
from headscope.stats import MINIMUM_UNITS

STUDY = "proxies"
_PART = 64  # features between two files
_VERSION = 2  # version of the parts: raised when a search gives other results
_SHORT = {"induction": "induction", "local context": "local", "high-level context": "context", "token": "token"}
_BY_FAMILY = ("precision", "recall", "auc", "pearson")
_COUNTS = {
    "n": "text tokens of the scoring half",
    "n_active": "of these, with the feature active",
    "n_active_fit": "text tokens of the fitting half with the feature active",
    "n_proxy": "text tokens of the scoring half where the best proxy holds",
    "n_both": "of these, with the feature active",
    "n_documents": "documents of the scoring half in which the best proxy holds",
}


def _definitions(plan: SearchPlan) -> dict[str, str]:
    """Return the definition of each column."""
    said = {
        "kind": f"the family of the best proxy if its correlation in the scoring half is at least {plan.min_pearson:g},"
        " the lower end of the interval above the whole null, and the proxy true on "
        f"{plan.min_active} tokens of {MINIMUM_UNITS} documents; else unexplained; none with fewer than "
        f"{plan.min_active} active tokens in a half",
        "proxy": "the proxy, of all families, with the largest pearson in the fitting half",
        "fit_pearson": "its correlation with f in the fitting half, by which it was chosen",
        **_COUNTS,
    }
    for name in STATISTICS:
        said[name] = f"of the best proxy: {DEFINITIONS[name]}"
        said |= {f"{name}_low": f"{name}: lower end of the 95 % interval by documents", f"{name}_high": "its upper end"}
        said[f"{name}_null"] = f"{name}: mean over {plan.n_rotations} moves of f along the corpus by whole blocks"
    said["pearson_null_high"] = "pearson: the largest of these"
    for family, short in _SHORT.items():
        said[f"{short}_proxy"] = f"the best proxy of the family {family}, chosen on the fitting half"
        said |= {f"{short}_{name}": f"its {name}: {DEFINITIONS[name]}" for name in _BY_FAMILY}
    return said


def _schema(plan: SearchPlan) -> pa.Schema:
    def type_of(name: str) -> pa.DataType:
        text = name in ("kind", "proxy") or (name.endswith("_proxy") and name not in _COUNTS)
        return pa.string() if text else pa.int64() if name in _COUNTS else pa.float64()

    return pa.schema([("latent", pa.int32()), *((name, type_of(name)) for name in _definitions(plan))])


def row_of(found: FeatureProxies) -> dict[str, Any]:
    """Return the columns of one feature, null where undefined."""
    row: dict[str, Any] = {name: getattr(found, name) for name in ("latent", "kind", "n", "n_active", "n_active_fit")}
    row["pearson_null_high"] = found.null_high
    for family in found.families:
        short = _SHORT[family.family]
        row[f"{short}_proxy"] = family.proxy.name
        row |= {f"{short}_{name}": family.scores[name].value for name in _BY_FAMILY}
    if found.families:
        best = found.families[0]
        row |= {"proxy": best.proxy.name, "fit_pearson": best.fit_pearson}
        row |= {name: getattr(best, name) for name in ("n_proxy", "n_both", "n_documents")}
        for name, score in best.scores.items():
            row |= {name: score.value, f"{name}_low": score.low, f"{name}_high": score.high, f"{name}_null": score.null}
    return row


@dataclass(frozen=True)
class Summary:
    """Number of live features of each kind."""

    kinds: dict[str, int]
    """Numbers by kind, with those too rare to be classified under `too rare`."""
    n_alive: int
    path: Path
    """Path of the columns."""

    def lines(self) -> list[str]:
        """A summary in words, a line per kind."""
        return [f"{kind:<20} {n:>7,} of {self.n_alive:,} live features" for kind, n in self.kinds.items()]


def add_proxies(
    index: FeatureIndex,
    plan: SearchPlan | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Summary:
    """Search for the best proxies of all live features, and add them to the index as the columns `proxies`.

    Features finished by an interrupted search with the same plan are skipped.

    Raises:
        OutputError: the columns cannot be written.
    """
    plan = plan or SearchPlan()
    schema, latents = _schema(plan), live_latents(index)
    identity = {"plan": asdict(plan), "index": index_identity(index.manifest), "version": _VERSION}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    work = index.folder / "columns" / f".{STUDY}-{digest}"
    parts = [latents[i : i + _PART] for i in range(0, len(latents), _PART)]
    standing = [_read(work / f"{i:06d}.parquet", part, schema) for i, part in enumerate(parts)]
    missing = [latent for part, table in zip(parts, standing, strict=True) if table is None for latent in part]
    found = search(index, missing, plan)
    tables, done = [], len(latents) - len(missing)
    for i, (part, table) in enumerate(zip(parts, standing, strict=True)):
        if table is None:
            rows = []
            for _ in part:
                rows.append(row_of(next(found)))
                done += 1
                if on_progress is not None:
                    on_progress("proxies", done, len(latents))
            table = pa.Table.from_pylist(rows, schema)
            with atomic_write(work / f"{i:06d}.parquet") as file:
                pq.write_table(table, file, write_page_checksum=True)
        tables.append(table)
    path = add_columns(index, STUDY, _whole(index, tables, schema), _provenance(index, plan))
    shutil.rmtree(work, ignore_errors=True)
    kinds = Counter(kind or "too rare" for table in tables for kind in table["kind"].to_pylist())
    ordered = {kind: kinds[kind] for kind in (*FAMILIES, "unexplained", "too rare")}
    return Summary(ordered, len(latents), path)


def _read(path: Path, latents: Sequence[int], schema: pa.Schema) -> pa.Table | None:
    """Read an existing part, if it is complete."""
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException):
        return None
    whole = table.schema.equals(schema) and table["latent"].to_pylist() == list(latents)
    return table if whole else None


def _whole(index: FeatureIndex, tables: Sequence[pa.Table], schema: pa.Schema) -> pa.Table:
    """Merge tables to one row per latent, including dead ones."""
    rows: list[dict[str, Any]] = [{"latent": latent} for latent in range(index.n_latents)]
    for table in tables:
        for row in table.to_pylist():
            rows[row["latent"]] = row
    return pa.Table.from_pylist(rows, schema)


def _provenance(index: FeatureIndex, plan: SearchPlan) -> dict[str, Any]:
    return {
        "settings": asdict(plan),
        "definitions": _definitions(plan),
        "n": f"{index.manifest['corpus']['n_tokens']} text tokens; documents split by a hash of their names: "
        "about half to choose proxies on, the others to score them",
    }
