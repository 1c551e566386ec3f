"""Make text visible: characters that are not drawn are escaped."""

import re

_IGNORABLE = re.compile(
    r"[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]"
)
"""Characters that Python considers printable but are not drawn: Default_Ignorable_Code_Point, and the empty Braille
pattern."""


def is_visible(character: str) -> bool:
    """Whether a character is drawn; a space counts, other blanks and variation selectors do not."""
    return character.isprintable() and not _IGNORABLE.match(character)


def visible(text: str) -> str:
    r"""Text with escapes for what is not drawn: `\ufe0f`, `\n`."""
    return "".join(c if is_visible(c) else c.encode("unicode_escape").decode() for c in text)
