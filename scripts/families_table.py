"""Write the tables of docs/models.md: supported families and published checkpoints.

python scripts/families_table.py
"""

import re
from pathlib import Path

from headscope.models.families import FAMILIES, Family
from headscope.models.tl_checkpoint import HUB


def families_table() -> str:
    """One row a family, in Markdown."""
    rows = [_row(name, family) for name, family in FAMILIES.items()]
    return "\n".join(
        ["| `model_type` | models | SAEs of z | DFA | direct path | scores |", "|---|---|---|---|---|---|", *rows]
    )


def published() -> str:
    """The published checkpoints by name, as ranges."""
    series: dict[str, list[int]] = {}
    for name in HUB:
        kind, n = re.fullmatch(r"(.+)-(\d+)l", name).groups()  # pyright: ignore[reportOptionalMemberAccess]
        series.setdefault(kind, []).append(int(n))
    return ", ".join(f"`{kind}-{min(ns)}l` to `{kind}-{max(ns)}l`" for kind, ns in series.items())


def filled(document: str) -> str:
    """A document with the tables between its marks as the code has them."""
    for mark, text in (("families", f"\n{families_table()}\n"), ("published", published())):
        document = re.sub(
            rf"(<!-- {mark} -->).*?(<!-- /{mark} -->)",
            lambda found, new=text: found[1] + new + found[2],
            document,
            flags=re.S,
        )
    return document


def _row(name: str, family: Family) -> str:
    dfa = "no" if family.not_mixed else "yes"
    direct = "no" if family.attention_post_norm or family.not_mixed else "yes"
    scores = "no" if family.qk_norm or family.scores_capped or family.not_mixed else "yes"
    why = f" ({family.not_mixed})" if family.not_mixed else ""
    return f"| `{name}` | {family.models} | yes | {dfa}{why} | {direct} | {scores} |"


if __name__ == "__main__":
    path = Path(__file__).parents[1] / "docs" / "models.md"
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
