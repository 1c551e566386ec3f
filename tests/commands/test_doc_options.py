"""Every `--option` that a document or a message names is one that a command has."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from command_options import COMMANDS, options_of
from headscope.commands.studies import All, command_of
from headscope.studies.registry import STUDIES

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("src/headscope/**/*.md")]
FOREIGN = {
    *("--nproc-per-node", "--shutdown-timeout"),  # torchrun
    *("--repo-type", "--local-dir", "--include"),  # hf download
    *("--to",),  # jupyter nbconvert
    *("--version", "--help-all"),  # of headscope itself, without a command
    *("--compile", "--data", "--json", "--rounds", "--shapes", "--steps"),  # benchmarks
}
OF_COMMAND = {command.__name__.lower(): options_of(command) for command in COMMANDS}
OF_COMMAND["study"] = set().union(*map(options_of, (All, *map(command_of, STUDIES.values()))))
KNOWN = set().union(*OF_COMMAND.values()) | FOREIGN


def options_in(text: str) -> set[str]:
    """What looks like an option; `var(--x)` and `--x: 1px` are CSS."""
    return set(re.findall(r"(?<![\w(-])--[a-z][a-z0-9-]*(?![\w:-])", text))


def calls_in(text: str) -> Iterator[tuple[str, str]]:
    """(command, what follows it) of every `headscope COMMAND ...`, to the end of the line or of the code."""
    for match in re.finditer(r"headscope (\w+)\b((?:[^\n`#&|;]|\\\n)*)", text):
        if match[1] in OF_COMMAND:
            yield match[1], match[2]


def strings_of(path: Path) -> Iterator[str]:
    """The strings of a module: messages, docstrings, the text of f-strings."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_options_named_in_documents_exist() -> None:
    named = set()
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        named |= options_in(text)
        assert options_in(text) <= KNOWN, (path.name, options_in(text) - KNOWN)
        for command, rest in calls_in(text):
            wrong = options_in(rest) - OF_COMMAND[command] - FOREIGN
            assert not wrong, (path.name, command, wrong)
    assert len(named) > 30


def test_options_named_in_messages_exist() -> None:
    named = set()
    for path in sorted((ROOT / "src").rglob("*.py")):
        for text in strings_of(path):
            named |= options_in(text)
            assert options_in(text) <= KNOWN, (path.name, text)
            for command, rest in calls_in(text):
                assert options_in(rest) <= OF_COMMAND[command] | FOREIGN, (path.name, text)
    assert len(named) > 15


def test_commands_of_the_page_and_of_make_exist() -> None:
    found = 0
    for path in [ROOT / "Makefile", *sorted((ROOT / "src").rglob("*.js"))]:
        for command, rest in calls_in(path.read_text(encoding="utf-8")):
            found += 1
            assert options_in(rest) <= OF_COMMAND[command], (path.name, command, rest)
    assert found
