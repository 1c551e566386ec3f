"""Families of features from the columns of an index: their members, and how well a simple rule finds them.

`induction` is compared with the post's rule, the decoder share of one head (`studies.induction.store` writes its
columns); the families of proxies against the correlation of their best proxy (`proxies.search_table` does). No torch,
no model: for missing columns the page names the command that adds them.
"""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from headscope.artefact import stamp_of
from headscope.encode import Json, encode, significant
from headscope.errors import HeadscopeError, IndexFormatError, LabelError
from headscope.index.columns import studies
from headscope.index.head_records import HeadTables
from headscope.index.labels import LabelStore
from headscope.index.store import FeatureIndex
from headscope.proxies.search_records import FAMILIES
from headscope.stats import MINIMUM_UNITS, wilson
from headscope.studies.induction.behaviour import SELECTED, compare_rule

INDUCTION = "induction"
_TESTS = {
    "behaviour": "on at later A's of A B ... A B, off at the first",
    "sources": "its DFA comes from earlier B's",
    "copying": "reading B through that head raises it more than other tokens would",
    "corruption": "it turns off when the A's before earlier B's are replaced",
}
_PROXY_COLUMN = {"local context": "local", "high-level context": "context", "token": "token"}
_FIRES = {
    "local context": "soon after certain tokens",
    "high-level context": "anywhere after certain tokens, to the end of the text",
    "token": "on certain tokens",
}
_DIGITS = 4


def slug(kind: str) -> str:
    """Return a family's name in a URL: `high-level-context`."""
    return kind.replace(" ", "-")


PROXY_FAMILIES = {slug(kind): kind for kind in FAMILIES if kind in _PROXY_COLUMN}
"""Families in the columns `proxies` besides induction, by their names in a URL."""


