"""Internal consistency of an index, which checksums alone do not guarantee. No torch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

_FOUND = """found AS (SELECT latent, count(*) AS n, max(activation) AS maximum, sum(activation) AS total
    FROM activations GROUP BY latent)"""
_AGREE = {
    "n_active in features and the rows of activations": f"""WITH {_FOUND}
        SELECT f.latent FROM features f LEFT JOIN found a USING (latent) WHERE coalesce(a.n, 0) <> f.n_active""",
    "maximum and mean in features and the activations": f"""WITH {_FOUND}
        SELECT f.latent FROM features f JOIN found a USING (latent) WHERE f.maximum IS NULL OR f.mean IS NULL
            OR abs(a.maximum - f.maximum) > 1e-5 * a.maximum OR abs(a.total / a.n - f.mean) > 1e-4 * a.total / a.n""",
    "histogram and mass in features and the activations": f"""WITH {_FOUND}
        SELECT f.latent FROM features f JOIN found a USING (latent) WHERE coalesce(list_sum(f.histogram), 0) <> a.n
            OR coalesce(abs(list_sum(f.mass) - a.total) > 1e-4 * a.total, true)""",
    "shares of heads in features, which add up to 1": """SELECT latent FROM features
        WHERE n_active > 0 AND coalesce(abs(list_sum(dfa_share) - 1) > 1e-4, true)""",
    "n_active in source_totals and the activations": """SELECT t.latent FROM source_totals t
        LEFT JOIN activations a ON a.latent = t.latent AND a.activation > t.threshold
        GROUP BY t.latent, t.threshold, t.n_active HAVING count(a.position) <> t.n_active""",
    "groups and n_active in features": """SELECT g.latent FROM groups g JOIN features f USING (latent)
        WHERE g.n NOT BETWEEN 0 AND f.n_active OR (g.kind = 'random' AND g.n <> f.n_active)
            OR NOT g.sampled AND (abs(g.share_active - g.n / f.n_active) > 1e-6
                OR g.share_mass NOT BETWEEN 0 AND 1.001)""",
    "examples and activations": """SELECT e.latent FROM examples e
        LEFT JOIN activations a USING (latent, position) WHERE a.activation IS DISTINCT FROM e.activation""",
}
"""Quantities that must agree, with the query for the latents where they do not."""


def check_counts(manifest: dict[str, Any], features: pa.Table) -> None:
    """Validate the manifest's count of text tokens against the table of features.

    Raises:
        ValueError: there is no such count, or densities are not shares of it.
    """
    corpus = manifest["corpus"]
    n_tokens, n_blocks, size = corpus["n_tokens"], corpus["n_blocks"], corpus["block_size"]
    n_active, density = (features[name].to_numpy() for name in ("n_active", "density"))
    if not 0 < n_tokens <= n_blocks * size:
        raise ValueError(f"{n_tokens} text tokens in {n_blocks} blocks of {size}")
    if not np.allclose(n_active / n_tokens, density, rtol=1e-9, atol=0):
        raise ValueError(f"densities that are not shares of {n_tokens} tokens")


def disagreements(sql: Callable[[str], pa.Table], manifest: dict[str, Any]) -> list[str]:
    """Return the names of inconsistencies: counts and moments of features, totals, groups and examples vs. activations.

    Args:
        sql: runs a query over the views of the index.
        manifest: of the index.
    """
    found = []
    for what, query in _AGREE.items():
        latents = sql(f"SELECT latent FROM ({query}) ORDER BY latent LIMIT 3")["latent"].to_pylist()
        if latents:
            found.append(f"{what} disagree (latent {', '.join(map(str, latents))})")
    n_alive = sql("SELECT count(*) AS n FROM features WHERE n_active > 0")["n"][0].as_py()
    l0 = manifest["n_pairs"] / manifest["corpus"]["n_tokens"]
    if n_alive != manifest["n_alive"] or abs(l0 - manifest["l0"]) > 1e-9 * max(1.0, l0):
        found.append("n_alive or l0 in manifest.json disagree with the tables")
    return found
