"""Write the table of formats into docs/saes.md, between its two marks.

python scripts/saes_table.py
"""

import re
from pathlib import Path

from headscope.sae.formats.table import supported

PAGE = Path(__file__).parents[1] / "docs" / "saes.md"
MARKS = re.compile(r"(<!-- formats -->\n).*?(<!-- end of formats -->)", re.DOTALL)

if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(MARKS.sub(lambda found: found[1] + supported() + "\n" + found[2], page), encoding="utf-8")