class IndexFamilies:
    """The families of one index; columns that studies add while it is open are included."""

    def __init__(self, index: FeatureIndex) -> None:
        """Show an index."""
        self._index = index
        self._heads = [f"{index.manifest['layer']}.{h}" for h in range(index.n_heads)]

    def families(self) -> Json:
        """Return every family: its members, or the command that finds them."""
        return {"families": [self._summary(name) for name in (INDUCTION, *PROXY_FAMILIES)]}

    def family(self, name: str, head: str | None = None) -> Json:
        """Return one family: every feature that was judged, and the score of the rule compared with the verdict.

        Args:
            name: `induction`, or one of `PROXY_FAMILIES`.
            head: for induction, the head of the post's rule, as `1.6`; the top head of most members when None.

        Raises:
            KeyError: there is no such family, or no such head for it.
        """
        if name != INDUCTION and name not in PROXY_FAMILIES:
            raise KeyError(f"families are {', '.join((INDUCTION, *PROXY_FAMILIES))}")
        if head is not None and (name != INDUCTION or head not in self._heads):
            heads = f"{self._heads[0]} to {self._heads[-1]}" if name == INDUCTION else "none: its rule names no head"
            raise KeyError(f"heads of this family are {heads}")
        try:
            columns = self._columns(name)
        except _MissingError as missing:
            return {"name": name, **missing.json()}
        members = self._induction(columns, head) if name == INDUCTION else self._proxies(columns, name)
        provenance = columns.provenance
        said = {key: provenance[key] for key in ("created", "headscope", "settings")}
        return {"name": name, "missing": None, "n": str(provenance["n"]), **said, **members}

    def stamp(self) -> Hashable:
        """Return a value that changes when people label a feature; the index has its own stamp for studies."""
        return stamp_of(LabelStore(self._index).path)

    def _summary(self, name: str) -> Json:
        try:
            columns = self._columns(name)
        except _MissingError as missing:
            return {"name": name, **missing.json()}
        verdict = columns.verdict
        n, k = len(verdict), int(verdict.sum())
        share = significant(list(vars(wilson(k, n)).values()), _DIGITS) if n else None
        return {"name": name, "missing": None, "n": n, "members": k, "share": share, "definition": columns.definition}

    def _columns(self, name: str) -> "_Columns":
        """Return the results for the features that were judged."""
        study = INDUCTION if name == INDUCTION else "proxies"
        folder = self._index.folder
        command = f"headscope study {'families' if study == INDUCTION else study} INDEX"
        if study not in studies(folder):
            raise _MissingError(f"No study has looked for this family: the index has no columns {study!r}.", command)
        try:
            table, provenance = self._index.study(study)
            if study == INDUCTION:
                judged = table.filter(table["verdict"].is_valid())
                return _Columns(judged, provenance, _bools(judged["verdict"]), _asked(provenance["settings"]))
            kind = PROXY_FAMILIES[name]
            judged = table.filter(table["kind"].is_valid())
            of_kind = np.array([found == kind for found in judged["kind"].to_pylist()], dtype=bool)
            return _Columns(judged, provenance, of_kind, _of_kind(kind, provenance["settings"]))
        except KeyError as error:
            raise _MissingError(f"The columns {study!r} of this index lack {error}.", command) from error
        except HeadscopeError as error:
            raise _MissingError(f"The columns {study!r} are refused: {error.got}.", command) from error

    # ------------------------------------------------------------------------------------------------------- induction
    def _induction(self, columns: "_Columns", head: str | None) -> Json:
        table, verdict, asked = columns.table, columns.verdict, columns.provenance["settings"]
        latents = table["latent"].to_numpy()
        own = table["head"].to_pylist()
        shares = np.nan_to_num(self._index.shares["decoder"][latents])
        chosen = self._heads.index(head) if head is not None else _main_head(own, verdict, shares)
        numbers = {name: _floats(table[name]) for name in ("rate", "first_rate", "source_share", "copy_rank", "off")}
        numbers["off_control"] = _floats(table["off_control"])
        apart = shares[:, chosen] - numbers["source_share"]
        tests = _tests(table, asked)
        words = columns.provenance["definitions"]
        name = self._heads[chosen]
        return {
            "rule": _rule(
                shares[:, chosen],
                verdict,
                SELECTED,
                label=f"decoder share of head {name}",
                definition=f"the post's rule: the share of head {name} in the feature's decoder norms is at least this",
            ),
            "heads": self._heads,
            "head": name,
            "by_head": _brought(own, verdict, len(self._heads)),
            "tests": [{"name": test, "definition": _TESTS[test]} for test in tests],
            "measures": self._measures(),
            "columns": [
                _column("latent", "id", "int", "index of the dictionary entry"),
                _column("token", "predicts", "token", words["token"]),
                _column("score", f"decoder {name}", "percent", f"share of head {name} in the feature's decoder norms"),
                _column("source_share", "DFA from B", "percent", words["source_share"]),
                _column("apart", "apart", "signed", f"decoder share of head {name} less {words['source_share']}"),
                _column("verdict", "verdict", "bool", columns.definition),
                _column("tests", "tests", "tests", "; ".join(f"{test}: {_TESTS[test]}" for test in tests)),
                _column("head", "head", "head", words["head"]),
                _column("label", "label", "text", "what people say of it"),
                _column("rate", "behaviour", "percent", words["rate"]),
                _column("n_expected", "of", "int", words["n_expected"]),
                _column("copy_rank", "copy rank", "percent", words["copy_rank"]),
                _column("off", "off", "percent", words["off"]),
                _column("off_control", "off, control", "percent", words["off_control"]),
            ],
            "rows": {
                "latent": latents.tolist(),
                "token": table["token"].to_pylist(),
                "score": significant(shares[:, chosen], 6),
                "apart": significant(apart),
                "verdict": verdict.tolist(),
                "tests": [[of[i] for of in tests.values()] for i in range(len(latents))],
                "n_expected": table["n_expected"].to_pylist(),
                "head": [None if h is None else self._heads[h] for h in own],
                **{key: significant(values) for key, values in numbers.items()},
                **self._labels(latents),
            },
        }

    def _measures(self) -> Json:
        """Return the share of all live features that pass, its null, and the groups of the post's rule, if stored."""
        tables = HeadTables(self._index.folder)
        if f"measures_{INDUCTION}" not in tables.tables:
            return {}
        try:
            return {name: encode(measure) for name, measure in tables.measures(INDUCTION).items()}
        except IndexFormatError:
            return {}  # the columns are useful without them

    # --------------------------------------------------------------------------------------------------------- proxies
    def _proxies(self, columns: "_Columns", name: str) -> Json:
        kind, words = PROXY_FAMILIES[name], columns.provenance["definitions"]
        column = _PROXY_COLUMN[kind]
        table, verdict = columns.table, columns.verdict
        score = _floats(table[f"{column}_pearson"])
        tried = np.isfinite(score)
        table, verdict, score = table.filter(pa.array(tried)), verdict[tried], score[tried]
        latents = table["latent"].to_numpy()
        known = self._index.table().take(latents)
        least = columns.provenance["settings"]["min_pearson"]
        return {
            "rule": _rule(
                score,
                verdict,
                float(least),
                label="correlation of the best proxy",
                definition=f"the best proxy of the family {kind} correlates with the feature at least so much",
            ),
            "heads": None,
            "head": None,
            "by_head": None,
            "tests": [],
            "measures": {},
            "columns": [
                _column("latent", "id", "int", "index of the dictionary entry"),
                _column("proxy", "best proxy", "text", words[f"{column}_proxy"]),
                _column("score", "Pearson", "float", words[f"{column}_pearson"]),
                _column("verdict", "verdict", "bool", columns.definition),
                _column("precision", "precision", "percent", words[f"{column}_precision"]),
                _column("recall", "recall", "percent", words[f"{column}_recall"]),
                _column("top_logit", "top logit", "token", "the token whose logit the feature raises most"),
                _column("top_head", "head", "head", "the head with the largest share of squared DFA"),
                _column("label", "label", "text", "what people say of it"),
                _column("kind", "kind", "text", words["kind"]),
            ],
            "rows": {
                "latent": latents.tolist(),
                "proxy": table[f"{column}_proxy"].to_pylist(),
                "score": significant(score, 6),
                "verdict": verdict.tolist(),
                **{key: significant(_floats(table[f"{column}_{key}"])) for key in ("precision", "recall")},
                "kind": table["kind"].to_pylist(),
                "top_logit": known["top_logit"].to_pylist(),
                "top_head": [None if h is None else self._heads[h] for h in known["top_head"].to_pylist()],
                **self._labels(latents),
            },
        }

    # ---------------------------------------------------------------------------------------------------------- labels
    def _labels(self, latents: Int[np.ndarray, " n"]) -> Json:
        """Return the labels of each feature; none where their file cannot be read, which the labelling page reports."""
        said: dict[int, list[str]] = {}
        try:
            for (_, latent), label in LabelStore(self._index).read().latest().items():
                said.setdefault(latent, []).append(label.text or label.family or label.verdict)
        except LabelError:
            said = {}
        return {"label": ["; ".join(dict.fromkeys(said[j])) if j in said else None for j in latents.tolist()]}


