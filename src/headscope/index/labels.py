"""Human labels of features: `labels.jsonl` in the index folder, one JSON object per line, append-only.

A line is a label, or the retraction of one; the last label by an annotator for a latent counts. An append is one write
under a lock, so several annotators can work at once; a crash may leave a truncated last line, which readers skip and
the next append removes. Any other invalid line is rejected by its number. The file is as untrusted as the rest of the
folder. No torch.
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from dataclasses import fields as fields_of
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from headscope.errors import LabelError, OutputError
from headscope.index.records import Example
from headscope.index.store import FeatureIndex

Verdict = Literal["interpretable", "unsure", "not interpretable"]
Family = Literal["", "induction", "local context", "high-level context", "token", "other"]

VERDICTS: tuple[str, ...] = get_args(Verdict)
FAMILIES: tuple[str, ...] = get_args(Family)
CONFIDENCES = {1: "low", 2: "medium", 3: "high"}
LONGEST = {"annotator": 80, "text": 500, "notes": 5000, "queue": 80}
"""Maximum number of characters of a field."""
MAX_LINE = 1 << 16
"""Maximum number of bytes of a line, including its end."""

FILE = "labels.jsonl"
_ID = re.compile(r"[0-9a-f]{16}")
_CARD = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A judgement of a feature.

    Raises:
        LabelError: a field has an invalid value; types are the caller's responsibility.
    """

    verdict: str
    """One of `VERDICTS`."""
    confidence: int = 2
    """1 low, 2 medium, 3 high."""
    family: str = ""
    """One of `FAMILIES`: the post's three, others, or "" for none."""
    text: str = ""
    """Description of the feature in a few words."""
    notes: str = ""

    def __post_init__(self) -> None:
        """Validate each field."""
        allowed = {"verdict": VERDICTS, "family": FAMILIES, "confidence": tuple(CONFIDENCES)}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise _refusal(name, getattr(self, name), f"one of {', '.join(map(repr, values))}")
        _check_texts(self, "text", "notes")


@dataclass(frozen=True, kw_only=True)
class Label(Judgement):
    """An annotator's label of one feature."""

    id: str
    """16 hex digits, referenced by a retraction."""
    latent: int
    annotator: str
    blind: bool
    """Whether it was given without seeing attribution, logits and the labels of others."""
    queue: str
    """The sample it was given in, as `studies.survey.Sample.name`; "" outside of a sample."""
    card: str
    """`card_hash` of the card shown to the annotator."""
    time: str
    """ISO 8601, UTC."""

    def __post_init__(self) -> None:
        """Validate each field."""
        super().__post_init__()
        _check_texts(self, "annotator", "queue")
        if not self.annotator.strip() or not self.annotator.isprintable():
            raise _refusal("annotator", self.annotator, "a name in printable characters")
        if not _ID.fullmatch(self.id):
            raise _refusal("id", self.id, "16 hexadecimal digits")
        if not _CARD.fullmatch(self.card):
            raise _refusal("card", self.card, "sha256: and 64 hexadecimal digits")
        if self.latent < 0:
            raise _refusal("latent", self.latent, "a latent of the index")
        _check_time(self.time)


@dataclass(frozen=True)
class Retraction:
    """An annotator's retraction of one of their labels; the previous one, if any, counts again."""

    label: str
    """`Label.id`."""
    annotator: str
    time: str


@dataclass(frozen=True)
class Labels:
    """The content of a label file."""

    standing: tuple[Label, ...]
    """Labels that were not retracted, in order."""
    torn: str | None
    """Description of a truncated last line that was skipped."""

    def latest(self) -> dict[tuple[str, int], Label]:
        """Return the labels that count, by annotator and latent."""
        return {(label.annotator, label.latent): label for label in self.standing}

    def of(self, latent: int) -> tuple[Label, ...]:
        """Return the labels that count for one latent, one per annotator, in order."""
        return tuple(label for (_, own), label in self.latest().items() if own == latent)


