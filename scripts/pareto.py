"""Write docs/pareto.md and docs/pareto.svg of one or several sweeps, whose pareto.json is kept beside them.

python scripts/pareto.py [runs/sweep/pareto.json [runs/matryoshka/pareto.json ...]]

Without a name the page is written anew from the docs/pareto.json that is there.
"""

import sys
from pathlib import Path

from headscope.sae.pareto import Pareto
from pareto_page import page, svg

DOCS = Path(__file__).parents[1] / "docs"

if __name__ == "__main__":
    found = Pareto.joined([Pareto.read(Path(name)) for name in sys.argv[1:] or [DOCS / "pareto.json"]])
    found.write(DOCS / "pareto.json")
    (DOCS / "pareto.svg").write_text(svg(found), encoding="utf-8")
    (DOCS / "pareto.md").write_text(page(found, "pareto.svg"), encoding="utf-8")
