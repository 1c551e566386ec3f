"""Write the tables of docs/models.md as the code has them."""

from pathlib import Path

from headscope.models.table import write

if __name__ == "__main__":
    write(Path(__file__).parents[1] / "docs" / "models.md")
