"""Print the lowest versions that pyproject.toml declares, as constraints; torch as constraints.txt has it."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]

for requirement in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]:
    name, lowest = re.fullmatch(r"([\w-]+)>=([\d.]+).*", requirement).groups()
    if name == "torch":
        lowest = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[1]
    print(f"{name}=={lowest}")
