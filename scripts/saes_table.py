"""Write the table of formats into docs/saes.md, between its two marks.

python scripts/saes_table.py
"""

import re
from pathlib import Path

from headscope.sae.formats import FORMATS, Format

PAGE = Path(__file__).parents[1] / "docs" / "saes.md"
MARKS = re.compile(r"(<!-- formats -->\n).*?(<!-- end of formats -->)", re.DOTALL)


def supported() -> str:
    """Markdown: a section for each format, with what it consists of, what is read and what is refused."""
    return "\n\n".join(map(_section, FORMATS))


def _section(format_: Format) -> str:
    lines = [
        f"### {format_.name.replace('the ', 'The ', 1)}",  # libraries are spelled as they spell themselves
        "",
        f"Files: {format_.layout}.",
        f"Activations: {format_.convention}.",
        "",
        "| in the file | here |",
        "|---|---|",
    ]
    lines += [f"| `{name}` | {read} |" for name, read in format_.architectures.items()]
    lines += [f"| `{name}` | refused: {why} |" for name, why in format_.refused.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(MARKS.sub(lambda found: found[1] + supported() + "\n" + found[2], page), encoding="utf-8")
