"""The bytes of each token, such that a text is the concatenation of its tokens' bytes.

Tokenizers write tokens in different ways: GPT-2's use a letter for each byte, SentencePiece's use `▁` for a space and
`<0x0A>` for a byte, WordPiece's mark with `##` where a word continues. The tokenizer's decoder handles this, so the
bytes of a token are its decoding between two others. A decoder returns text, so bytes that are only a part of a
character are looked up instead.

The result is verified, on sample texts and on every token that was added to the vocabulary: joined bytes must be the
text, or, where the tokenizer is lossy (it lower-cases, drops spaces), what the tokenizer itself decodes its tokens to.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models

from headscope.errors import ModelError
from headscope.tokens.encoding import encode, own_tokenizer, unknown_id

SAMPLES = (
    "a",
    "word",
    "Hello World",
    "The cat, it's on the mat. Isn't it?",
    " a space first",
    "  two spaces first",
    "two  spaces   and three",
    "space last ",
    "line\nline\n\n\tindented\r\nline",
    "def f(x):\n        return x[1:]",
    "1234567890",
    "caf\u00e9 \u00fcber na\u00efve \u0142\u00f3d\u017a",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3002 \ud55c\uad6d\uc5b4",
    "\U0001f98a \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0939\u093f\u0928\u094d\u0926\u0940",
    "e\u0301",  # composed by NFC; by NFKC, and by what maps or removes spaces and quotes:
    "\ufb01",
    "\uff12",
    "x\u2026",
    "a\u00a0b",
    "a\u2028b",
    "a\u3000b",
    "a``b",
    "a''b",
    "a\u2014b \u2013 \u2018c\u2019 \u201cd\u201d",  # dashes and quotes
    "a\u200bb",
    "a\u00adb",
    "a\ufeffb",
)
"""Texts that tokenizers are tested on."""
MARK = "\u2581"
"""SentencePiece's character for a space."""
_CHARACTERS = [*range(0xC0), *range(0xC0, 0x800, 64), 0x800, *range(0x1000, 0x10000, 0x1000)]
_CHARACTERS += [0x10000, 0x40000, 0x80000, 0xC0000, 0x100000]  # between them, each byte that UTF-8 has
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SAMPLED, _TOGETHER = 128, 4  # tokens of the vocabulary that are tested, and in one text
_ANCHOR = "a"
_ADDED = "\ue000\ue001\ue000"  # of private use, so in no vocabulary
_EDGES = ((b"", b""), (b" ", b""), (b"", b" "), (b" ", b" "))


@dataclass(frozen=True, eq=False)
class Spelling:
    """The bytes of each token of a tokenizer."""

    tokenizer: Tokenizer
    """The tokenizer, as returned by `own_tokenizer`."""
    reading: "_Reading"
    prefix: bytes
    """Prefix that the tokenizer puts before a text, a space or nothing: the first token of a text starts with it."""
    suffix: bytes
    """Suffix that it puts after a text, likewise."""
    loses: str | None
    """A text that its tokens do not reproduce exactly; None if they reproduce all tested texts."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Spelling":
        """Determine how a tokenizer spells its tokens.

        Raises:
            ModelError: the joined bytes of its tokens are neither the text nor its decoding.
        """
        own = own_tokenizer(tokenizer)
        trial = _Trial(own)
        found: list[tuple[int, Spelling]] = []
        for reading in _readings(own):
            for prefix, suffix in _EDGES:
                spelling = cls(own, reading, prefix, suffix, None)
                kept = trial.kept(spelling)
                if kept is None:
                    continue
                if all(kept):
                    return spelling
                found.append((sum(kept), cls(own, reading, prefix, suffix, trial.lost(kept))))
        if not found:
            raise trial.failure(cls(own, next(_readings(own)), b"", b"", None))
        return max(found, key=lambda pair: pair[0])[1]

    @cached_property
    def repeats(self) -> bool:
        """Whether the tokenizer also puts the prefix after each added token, not only before a text."""
        if not self.prefix:
            return False
        own = Tokenizer.from_str(self.tokenizer.to_str())
        own.add_tokens([AddedToken(_ADDED, normalized=False)])
        [ids] = encode(own, [_ANCHOR + _ADDED + _ANCHOR])
        after = ids[ids.index(own.get_vocab()[_ADDED]) + 1 :]
        return self.joined(after).startswith(self.prefix)

    def join(self, ids: Sequence[int]) -> bytes:
        """Return the text of a whole document: its tokens' bytes, without the tokenizer's prefix and suffix.

        A tokenizer that prepends a space only to texts without one gives the same tokens for both; for a text that
        started with a space, that space is then missing here.
        """
        return self.joined(ids).removeprefix(self.prefix).removesuffix(self.suffix)

    def joined(self, ids: Sequence[int]) -> bytes:
        """Return the tokens' bytes, with special tokens as decoded."""
        return b"".join(map(self._raw_once, ids))

    def keeps(self, ids: Sequence[int], text: str) -> bool:
        """Whether the tokens of a text spell it; a leading space may be the one that the tokenizer adds."""
        joined, content = self.joined(ids), text.encode()
        return self.join(ids) == content or joined.removesuffix(self.suffix) == content

    def table(self, special: Collection[int], n: int) -> list[bytes]:
        """Return the bytes of tokens 0 to n - 1: special tokens have their name, unassigned ids nothing."""
        return [self._name(i).encode() if i in special else self._raw(i) for i in range(n)]

    def byte_tokens(self, n: int) -> list[int]:
        """Return those of tokens 0 to n - 1 that are single bytes which no other token spells (`<0x0A>`)."""
        return [i for i in range(n) if self.reading.falls_back and _BYTE.fullmatch(self._name(i))]

    def _name(self, token: int) -> str:
        return self.tokenizer.id_to_token(token) or ""

    @cached_property
    def _added(self) -> dict[int, bytes]:
        """Return the bytes of tokens matched outside the model: in the text, or in its normalised form."""
        normalizer, found = self.tokenizer.normalizer, {}
        undo = _of_decoder(next(_implied(_parts(normalizer)), decoders.Fuse()))
        for i, token in self.tokenizer.get_added_tokens_decoder().items():
            if self.tokenizer.model.id_to_token(i) != token.content:
                text = token.content.encode()
                if token.normalized and normalizer is not None:
                    text = undo.bytes_of(normalizer.normalize_str(token.content))
                found[i] = self.reading.between(text)
        return found

    @cached_property
    def _raw_once(self) -> Callable[[int], bytes]:
        return cache(self._raw)

    def _raw(self, token: int) -> bytes:
        name, added = self._name(token), self._added.get(token)
        if added is not None:
            return added
        return self.reading.bytes_of(name) if name else b""


