"""Whatever the package imports is a declared dependency, so an installation without development packages works."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT_FILE = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PROJECT_FILE["project"]
EXTRAS = PROJECT["optional-dependencies"]
OPTIONAL = {
    "datasets": "hub",
    "plotly": "plots",
    "triton": "gpu",
}
"""Modules that only an extra brings, which may be imported where they are used and nowhere at import time."""
NEVER_REQUIRED = {"sae_lens"}
"""Read where a user has it; no extra installs it."""


ONLY_WITH_TRITON = "triton_kernels.py"
"""Imported itself only where Triton is installed."""


def named(requirement: str) -> str:
    return re.split(r"[\s\[<>=!~;]", requirement)[0].lower().replace("-", "_")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Top-level names of the modules that a file imports, and whether it does so inside a function or a `TYPE_CHECKING`
    block."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.If)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module or ""]
        else:
            continue
        yield from ((module.split(".")[0], id(node) in late) for module in modules)


@cache
def distributions() -> Mapping[str, list[str]]:
    """Which distributions bring a module; reads the file lists of all that is installed."""
    return packages_distributions()


def undeclared(imported: Iterable[tuple[str, bool]]) -> set[str]:
    """Third-party modules that no run-time dependency brings."""
    declared = {named(requirement) for requirement in PROJECT["dependencies"]}
    found = set()
    for module, late in imported:
        if (
            module in sys.stdlib_module_names
            or module == "headscope"
            or (late and module in {*OPTIONAL, *NEVER_REQUIRED})
        ):
            continue
        if not {d.lower().replace("-", "_") for d in distributions().get(module, [module])} & declared:
            found.add(module)
    return found


def test_every_import_of_the_package_is_declared() -> None:
    files = [file for file in sorted((ROOT / "src").rglob("*.py")) if file.name != ONLY_WITH_TRITON]
    assert files
    assert {str(file.relative_to(ROOT)): missing for file in files if (missing := undeclared(imports(file)))} == {}


def test_what_an_extra_brings_is_in_that_extra() -> None:
    for module, extra in OPTIONAL.items():
        assert module in {named(requirement) for requirement in EXTRAS[extra]}


def test_an_undeclared_import_is_found(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "import os\nimport numpy\nfrom einops import einsum\n\ndef late():\n    import plotly\n    import httpx\n"
    )
    assert undeclared(imports(file)) == {"einops", "httpx"}
    file.write_text("import plotly\n")
    assert undeclared(imports(file)) == {"plotly"}


def test_every_module_stands_in_a_layer() -> None:
    """Every module file is in the import map; packages are there by their modules."""
    [layers] = [c["layers"] for c in PROJECT_FILE["tool"]["importlinter"]["contracts"] if c["type"] == "layers"]
    named = {name for layer in layers for name in layer.split(" | ")}
    root = ROOT / "src" / "headscope"
    for path in sorted(root.rglob("*.py")):
        module = ".".join(["headscope", *path.relative_to(root).with_suffix("").parts])
        if path.name != "__init__.py":
            assert any(module == name or module.startswith(f"{name}.") for name in named), module