@dataclass(frozen=True)
class _Columns:
    """Results of a study for the features it could judge."""

    table: pa.Table
    provenance: dict[str, Any]
    verdict: Bool[np.ndarray, " n"]
    definition: str


def _of_kind(kind: str, settings: Mapping[str, Any]) -> str:
    """Return the criteria for a kind of proxy family."""
    return (
        f"fires {_FIRES[kind]}: of all proxies the best is of this kind, correlates with the feature at "
        f"{settings['min_pearson']:g} or more in documents that did not choose it, its interval above all of the null, "
        f"and is true on at least {settings['min_active']} tokens of {MINIMUM_UNITS} documents"
    )


class _MissingError(Exception):
    """No study was run, or its results are unusable."""

    def __init__(self, message: str, command: str) -> None:
        super().__init__(message)
        self.message, self.command = message, command

    def json(self) -> Json:
        return {"missing": self.message, "command": self.command}


def member_of(table: pa.Table, latent: int) -> list[str]:
    """Return the families that a feature belongs to, by their names in a URL, from the columns of an index's table."""
    names = set(table.column_names)
    found = []
    if "induction.verdict" in names and table["induction.verdict"][latent].as_py():
        found.append(INDUCTION)
    if "proxies.kind" in names and (kind := table["proxies.kind"][latent].as_py()) in _PROXY_COLUMN:
        found.append(slug(kind))
    return found


