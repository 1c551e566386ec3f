"""Proxies as values: a truth value for each token of a block, combined by `&`, `|`, `~` and `shift`.

A proxy is a frozen record. Its `name` is the text that `headscope.proxies.parse` reads back as an equal record, and its
`hash` is the SHA-256 of that. Evaluated on blocks it is always false at special tokens, so `~p` is the complement over
text tokens.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from headscope.errors import ProxyError
from headscope.proxies.blocks import Blocks, Token
from headscope.tokens import is_visible

MAX_DEPTH = 32
"""Maximum nesting depth of `& | ~ shift`."""


class Proxy(ABC):
    """A truth value for each token of a block."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The canonical text: `parse(proxy.name) == proxy`."""

    @property
    def parts(self) -> tuple["Proxy", ...]:
        """The proxies it is composed of."""
        return ()

    @property
    def depth(self) -> int:
        """Nesting depth; 1 for a proxy without parts."""
        return 1 + max((p.depth for p in self.parts), default=0)

    @property
    def hash(self) -> str:
        """SHA-256 of the name, as `sha256:<hex>`."""
        return f"sha256:{hashlib.sha256(self.name.encode()).hexdigest()}"

    def holds(self, blocks: Blocks) -> Bool[np.ndarray, "block position"]:
        """Evaluate the proxy at each token; false at special tokens.

        Raises:
            ProxyError: it names a token that the vocabulary lacks, or cannot be evaluated.
        """
        return self._holds(blocks) & blocks.text

    @abstractmethod
    def _holds(self, blocks: Blocks) -> Bool[np.ndarray, "block position"]:
        """Evaluate as `holds` does; the values at special tokens do not matter."""

    def __and__(self, other: "Proxy") -> "And":
        """Return the conjunction."""
        return And((self, other))

    def __or__(self, other: "Proxy") -> "Or":
        """Return the disjunction."""
        return Or((self, other))

    def __invert__(self) -> "Not":
        """Return the complement over text tokens."""
        return Not(self)

    def shift(self, n: int) -> "Shift":
        """Return a proxy that is true where this is true n tokens earlier (-n: later); false outside the block."""
        return Shift(self, n)

    def __str__(self) -> str:
        """The name."""
        return self.name


@dataclass(frozen=True)
class _Many(Proxy):
    of: tuple[Proxy, ...]
    """Two or more, in order; nested conjunctions are flattened, and so are disjunctions."""

    def __post_init__(self) -> None:
        """Flatten the parts."""
        flat = [q for p in self.of for q in (p.of if type(p) is type(self) else (p,))]  # pyright: ignore
        if len(flat) < 2:
            raise ProxyError(f"{len(flat)} proxies joined", expected="two or more", do="use the one by itself")
        object.__setattr__(self, "of", tuple(flat))
        check_depth(self)

    @property
    def parts(self) -> tuple[Proxy, ...]:
        """The joined proxies."""
        return self.of


@dataclass(frozen=True)
class And(_Many):
    """True where all parts are."""

    @property
    def name(self) -> str:
        """`a & b`."""
        return " & ".join(f"({p.name})" if isinstance(p, Or) else p.name for p in self.of)

    def _holds(self, blocks: Blocks) -> Bool[np.ndarray, "block position"]:
        return np.logical_and.reduce([p.holds(blocks) for p in self.of])


@dataclass(frozen=True)
class Or(_Many):
    """True where any part is."""

    @property
    def name(self) -> str:
        """`a | b`."""
        return " | ".join(p.name for p in self.of)

    def _holds(self, blocks: Blocks) -> Bool[np.ndarray, "block position"]:
        return np.logical_or.reduce([p.holds(blocks) for p in self.of])


@dataclass(frozen=True)
class Not(Proxy):
    """True at the text tokens where another proxy is false."""

    of: Proxy

    def __post_init__(self) -> None:
        """Check the depth."""
        check_depth(self)

    @property
    def parts(self) -> tuple[Proxy, ...]:
        """The negated proxy."""
        return (self.of,)

    @property
    def name(self) -> str:
        """`~a`."""
        return f"~({self.of.name})" if isinstance(self.of, _Many) else f"~{self.of.name}"

    def _holds(self, blocks: Blocks) -> Bool[np.ndarray, "block position"]:
        return ~self.of.holds(blocks)


@dataclass(frozen=True)
class Shift(Proxy):
    """True where another proxy is true n tokens earlier in the block."""

    of: Proxy
    n: int

    def __post_init__(self) -> None:
        """Check the depth."""
        check_depth(self)

    @property
    def parts(self) -> tuple[Proxy, ...]:
        """The shifted proxy."""
        return (self.of,)

    @property
    def name(self) -> str:
        """`shift(a, 1)`."""
        return f"shift({self.of.name}, {self.n})"

    def _holds(self, blocks: Blocks) -> Bool[np.ndarray, "block position"]:
        return moved(self.of.holds(blocks), self.n)


@dataclass(frozen=True)
class Where(Proxy):
    """A proxy defined by a Python function on blocks; it has a name but cannot be parsed."""

    function: Callable[[Blocks], np.ndarray]
    title: str

    @property
    def name(self) -> str:
        """`where("title")`."""
        return f"where({quoted(self.title)})"

    def _holds(self, blocks: Blocks) -> Bool[np.ndarray, "block position"]:
        try:
            found = self.function(blocks)
        except Exception as error:
            raise ProxyError(
                f"{self.name} raised {type(error).__name__}: {error}",
                expected="a function that takes Blocks",
                do="call it on small blocks to see where it fails",
            ) from error
        if not isinstance(found, np.ndarray) or found.dtype != bool or found.shape != blocks.tokens.shape:
            kind = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else type(found).__name__
            raise ProxyError(
                f"{self.name} returned {kind}",
                expected=f"a bool array {list(blocks.tokens.shape)}: [block, position], as blocks.tokens",
                do="return one truth value a token",
            )
        return found


def where(function: Callable[[Blocks], np.ndarray], name: str) -> Where:
    """Make a proxy from any function: `Blocks` to a bool array `[block, position]`.

    Blocks come in batches of whole blocks, so the function must not look across them. Two such proxies are equal when
    both function and name are; only the name is stored.
    """
    return Where(function, name)


def moved(values: Bool[np.ndarray, "block position"], n: int) -> Bool[np.ndarray, "block position"]:
    """Shift values n positions later in their block, filling with false."""
    found = np.zeros_like(values)
    size = values.shape[1]
    if 0 <= n < size:
        found[:, n:] = values[:, : size - n]
    elif -size < n < 0:
        found[:, :n] = values[:, -n:]
    return found


def check_depth(proxy: Proxy) -> None:
    """Reject proxies that are nested too deeply.

    Raises:
        ProxyError: deeper than `MAX_DEPTH`.
    """
    if proxy.depth > MAX_DEPTH:
        raise ProxyError(
            f"proxies {proxy.depth} deep in one another", expected=f"at most {MAX_DEPTH}", do="write it flatter"
        )


def quoted(text: str) -> str:
    """Return a JSON string with all non-printing characters escaped."""
    inner = "".join(c if is_visible(c) and c not in '"\\' else json.dumps(c)[1:-1] for c in text)
    return f'"{inner}"'


def token_name(token: Token) -> str:
    """Format a token for a proxy: `"text"` or `#id`."""
    return quoted(token) if isinstance(token, str) else f"#{token}"
