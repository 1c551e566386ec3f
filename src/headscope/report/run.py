"""Run the whole replication: index SAEs of one model, choose exemplars, run every study on each, write the report.

Finished work is stored in the folder of the report, index by index and study by study, and reused by the same command.
A study that fails becomes a row with the reason.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscope import jobs
from headscope.artefact import atomic_write, read_json, write_json
from headscope.errors import HeadscopeError, OutputError, SAEError
from headscope.jobs.early import check_device, check_model, check_sae, check_text
from headscope.limits import Output, checked
from headscope.names import lasting_corpus, lasting_model, shown
from headscope.report.records import FULL, QUICK, Claim, Exemplar, Section, Settings
from headscope.report.results import Report, StudyResult, SubjectResult

if TYPE_CHECKING:
    from headscope.index.live import LiveIndex
    from headscope.index.store import FeatureIndex
    from headscope.report.subject import Subject
    from headscope.sae.model import SAE

TINY = ("tiny-z1", "tiny-z1-relu")
"""SAEs of the bundled model: its best one, and the ReLU SAE, the kind used in the post."""
TINY_UPSTREAM = "tiny-mlp0"
_PLAN = "plan.json"
_KEPT = ("indexes", "studies", _PLAN, "report.json", "report.html", "report.md")


@dataclass(frozen=True)
class Inputs:
    """Inputs of a report."""

    model: str | None = None
    """The model; default: the one named by the first SAE."""
    saes: tuple[str, ...] = ()
    """SAE folders, or names of bundled ones; they are indexed in the folder of the report."""
    indexes: tuple[Path, ...] = ()
    """Index folders to use as they are; default, if `saes` is empty too: the bundled SAEs of `tiny`."""
    upstream: str | None = None
    """An SAE of an earlier layer's MLP."""
    text: jobs.CorpusChoice = field(default_factory=jobs.CorpusChoice)
    """The text that `saes` are indexed on."""

    def completed(self) -> "Inputs":
        """Return the inputs with the bundled subjects where nothing is named."""
        named = self if self.saes or self.indexes else replace(self, saes=TINY)
        if named.upstream is None and set(named.saes) & set(TINY):
            return replace(named, upstream=TINY_UPSTREAM)
        return named


@checked
def run(
    out: Output,
    inputs: Inputs | None = None,
    *,
    quick: bool = False,
    device: str = "cpu",
    overwrite: bool = False,
    studies: Sequence[Section] | None = None,
    on_progress: jobs.Progress | None = None,
    say: Callable[[str], None] = lambda _line: None,
) -> Report:
    """Run all studies on all SAEs, and write `report.json`, `report.html` and `report.md`.

    Args:
        out: folder of the report, and of finished work for the next run of the same command.
        inputs: the model, the SAEs and the corpus; default: the bundled ones.
        quick: a smoke test on small samples.
        device: device of the model.
        overwrite: discard the results of a run with other inputs in `out`.
        studies: studies to run; default: all of the registry.
        on_progress: called with progress.
        say: called with messages, a line each.

    Raises:
        HeadscopeError: for the inputs or the folder; a study's own errors become rows.
        KeyboardInterrupt: Ctrl-C; finished work is kept.
    """
    out, inputs = Path(out), (inputs or Inputs()).completed()
    settings = QUICK if quick else FULL
    if inputs.text.max_tokens is None:
        inputs = replace(inputs, text=replace(inputs.text, max_tokens=settings.corpus_tokens))
    work = _Work(out, inputs, settings, device, on_progress or (lambda _stage, _done, _total: None), say)
    work.claim(overwrite=overwrite)

    from headscope.report.registry import sections

    try:
        subjects = tuple(work.subject(*named, sections() if studies is None else studies) for named in work.named())
    except BaseException:
        work.give_up()
        raise
    return work.write(subjects)


