"""Which characters show: others are written as escapes, so that every character of a token is seen."""

import re

_IGNORABLE = re.compile(
    r"[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]"
)
"""Of what Python calls printable: Unicode's Default_Ignorable_Code_Point, and the empty Braille pattern."""


def is_visible(character: str) -> bool:
    """Whether a character is drawn; a space is, other blanks and variation selectors are not."""
    return character.isprintable() and not _IGNORABLE.match(character)


def visible(text: str) -> str:
    r"""Text with escapes for what is not drawn: `\ufe0f`, `\n`."""
    return "".join(c if is_visible(c) else c.encode("unicode_escape").decode() for c in text)
