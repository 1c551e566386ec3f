"""Parser of proxies: `within_after(["Which", " Which"], n=10) & ~token_in([","])`.

    proxy   = term { "|" term }
    term    = factor { "&" factor }
    factor  = "~" factor | "(" proxy ")" | name "(" [ argument { "," argument } ] ")"
    argument = [ name "=" ] ( proxy | string | token | integer | "True" | "False" | "[" [ token { "," token } ] "]" )
    token   = string | "#" integer

Strings are JSON's. Nothing is executed: names are those of the families and no others.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from headscope.errors import ProxyError
from headscope.proxies import families
from headscope.proxies.algebra import MAX_DEPTH, And, Not, Or, Proxy, Shift
from headscope.proxies.blocks import Token

MAX_LENGTH = 20_000
"""Maximum number of characters of a proxy."""

_LEXEME = re.compile(
    r"""(?P<space>\s+) | (?P<string>"(?:[^"\\]|\\.)*") | (?P<id>\#\d{1,18}) | (?P<int>-?\d{1,18})
    | (?P<name>[A-Za-z_]\w*) | (?P<mark>[()\[\],=&|~])""",
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True)
class _Lexeme:
    kind: str
    text: str
    column: int
    """Counted from 1."""


@dataclass(frozen=True)
class _Family:
    """Signature of a function: its positional parameters, keyword parameters, and the optional ones."""

    make: Callable[..., Proxy]
    positional: tuple[tuple[str, str], ...]
    named: tuple[tuple[str, str], ...] = ()


_FAMILIES = {
    "induction": _Family(families.induction_of, (("token", "token"),), (("fuzzy", "flag"),)),
    "within_after": _Family(families.within_after, (("tokens", "tokens"),), (("n", "integer"), ("stop", "tokens"))),
    "after_any": _Family(families.after_any, (("tokens", "tokens"),)),
    "token_in": _Family(families.token_in, (("tokens", "tokens"),)),
    "next_token_in": _Family(families.next_token_in, (("tokens", "tokens"),)),
    "bigram": _Family(families.bigram, (("previous", "token"), ("token", "token"))),
    "in_repeat": _Family(families.in_repeat, (("k", "integer"),)),
    "regex": _Family(families.regex, (("pattern", "string"),)),
    "document": _Family(families.document, (("glob", "string"),)),
    "document_regex": _Family(families.document_regex, (("pattern", "string"),)),
    "shift": _Family(Shift, (("of", "proxy"), ("n", "integer"))),
}

_KINDS = {
    "token": 'a token as "text" or #id',
    "tokens": 'a list of tokens as ["text", #id]',
    "integer": "a whole number",
    "flag": "True or False",
    "string": "a text in double quotes",
    "proxy": "a proxy",
}


def parse(text: str) -> Proxy:
    """Parse the text of a proxy.

    Raises:
        ProxyError: a syntax error; it names the column and what was expected there.
    """
    if len(text) > MAX_LENGTH:
        raise ProxyError(f"a proxy of {len(text)} characters", expected=f"at most {MAX_LENGTH}", do="shorten it")
    parser = _Parser(text)
    proxy = parser.proxy()
    parser.expect("end", "&, | or the end")
    return proxy


class _Parser:
    """Recursive descent over the lexemes of a text."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._lexemes = self._scan()
        self._at = 0
        self._depth = 0

    # --------------------------------------------------------------------------------------------------- lexemes
    def _scan(self) -> list[_Lexeme]:
        lexemes, at = [], 0
        while at < len(self._text):
            match = _LEXEME.match(self._text, at)
            if match is None:
                raise self._error(at + 1, repr(self._text[at]), "a name, a text in double quotes, a number or a mark")
            if match.lastgroup != "space":
                lexemes.append(_Lexeme(str(match.lastgroup), match.group(), at + 1))
            at = match.end()
        return [*lexemes, _Lexeme("end", "", len(self._text) + 1)]

    @property
    def _next(self) -> _Lexeme:
        return self._lexemes[self._at]

    def _take(self) -> _Lexeme:
        self._at += 1
        return self._lexemes[self._at - 1]

    def _takes(self, mark: str) -> bool:
        if self._next.kind == "mark" and self._next.text == mark:
            self._at += 1
            return True
        return False

    def expect(self, what: str, said: str) -> None:
        """Consume a symbol, or check for the end."""
        lexeme = self._next
        if (lexeme.kind if what == "end" else lexeme.text) != what or (what != "end" and lexeme.kind != "mark"):
            raise self._unexpected(said)
        self._at += 1

    def _unexpected(self, expected: str) -> ProxyError:
        lexeme = self._next
        return self._error(lexeme.column, repr(lexeme.text) if lexeme.kind != "end" else "the end", expected)

    def _error(self, column: int, got: str, expected: str) -> ProxyError:
        shown = self._text[max(0, column - 31) : column + 29]
        return ProxyError(
            f"column {column}: {got}, near {shown!r}",
            expected=expected,
            do='write for example within_after(["Which", " Which"], n=10) & ~token_in([","])',
        )

    # ---------------------------------------------------------------------------------------------------- grammar
    def proxy(self) -> Proxy:
        """Parse terms joined by |."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._error(self._next.column, "too many levels of ( and shift", f"at most {MAX_DEPTH}")
        terms = [self._term()]
        while self._takes("|"):
            terms.append(self._term())
        self._depth -= 1
        return terms[0] if len(terms) == 1 else Or(tuple(terms))

    def _term(self) -> Proxy:
        factors = [self._factor()]
        while self._takes("&"):
            factors.append(self._factor())
        return factors[0] if len(factors) == 1 else And(tuple(factors))

    def _factor(self) -> Proxy:
        negations = 0
        while self._takes("~"):
            negations += 1
        if self._takes("("):
            found = self.proxy()
            self.expect(")", "&, | or )")
        else:
            found = self._call()
        for _ in range(negations):
            found = Not(found)
        return found

    def _call(self) -> Proxy:
        if self._next.kind != "name":
            raise self._unexpected(f"~, ( or one of {', '.join(_FAMILIES)}")
        name = self._take()
        if name.text == "where":
            raise self._error(
                name.column, "'where'", "a proxy that can be written: a Python function is passed in Python"
            )
        if name.text not in _FAMILIES:
            raise self._error(name.column, repr(name.text), f"one of {', '.join(_FAMILIES)}")
        family = _FAMILIES[name.text]
        self.expect("(", "(")
        positional = []
        for parameter, kind in family.positional:
            if positional:
                self.expect(",", f", and {parameter}: {_KINDS[kind]}")
            positional.append(self._value(kind))
        named = self._named(family)
        self.expect(")", ")" if len(named) == len(family.named) else ", or )")
        try:
            return family.make(*positional, **named)
        except ProxyError as error:
            raise ProxyError(f"column {name.column}: {error.got}", expected=error.expected, do=error.do) from error

    def _named(self, family: _Family) -> dict[str, Any]:
        kinds, found = dict(family.named), {}
        while kinds and self._takes(","):
            if self._next.kind != "name" or self._next.text not in kinds:
                raise self._unexpected(f"one of {', '.join(f'{k}=' for k in kinds)}")
            parameter = self._take().text
            self.expect("=", "=")
            found[parameter] = self._value(kinds.pop(parameter))
        return found

    # ----------------------------------------------------------------------------------------------------- values
    def _value(self, kind: str) -> Any:
        read = {"token": self._token, "tokens": self._tokens, "proxy": self.proxy, "string": self._string}
        if kind in read:
            return read[kind]()
        if kind == "integer" and self._next.kind == "int":
            return int(self._take().text)
        if kind == "flag" and self._next.text in ("True", "False"):
            return self._take().text == "True"
        raise self._unexpected(_KINDS[kind])

    def _string(self) -> str:
        if self._next.kind != "string":
            raise self._unexpected(_KINDS["string"])
        lexeme = self._take()
        try:
            return json.loads(lexeme.text)
        except ValueError as error:
            raise self._error(lexeme.column, lexeme.text[:40], f"a JSON string ({error})") from error

    def _token(self) -> Token:
        if self._next.kind == "id":
            return int(self._take().text[1:])
        if self._next.kind != "string":
            raise self._unexpected(_KINDS["token"])
        return self._string()

    def _tokens(self) -> list[Token]:
        if not self._takes("["):
            raise self._unexpected(_KINDS["tokens"])
        tokens: list[Token] = []
        while not self._takes("]"):
            if tokens:
                self.expect(",", ", or ]")
            tokens.append(self._token())
        return tokens