@dataclass(frozen=True)
class _Work:
    """The folder of a report and the work to do in it."""

    out: Path
    inputs: Inputs
    settings: Settings
    device: str
    progress: jobs.Progress
    say: Callable[[str], None]

    # ---------------------------------------------------------------------------------------------------------- folder
    def claim(self, *, overwrite: bool) -> None:
        """Claim the folder for this report, or refuse it."""
        standing = (self.out / _PLAN).is_file()
        if not standing and self.out.exists() and not _is_empty(self.out):
            raise OutputError(
                f"{self.out} holds something else than a report",
                expected="a new or empty folder, or one of an earlier run",
                do="choose another folder",
            )
        self._check_inputs()
        plan = self._plan()
        if standing:
            if _read(self.out / _PLAN) == plan:
                return
            if not overwrite:
                raise OutputError(
                    f"{self.out} holds a report of other SAEs, text or settings",
                    expected="a new folder, or one of the same command",
                    do="choose another folder, or pass --overwrite to replace it",
                )
            for name in _KEPT:
                _remove(self.out / name)
        write_json(self.out / _PLAN, plan)

    def give_up(self) -> None:
        """Restore a folder in which nothing was done: a mistake in the command does not claim it."""
        if not any(path.is_file() for name in ("indexes", "studies") for path in (self.out / name).rglob("*")):
            for name in _KEPT:
                _remove(self.out / name)

    def _check_inputs(self) -> None:
        """Validate the inputs as far as possible without torch."""
        model, saes, upstream = self.inputs.model, self.inputs.saes, self.inputs.upstream
        if model:
            check_model(model)
        for sae in saes:
            check_sae(sae, of_z=True)
        if upstream:
            check_sae(upstream)
        if saes:
            check_text(self.inputs.text, model, sae=saes[0])
        check_device(self.device)

    def _plan(self) -> dict[str, Any]:
        """Return what must be equal for a run to reuse the work of another, whatever their working directories."""
        from headscope.index.columns import index_identity
        from headscope.index.reading import read_manifest
        from headscope.sae.formats import lasting_name, sae_hash

        model, upstream, corpus = self.inputs.model, self.inputs.upstream, self.inputs.text.corpus
        return {
            "model": model and lasting_model(model),
            "saes": [[lasting_name(name), sae_hash(name)] for name in self.inputs.saes],
            "indexes": [index_identity(read_manifest(path)) for path in self.inputs.indexes],
            "upstream": upstream and lasting_name(upstream),
            "text": asdict(self.inputs.text) | {"corpus": lasting_corpus(corpus)},
            "settings": asdict(self.settings),
        }

    def named(self) -> list[tuple[str, str | Path]]:
        """Name each SAE uniquely, in a form valid for files, with the location of it or its index.

        Raises:
            SAEError: the same one twice.
        """
        named: dict[str, str | Path] = {}
        for of in (*self.inputs.saes, *self.inputs.indexes):
            name = str(of) if isinstance(of, str) and not Path(of).exists() else Path(of).resolve().name
            name = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
            if of in named.values():
                raise SAEError(f"{of} twice", expected="each SAE once", do="name it once")
            while name in named:
                name += "_"
            named[name] = of
        return list(named.items())

    # -------------------------------------------------------------------------------------------------------- subjects
    def subject(self, name: str, of: str | Path, studies: Sequence[Section]) -> SubjectResult:
        """Index one SAE, choose its exemplars and run the studies."""
        from headscope.report.exemplars import choose
        from headscope.report.subject import Subject

        index = self._index(name, of)
        live = jobs.live(index, model=self.inputs.model, sae=of if isinstance(of, str) else None, device=self.device)
        identity = _identity(live.index, self.settings)
        kept = self.out / "studies" / name
        exemplars = _kept(kept / "exemplars.json", identity)
        if exemplars is None:
            chosen = choose(live.index, self.settings, on_progress=self._named(name))
            exemplars = {"exemplars": [asdict(e) for e in chosen]}
            write_json(kept / "exemplars.json", {"identity": identity} | exemplars)
        chosen = tuple(Exemplar.from_dict(e) for e in exemplars["exemplars"])
        subject = Subject(name, live, chosen, self.settings, self._upstream(live))
        results = tuple(self._study(subject, study, kept, identity) for study in studies)
        tokens = {t: subject.text(t) for e in chosen for t in (e.token, *e.sources)}
        return SubjectResult(name, _facts(live.index), chosen, results, tokens)

    def _index(self, name: str, of: str | Path) -> Path:
        """Open the index of an SAE: the given one, or one that is built here unless it exists."""
        if isinstance(of, Path):
            return of
        index = self.out / "indexes" / name
        if not (index / "manifest.json").is_file():
            jobs.index(
                [of],
                index,
                model=self.inputs.model,
                text=self.inputs.text,
                hardware=jobs.Hardware(self.device),
                on_progress=self._named(name),
            )
        return index

    def _named(self, name: str) -> jobs.Progress:
        return lambda stage, done, total: self.progress(f"{name}: {stage}", done, total)

    def _upstream(self, live: "LiveIndex") -> "SAE | None":
        return None if self.inputs.upstream is None else jobs.upstream_sae(live, self.inputs.upstream)

    def _study(self, subject: "Subject", study: Section, kept: Path, identity: str) -> StudyResult:
        """Return the results of one study, stored or computed."""
        own = _hash({"identity": identity, "study": study.name, "version": study.version})
        path = kept / f"{study.name}.json"
        standing = _kept(path, own) if study.kept else None
        if standing is not None:
            with suppress(KeyError, TypeError, ValueError):  # of another version: recomputed
                return StudyResult.from_dict(standing["result"])
        stage = f"{subject.name}: {study.name}"
        self.progress(stage, 0, 1)
        started = time.monotonic()
        subject = replace(subject, progress=lambda done, total: self.progress(stage, done, total))
        try:
            found = study.run(subject)
        except Exception as error:  # any exception: one study must not lose the others
            return self._failed(study, error, time.monotonic() - started)
        result = StudyResult(study.name, round(time.monotonic() - started, 2), tuple(found))
        self.progress(stage, 1, 1)
        write_json(path, {"identity": own, "result": result.as_dict()})
        return result

    def _failed(self, study: Section, error: Exception, seconds: float) -> StudyResult:
        """Return rows with the reason of a failure; the next run tries again."""
        if isinstance(error, HeadscopeError):
            why = f"{error.got}; expected: {error.expected}"
        else:
            why = f"the study failed: {type(error).__name__}: {error}"
        self.say(f"{study.name}: {why}")
        rows = tuple(Claim(i, study.question, "not measured", missing=why) for i in study.ids)
        return StudyResult(study.name, round(seconds, 2), rows, failed=why)

    # ---------------------------------------------------------------------------------------------------------- output
    def write(self, subjects: tuple[SubjectResult, ...]) -> Report:
        """Assemble the report and write its three files."""
        from headscope.report.render_html import html
        from headscope.report.render_markdown import markdown

        report = Report(
            version=version("headscope"),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            settings=asdict(self.settings),
            model=subjects[0].facts["model"],
            subjects=subjects,
        )
        write_json(self.out / "report.json", report.as_dict())
        for name, content in (("report.html", html(report)), ("report.md", markdown(report))):
            with atomic_write(self.out / name) as file:
                file.write(content.encode())
        return report


# -------------------------------------------------------------------------------------------------------------- keeping
def _identity(index: "FeatureIndex", settings: Settings) -> str:
    """Return all that a study's result depends on, besides the study itself."""
    from headscope.index.columns import index_identity

    return _hash({"index": index_identity(index.manifest), "settings": asdict(settings)})


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _kept(path: Path, identity: str) -> dict[str, Any] | None:
    """Read the results of an earlier run, if they are for the same inputs."""
    content = _read(path)
    return content if isinstance(content, dict) and content.get("identity") == identity else None


def _read(path: Path) -> Any:
    """Read one of our files; None where it is missing or unreadable."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _facts(index: "FeatureIndex") -> dict[str, Any]:
    """Return the facts on an index for the report."""
    manifest = index.manifest
    names = ("site", "layer", "z_convention", "dtype", "n_alive", "n_pairs", "l0")
    facts = {name: manifest[name] for name in names} | {"index_created": manifest["created"]}
    return facts | {name: shown(manifest[name]) for name in ("model", "sae", "corpus")}
