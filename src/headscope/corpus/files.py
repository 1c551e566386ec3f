"""Find the files of a folder or a glob: links are followed, and unreadable ones are errors that name them.

Hidden files and folders are skipped unless the pattern has the dot, as in a shell.
"""

import os
import re
import stat
import unicodedata
from collections import deque
from collections.abc import Iterable
from fnmatch import translate
from pathlib import Path

from headscope.errors import CorpusError


def text_name(path: str) -> str:
    """Convert a path to the name of a document: composed (NFC), with escapes for bytes that are not UTF-8.

    Systems differ in composed and decomposed characters; the split must not depend on that.
    """
    return unicodedata.normalize("NFC", readable(path))


def readable(path: str) -> str:
    r"""Format a path with escapes for bytes that are not UTF-8, as `caf\xe9.txt`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def is_folder(path: Path) -> bool:
    """Whether there is a folder.

    Raises:
        CorpusError: its parent cannot be read.
    """
    try:
        return path.is_dir()
    except OSError as error:
        raise _cannot_read(path, error) from error


def files_below(folder: Path, pattern: str) -> dict[str, Path]:
    """Return the files below a folder that match a pattern, sorted by name.

    Args:
        folder: links in it are followed. A file reached in two ways counts once, by the name without a link.
        pattern: parts between slashes, each as in a shell; `**` is any number of folders.

    Raises:
        CorpusError: a folder cannot be listed, a link is broken, a match is neither file nor folder, or two files have
            the same name.
    """
    parts = Path(pattern).parts
    found: dict[str, tuple[str, Path]] = {}  # by resolved path: name, path
    waiting, behind_links = deque([(folder, (*parts, "*") if parts[-1] == "**" else parts)]), deque()
    seen: set[tuple[str, ...]] = set()
    while waiting or behind_links:
        is_linked = not waiting
        here, (head, *rest) = (waiting or behind_links).popleft()
        real = os.path.realpath(here)
        if (real, head, *rest) in seen:
            continue
        seen.add((real, head, *rest))
        if head == "**":
            (behind_links if is_linked else waiting).append((here, tuple(rest)))
        for entry in _entries(here, head):
            kind, path = _kind(entry, wanted=not rest), here / entry.name
            if kind == "folder" and (rest or head == "**"):
                queue = behind_links if is_linked or entry.is_symlink() else waiting
                queue.append((path, (head, *rest) if head == "**" else tuple(rest)))
            elif kind == "file" and not rest:
                found.setdefault(f"{real}/{entry.name}", (text_name(path.relative_to(folder).as_posix()), path))
    return _by_name(found.values())


def _by_name(found: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for name, path in sorted(found, key=lambda pair: pair[0].split("/")):
        if name in named:
            raise CorpusError(
                f"two files named {name!r}, written differently: {str(named[name])!a} and {str(path)!a}",
                expected="files with different names",
                do="rename one of them",
            )
        named[name] = path
    return named


def _entries(folder: Path, pattern: str) -> list[os.DirEntry[str]]:
    """Return the entries of a folder that match a part of a pattern, in order."""
    matches = re.compile(translate("*" if pattern == "**" else pattern)).match
    try:
        with os.scandir(folder) as entries:
            chosen = [e for e in entries if matches(e.name) and (pattern.startswith(".") or e.name[0] != ".")]
    except OSError as error:
        raise _cannot_read(folder, error) from error
    return sorted(chosen, key=lambda entry: entry.name)


def _kind(entry: os.DirEntry[str], *, wanted: bool) -> str:
    """Return `file`, `folder` or neither, which is an error where it is needed."""
    try:
        mode = entry.stat().st_mode
    except OSError as error:  # a broken or circular link
        if wanted:
            raise _cannot_read(Path(entry.path), error) from error
        return "nothing"
    if stat.S_ISDIR(mode):
        return "folder"
    if stat.S_ISREG(mode):
        return "file"
    if wanted:
        raise CorpusError(
            f"{Path(entry.path)} is neither a file nor a folder", expected="files of text", do="leave it out"
        )
    return "nothing"


def _cannot_read(path: Path, error: OSError) -> CorpusError:
    return CorpusError(
        f"cannot read {str(path)!a}: {error.strerror or error}",
        expected="files and folders that can be read",
        do="check its permissions and where links lead, or name a pattern that leaves it out",
    )