class LabelStore:
    """The append-only labels of an index. Safe to use from several threads and processes."""

    def __init__(self, index: FeatureIndex) -> None:
        """Prepare; nothing is read or created yet."""
        self.index, self.path = index, index.folder / FILE

    def read(self) -> Labels:
        """Read all labels.

        Raises:
            LabelError: a line is not a record of this index, or the file is not a regular file; the error says which.
        """
        with _opened(self.path, os.O_RDONLY) as handle:
            if handle is None:
                return Labels((), None)
            fcntl.flock(handle, fcntl.LOCK_SH)
            lines = list(_lines(handle, self.path))
        torn = None
        if lines and not lines[-1].endswith(b"\n") and not _is_record(lines[-1]):
            torn = f"{FILE} line {len(lines)} was cut off ({len(lines[-1])} bytes) and is left out"
            lines.pop()
        labels: dict[str, Label] = {}
        standing: dict[str, Label] = {}
        for number, line in enumerate(lines, 1):
            try:
                self._take(_parse(line), labels, standing)
            except LabelError as error:
                raise LabelError(
                    f"{self.path} line {number}: {error.got}", expected=error.expected, do="mend or remove that line"
                ) from error
        return Labels(tuple(standing.values()), torn)

    def _take(self, record: Label | Retraction, labels: dict[str, Label], standing: dict[str, Label]) -> None:
        """Apply one record."""
        if isinstance(record, Label):
            if record.latent >= self.index.n_latents:
                raise _refusal("latent", record.latent, f"0 to {self.index.n_latents - 1}")
            if record.id in labels:
                raise _refusal("id", record.id, "an id that no earlier label has")
            labels[record.id] = standing[record.id] = record
            return
        label = labels.get(record.label)
        if label is None or label.annotator != record.annotator:
            raise _refusal("retraction", record.label, f"the id of an earlier label by {record.annotator!r}")
        standing.pop(record.label, None)

    def add(self, latent: int, annotator: str, judgement: Judgement, *, blind: bool = False, queue: str = "") -> Label:
        """Append an annotator's label of a feature and its current card.

        Raises:
            LabelError: no such name or queue.
            IndexFormatError: no such latent.
            OutputError: the file cannot be written; it is unchanged.
        """
        label = Label(
            id=secrets.token_hex(8),
            latent=latent,
            annotator=annotator,
            **asdict(judgement),
            blind=blind,
            queue=queue,
            card=card_hash(self.index, latent, blind=blind),
            time=_now(),
        )
        self._append({"kind": "label", **asdict(label)})
        return label

    def retract(self, annotator: str, label: str) -> Retraction:
        """Append the retraction of a label.

        Raises:
            LabelError: this annotator has no such label that is not retracted, or the file is damaged.
            OutputError: the file cannot be written; it is unchanged.
        """
        if not any(own.id == label and own.annotator == annotator for own in self.read().standing):
            raise _refusal("retraction", label, f"the id of a standing label by {annotator!r}")
        retraction = Retraction(label, annotator, _now())
        self._append({"kind": "retraction", **asdict(retraction)})
        return retraction

    def _append(self, record: dict[str, Any]) -> None:
        """Append one line, or nothing."""
        line = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        assert len(line) <= MAX_LINE, "the limits of the fields keep a line below this"
        try:
            with _opened(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT) as handle:
                assert handle is not None, "created where there was none"
                fcntl.flock(handle, fcntl.LOCK_EX)
                end = _mend_end(handle, self.path)
                try:
                    if os.write(handle, line) < len(line):
                        raise OSError("no room for a line")
                    os.fsync(handle)
                except OSError:
                    with suppress(OSError):
                        os.ftruncate(handle, end)
                    raise
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path}: {error.strerror or error}",
                expected="an index folder that can be written, on a disk with room",
                do="make the folder writable or free some space; the labels in it are untouched",
            ) from error


