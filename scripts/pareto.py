"""Write docs/pareto.md and docs/pareto.svg of a sweep, whose pareto.json is kept beside them.

python scripts/pareto.py [runs/sweep/pareto.json]

Without a name the page is written anew from the docs/pareto.json that is there.
"""

import sys
from pathlib import Path

from headscope.sae.pareto import Pareto
from headscope.sae.pareto_page import page, svg

DOCS = Path(__file__).parents[1] / "docs"

if __name__ == "__main__":
    found = Pareto.read(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "pareto.json")
    found.write(DOCS / "pareto.json")
    (DOCS / "pareto.svg").write_text(svg(found), encoding="utf-8")
    (DOCS / "pareto.md").write_text(page(found, "pareto.svg"), encoding="utf-8")