# ------------------------------------------------------------------------------------------------------------- readings
class _Reading:
    """One interpretation of token names."""

    def __init__(self, decode: Callable[[list[str]], str], parts: Sequence[str]) -> None:
        """Interpret by a decoder, which consists of parts of these types."""
        self._decode = decode
        self._alphabet = _byte_alphabet() if "ByteLevel" in parts else {}
        self.falls_back = "ByteFallback" in parts
        self._head = len(decode([_ANCHOR]))
        self._tail = len(decode([_ANCHOR, _ANCHOR])) - self._head

    def bytes_of(self, name: str) -> bytes:
        """Return the bytes of a token inside a text."""
        if self._alphabet and all(c in self._alphabet for c in name):
            return bytes(self._alphabet[c] for c in name)
        if self.falls_back and (byte := _BYTE.fullmatch(name)):
            return bytes([int(byte[1], 16)])
        return self._inside(name).encode()

    def between(self, text: bytes) -> bytes:
        """Return the bytes of a token for exactly this text, with the space that separates tokens."""
        before, _, after = self._inside(_ANCHOR).partition(_ANCHOR)
        return before.encode() + text + after.encode()

    def _inside(self, name: str) -> str:
        found = self._decode([_ANCHOR, name, _ANCHOR])
        return found[self._head : len(found) - self._tail]


def _readings(tokenizer: Tokenizer) -> Iterator[_Reading]:
    """Return candidate interpretations of a tokenizer's tokens: by its decoder, or as its other parts imply."""
    if tokenizer.decoder is not None:
        yield _of_decoder(tokenizer.decoder)
    implied = list(_implied(chain(_parts(tokenizer.pre_tokenizer), _parts(tokenizer.normalizer))))
    model = tokenizer.model
    if getattr(model, "continuing_subword_prefix", None):
        implied.append(decoders.WordPiece(prefix=model.continuing_subword_prefix, cleanup=False))
    if getattr(model, "end_of_word_suffix", None):
        implied.append(decoders.BPEDecoder(suffix=model.end_of_word_suffix))
    yield from map(_of_decoder, implied)
    yield _of_decoder(decoders.Fuse())
    if tokenizer.decoder is None and not implied:
        yield _Reading(" ".join, [])  # the library's behaviour then


def _of_decoder(decoder: Any) -> _Reading:
    return _Reading(decoder.decode, [part["type"] for part in _parts(decoder)])


def _implied(parts: Iterable[dict[str, Any]]) -> Iterator[Any]:
    """Return decoders that invert these parts of a tokenizer, which may have been saved without a decoder."""
    for part in parts:
        match part:
            case {"type": "ByteLevel"}:
                yield decoders.ByteLevel()
            case {"type": "Metaspace", "replacement": mark} | {
                "type": "Replace",
                "pattern": {"String": " "},
                "content": mark,
            }:
                replaced = decoders.Replace(mark, " ")
                yield decoders.Sequence([replaced, decoders.ByteFallback(), decoders.Fuse()])