def card_hash(index: FeatureIndex, latent: int, *, blind: bool = False) -> str:
    """Hash the content of a feature's card, as `sha256:<hex>`: another index of the same SAE may have another card.

    Covers the SAE's hash, how often and how strongly the feature is active, and the text and activations of its
    examples; and, where the card is not blind, its logits, its source tokens and its examples' DFA by head. Numbers
    are taken to three significant digits, so that rounding errors do not change the hash.

    Raises:
        IndexFormatError: no such latent.
    """
    feature, groups, size = index.feature(latent), index.examples(latent), index.block_size
    examples = {example.position: example for group in groups for example in group.examples}
    said: list[Any] = [
        index.manifest["sae"]["hash"],
        latent,
        feature.n_active,
        _digits(feature.maximum),
        [[group.kind, group.number, [example.position for example in group.examples]] for group in groups],
        [_shown(example) for example in examples.values()],
        [[block, index.tokens_of(block).tolist()] for block in sorted({position // size for position in examples})],
    ]
    if not blind:
        sources = index.sources(latent)
        said += [
            [token for token, _ in (*feature.logit_top, *feature.logit_bottom)],
            [] if sources is None else [[source.token, _digits(source.share)] for source in sources.tokens],
            [[_digits(value) for value in example.heads.tolist()] for example in examples.values()],
        ]
    return f"sha256:{hashlib.sha256(json.dumps(said).encode()).hexdigest()}"


def _shown(example: Example) -> list[Any]:
    active = zip(example.active_at.tolist(), example.active_value.tolist(), strict=True)
    return [example.position, _digits(example.activation), [[at, _digits(value)] for at, value in active]]


def _digits(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"


# ------------------------------------------------------------------------------------------------------------ the file
@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int | None]:
    """Open a regular file without following links; None where there is none.

    Raises:
        LabelError: it is not a regular file, or reading is not allowed.
        OSError: it cannot be opened for writing.
    """
    writing = bool(flags & os.O_CREAT)
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except FileNotFoundError:
        if writing:
            raise
        yield None
        return
    except OSError as error:
        if writing and not path.is_symlink():
            raise
        raise _not_a_file(path, error.strerror) from error
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise _not_a_file(path, "not a regular file")
        yield handle
    finally:
        os.close(handle)


def _lines(handle: int, path: Path) -> Iterator[bytes]:
    with os.fdopen(handle, "rb", closefd=False) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            if len(line) > MAX_LINE:
                raise LabelError(
                    f"{path} line {number} is longer than {MAX_LINE:,} bytes",
                    expected="one label a line",
                    do="mend or remove that line",
                )
            yield line


def _mend_end(handle: int, path: Path) -> int:
    """Repair the end of the file and return its position: remove a truncated last line, add a missing line break."""
    size = os.fstat(handle).st_size
    start = max(0, size - MAX_LINE)
    tail = os.pread(handle, size - start, start)
    last = tail[tail.rfind(b"\n") + 1 :]
    if not last:
        return size
    if _is_record(last):
        os.write(handle, b"\n")
        return size + 1
    if len(last) == MAX_LINE:
        raise LabelError(f"{path}: its last line is too long", expected="one label a line", do="mend that line")
    os.ftruncate(handle, size - len(last))
    return size - len(last)


def _is_record(line: bytes) -> bool:
    try:
        _parse(line)
    except LabelError:
        return False
    return True


def _parse(line: bytes) -> Label | Retraction:
    """Parse a line.

    Raises:
        LabelError: it is not a record.
    """
    try:
        fields = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise LabelError(f"not JSON ({type(error).__name__})", expected="one JSON object", do="remove it") from error
    kinds: dict[str, type[Label] | type[Retraction]] = {"label": Label, "retraction": Retraction}
    kind = fields.pop("kind", None) if isinstance(fields, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise LabelError("not a record", expected=f'an object whose "kind" is {" or ".join(kinds)}', do="remove it")
    record = kinds[kind]
    types = {field.name: field.type for field in fields_of(record)}
    if fields.keys() != types.keys():
        raise LabelError(
            f"a {kind} with {', '.join(sorted(fields.keys() ^ types.keys()))!r} too much or missing",
            expected=", ".join(types),
            do="remove it",
        )
    for name, expected in types.items():
        if type(fields[name]) is not expected:
            raise _refusal(name, fields[name], str(getattr(expected, "__name__", expected)))
    return record(**fields)


def _not_a_file(path: Path, why: str | None) -> LabelError:
    return LabelError(f"{path}: {why}", expected="a file of labels, not a link", do="move it out of the index")


def _check_texts(record: Judgement, *names: str) -> None:
    for name in names:
        text = getattr(record, name)
        if len(text) > LONGEST[name]:
            raise _refusal(name, f"{len(text):,} characters", f"at most {LONGEST[name]:,}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _refusal(name, text, "text that is Unicode") from error


def _check_time(text: str) -> None:
    try:
        aware = datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        aware = False
    if not aware or len(text) > LONGEST["annotator"]:
        raise _refusal("time", text, "an ISO 8601 time with its zone")


def _refusal(name: str, value: object, expected: str) -> LabelError:
    shown = ascii(value)
    shown = shown if len(shown) <= LONGEST["annotator"] else f"{shown[: LONGEST['annotator']]}..."
    return LabelError(f"{name}: {shown}", expected=expected, do="correct it")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