def _main_head(own: list[int | None], verdict: Bool[np.ndarray, " n"], shares: Float[np.ndarray, "n head"]) -> int:
    """Return the top head of most members; without any, the head for which the post's rule selects most features."""
    brought = _brought(own, verdict, shares.shape[1])
    return int(np.argmax(brought if any(brought) else (shares >= SELECTED).sum(0)))


def _brought(own: list[int | None], verdict: Bool[np.ndarray, " n"], n_heads: int) -> list[int]:
    """Count the members for which each head is the top head."""
    heads = [h for h, is_member in zip(own, verdict, strict=True) if is_member and h is not None]
    return np.bincount(np.array(heads, dtype=np.int64), minlength=n_heads).tolist()


def _asked(criteria: dict[str, Any]) -> str:
    """Describe the criteria for an induction feature, in one line."""
    off = criteria["off"]
    tests = [
        f"pass rate above {criteria['rate']:g} on at least {criteria['least']} later A's",
        f"at least {criteria['source_share']:.0%} of positive DFA from earlier B's",
        f"copy rank of B at most {criteria['copy_rank']:.1%}",
        *([] if off is None else [f"off in more than {off:.0%} with the A's before earlier B's replaced"]),
    ]
    return f"passes all tests: {'; '.join(tests)}"


def _tests(table: pa.Table, asked: dict[str, Any]) -> dict[str, list[bool | None]]:
    """Return whether each feature passes each requested test, in order; None: not tested."""
    n, rate = _floats(table["n_expected"]), _floats(table["rate"])
    sources, copying, off = (_floats(table[name]) for name in ("source_share", "copy_rank", "off"))
    with np.errstate(invalid="ignore"):
        found = {
            "behaviour": _made((n >= asked["least"]) & (np.rint(rate * n) > asked["rate"] * n), rate),
            "sources": _made(sources >= asked["source_share"], sources),
            "copying": _made(copying <= asked["copy_rank"], copying),
        }
        if asked["off"] is not None:
            found["corruption"] = _made(off > asked["off"], off)
    return found


def _made(passes: Bool[np.ndarray, " n"], value: Float[np.ndarray, " n"]) -> list[bool | None]:
    return [None if np.isnan(of) else bool(is_true) for is_true, of in zip(passes, value, strict=True)]


def _rule(
    score: Float[np.ndarray, " n"], verdict: Bool[np.ndarray, " n"], at: float, *, label: str, definition: str
) -> Json:
    """Return the data with which the page compares a score with the verdict at any threshold."""
    compared = compare_rule(score.astype(np.float64), verdict, at=at, definition=definition)
    return {
        "label": label,
        "definition": definition,
        "at": at,
        "n": compared.n,
        "n_true": compared.n_true,
        "auc": encode(compared.auc),
    }


def _column(name: str, label: str, kind: str, definition: str) -> Json:
    return {"name": name, "label": label, "kind": kind, "definition": definition}


def _floats(column: pa.ChunkedArray) -> Float[np.ndarray, " n"]:
    """Convert to floats, NaN for null."""
    return np.array([np.nan if value is None else value for value in column.to_pylist()], dtype=np.float64)


def _bools(values: Iterable[Any]) -> Bool[np.ndarray, " n"]:
    return np.array([bool(value.as_py()) for value in values], dtype=bool)