def _parts(component: Any) -> Iterator[dict[str, Any]]:
    """Yield the settings of a part of a tokenizer, one by one for a sequence."""
    if component is None:
        return
    waiting = [json.loads(component.__getstate__())]
    while waiting:
        state = waiting.pop(0)
        inner = next((state[key] for key in ("decoders", "normalizers", "pretokenizers") if key in state), None)
        if inner is None:
            yield state
        else:
            waiting = [*inner, *waiting]


def _byte_alphabet() -> dict[str, int]:
    """Invert GPT-2's byte alphabet (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


# ---------------------------------------------------------------------------------------------------------------- trial
class _Trial:
    """Test texts with their tokens and decodings, to validate a spelling."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values() if not token.special]
        general = _known(tokenizer, SAMPLES)
        if isinstance(tokenizer.model, models.WordLevel) or not general:
            general += _known(tokenizer, _own_texts(tokenizer))
        general += _known(tokenizer, [*map(chr, _CHARACTERS), *_replaced(tokenizer)])
        around = [f"a{space}{content}{space}b" for content in added for space in ("", " ")]
        self._cases = [*_known(tokenizer, around), *general]

    def kept(self, spelling: Spelling) -> list[bool] | None:
        """Return whether each text is reproduced exactly; None if the bytes of one are neither it nor its decoding."""
        kept = []
        for text, ids, decoded in self._cases:
            is_whole = _spells(spelling, ids, text)
            if not (is_whole or _spells(spelling, ids, decoded)):
                return None
            kept.append(is_whole)
        return kept

    def lost(self, kept: list[bool]) -> str | None:
        """Return the first text that is not reproduced exactly."""
        return next((case[0] for case, is_whole in zip(self._cases, kept, strict=True) if not is_whole), None)

    def failure(self, spelling: Spelling) -> ModelError:
        """Describe the problem with the first text that is neither reproduced nor its decoding."""
        text, ids, decoded = next(
            (text, ids, decoded)
            for text, ids, decoded in self._cases
            if not any(_spells(spelling, ids, expected) for expected in (text, decoded))
        )
        return ModelError(
            f"a tokenizer that makes of {text!r} tokens with the bytes {spelling.joined(ids)!r}, and decodes them to "
            f"{decoded!r}",
            expected="tokens whose bytes joined are the text",
            do="give it the decoder that belongs to its model (`tokenizer.decoder`), leave out the added token that "
            "the text above shows, or give its vocabulary the bytes that it lacks",
        )


def _known(tokenizer: Tokenizer, texts: Sequence[str]) -> list[tuple[str, list[int], str]]:
    """Return the texts that a tokenizer can spell, each with its ids and their decoding."""
    unknown, ids = unknown_id(tokenizer), encode(tokenizer, list(texts))
    decoded = tokenizer.decode_batch(ids, skip_special_tokens=False)
    return [case for case in zip(texts, ids, decoded, strict=True) if unknown not in case[1]]


def _replaced(tokenizer: Tokenizer) -> Iterator[str]:
    """Return texts with patterns that parts of a tokenizer replace or split at, and with their space characters.

    SentencePiece's `▁` is omitted, since it is rare in text: it is counted where a corpus is read.
    """
    for part in chain(_parts(tokenizer.normalizer), _parts(tokenizer.pre_tokenizer)):
        match part:
            case {"pattern": {"String": " "}, "content": found} | {"pattern": {"String": found}}:
                pass
            case {"replacement": found}:
                pass
            case _:
                continue
        if found != MARK:
            yield f"a{found}b"


def _own_texts(tokenizer: Tokenizer) -> list[str]:
    """Return texts of tokens from across a vocabulary that may lack those of `SAMPLES`."""
    size = tokenizer.get_vocab_size(with_added_tokens=False)
    ids = range(0, size, max(1, size // _SAMPLED))
    groups = [list(ids[i : i + _TOGETHER]) for i in range(0, len(ids), _TOGETHER)]
    names = (filter(None, map(tokenizer.id_to_token, group)) for group in groups)
    texts = [*tokenizer.decode_batch(groups), *map(" ".join, names)]
    return [*texts, *(text.replace(" ", gap) for text in texts for gap in ("  ", "\n"))]


def _spells(spelling: Spelling, ids: Sequence[int], text: str) -> bool:
    """Whether the bytes of some tokens are a text, with or without the tokenizer's prefix and suffix."""
    joined, before, after = spelling.joined(ids), {b"", spelling.prefix}, {b"", spelling.suffix}
    return any(joined == lead + text.encode() + trail for lead in before for trail in after)
