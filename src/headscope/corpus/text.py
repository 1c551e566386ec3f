"""Documents of the bundled corpus `python` and of text files, one section at a time."""

import codecs
import mmap
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, groupby, pairwise
from operator import itemgetter
from pathlib import Path

from headscope.errors import CorpusError

SEPARATOR = "\n<|doc|>\n"
"""A line `<|doc|>` separates the documents inside one text file, unless another line is named."""

_NOT_PYTHON_PROSE = frozenset(
    {"test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "ensurepip", "pydoc_data"}
    | {"_vendor", "site-packages", "dist-packages", "__pycache__"}
)
_SECTION = 65_536  # characters; longer files are split at line ends, so that one large file can be divided too
LONGEST_LINE = 1 << 26
"""Maximum number of characters in a line: a document is split only at line ends."""
_LOOKED_AT = 8192  # bytes in which a binary file is detected


@dataclass(frozen=True)
class Document:
    """One text with the name that determines its side of the split, unless it has a key for that."""

    name: str
    text: str
    key: str | None = None


def file_documents(path: Path, name: str, line: str = "<|doc|>") -> Iterator[Document]:
    """Yield the documents of a text file, separated by a line; long ones are split at line ends, one section at a time.

    Raises:
        CorpusError: it cannot be read, is binary, is not UTF-8, or has a line of more than 64 million characters.
    """
    _check_text(path)
    parted = _is_parted(path, line)
    for i, pieces in groupby(_pieces(path, line), key=itemgetter(0)):
        yield from cut_documents((piece for _, piece in pieces), f"{name}:{i}" if parted else name)


def cut_documents(pieces: Iterator[str], name: str, key: str | None = None) -> Iterator[Document]:
    """Name the sections of one document; several are numbered, and blank ones are skipped."""
    first, second = next(pieces, ""), next(pieces, None)
    if second is None:
        named = [(name, first)]
    else:
        named = ((f"{name}#{j}", piece) for j, piece in enumerate(chain([first, second], pieces)))
    for own_name, piece in named:
        if piece.strip():
            yield Document(own_name, piece, key)


def sections(text: str) -> Iterator[str]:
    """Split a long text at line ends; a text of ordinary length stays whole."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + _SECTION) if len(text) > _SECTION else -1
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end


def _pieces(path: Path, line: str) -> Iterator[tuple[int, str]]:
    """Yield (document number, section).

    A separator line is not text, nor is the line end before it. Without a line since the previous one, or since the
    start, it separates nothing, so it does not increase the number.
    """
    i, held, size, begun = 0, [], 0, False
    for current, following in pairwise(chain(_read_lines(path), [""])):
        if _parts(current, line):
            i, begun = i + begun, False
            continue
        ends, begun = _parts(following, line), True
        held.append(_without_end(current) if ends else current)
        size += len(current)
        if ends or not following or (size > _SECTION and current.endswith("\n")):
            if section := "".join(held):
                yield i, section
            held, size = [], 0


def _parts(current: str, line: str) -> bool:
    """Whether the current text is the separator line, which may be the last one, without a line end."""
    return _without_end(current) == line


def _without_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _is_parted(path: Path, line: str) -> bool:
    """Whether a file has a separator after another line."""
    return _has(path, line.encode()) and any(
        _parts(b, line) and not _parts(a, line) for a, b in pairwise(_read_lines(path))
    )


def _read_lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:  # line ends are preserved
            while line := file.readline(LONGEST_LINE):
                if len(line) == LONGEST_LINE:
                    raise CorpusError(
                        f"{path} has a line of {LONGEST_LINE:,} characters or more",
                        expected="text with line ends",
                        do="break its lines, or leave it out",
                    )
                yield line
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} is not UTF-8 (byte {_bad_byte(path)})",
            expected="UTF-8 text",
            do="convert it, or leave it out of the folder",
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _bad_byte(path: Path) -> int:
    """Return the position of the first byte in a file that is not UTF-8."""
    decoder, at = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                return at - pending + error.start
            at += len(chunk)
    return at - len(decoder.getstate()[0])


def _check_text(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(_LOOKED_AT)
    except OSError as error:
        raise _unreadable(path, error) from error
    if b"\0" in start:
        raise CorpusError(
            f"{path} is a binary file",
            expected="UTF-8 text",
            do="leave it out, or name a pattern such as 'texts/*.txt'",
        )


def _has(path: Path, needle: bytes) -> bool:
    with path.open("rb") as file:
        if not path.stat().st_size:
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(needle) >= 0


def _unreadable(path: Path, error: OSError) -> CorpusError:
    return CorpusError(
        f"cannot read {path}: {error.strerror}", expected="a readable text file", do="check its permissions"
    )


def python_files() -> Iterator[tuple[str, Path]]:
    """Return (dotted name, file) of each module of the running interpreter's standard library.

    Excluded: tests, idlelib, lib2to3, encodings, vendored copies, and generated data.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _NOT_PYTHON_PROSE & set(parts) or parts[0].startswith("_sysconfigdata"):
            continue
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def python_documents() -> Iterator[Document]:
    """Yield the running interpreter's standard library, one document per module, named by its dotted name."""
    for dotted, path in python_files():
        text = "".join(_read_lines(path))
        if text.strip():
            yield Document(dotted, text)
