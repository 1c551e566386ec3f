"""Build indexes: process a corpus in parts, merge the parts, and rerun the shown examples for their sources.

The build takes place in a folder `<out>.partial` next to the future index:

    plan.json              the configuration of the build; a build with another plan refuses to resume
    shared/                per part: token counts, losses
    <number>/pairs/        per part and SAE: active pairs sorted by latent, sums by latent (`passes.read_part`)
    <number>/sweep/        one part: distributions and the choice of examples (`sweep.sweep`)
    <number>/examples/     per part: DFA by head and source of the chosen examples (`passes.read_examples`)
    values-<layer>/        per part of the vocabulary: the value of each token alone (`vocabulary.read_values`)
    final/                 the index; moved to its place when complete

Ranks share the parts; the first merges them. If killed at any moment, the same command resumes from the finished parts.
Memory is bounded for any corpus: a batch, a part, a range of rows, and tables with one row per latent.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headscope.artefact import check_output, file_hash, read_json, write_json
from headscope.capture import check_corpus
from headscope.corpus import Corpus
from headscope.errors import CorpusError, IndexFormatError, ModelError, OutputError, SAEError
from headscope.index import labels, tables, writing
from headscope.index.config import CARRIED, DEFINITIONS, FORMAT_VERSION, N_CORRELATED, IndexPlan
from headscope.index.correlations import most_correlated
from headscope.index.parts import Parts, SortedParts, Workers, leave_after_first, leave_first, locked, plan_of
from headscope.index.passes import Subject, read_examples, read_part, subjects_of
from headscope.index.readers import OnBatch, Readers
from headscope.index.sweep import Distributions, Groups, chosen_pairs, sweep, top_tokens
from headscope.index.token_texts import described
from headscope.index.vocabulary import TokenValues, n_parts_of, read_values, tokens_of
from headscope.models.hf import Model
from headscope.names import relative
from headscope.sae.convert import FORCED, check_fits
from headscope.sae.formats import WEIGHTS, save_sae
from headscope.sae.model import SAE
from headscope.scratch import move_into_place
from headscope.site import check_z
from headscope.tokens import Spelling

_POLL_SECONDS = 0.2
Progress = Callable[[str, int, int], None]
"""Progress callback: called with the stage, the work done and the total."""


@dataclass(frozen=True)
class SAERecord:
    """Record of the SAE's file in an index."""

    name: str
    """Name that finds it from any working directory: a path is absolute."""
    hash: str
    """Hash of its weights."""
    quality: dict[str, Any] | None = None
    """`Quality.as_dict()`, if it was measured."""


def check_indexable(model: Model) -> None:
    """Reject a model whose z cannot be indexed.

    Raises:
        ModelError: it is in half precision, or its z is not `pattern @ v`.
    """
    model.check_mixed()
    if model.module.dtype not in (torch.float32, torch.float64):
        raise ModelError(
            f"{model.spec.name} in {model.module.dtype}",
            expected="float32 or float64, in which DFA sums to the pre-activation",
            do="load it in float32",
        )


def build_index(
    model: Model,
    saes: Sequence[tuple[SAE, SAERecord]],
    corpus: Corpus,
    folder: Path,
    *,
    overwrite: bool = False,
    plan: IndexPlan | None = None,
    workers: Workers | None = None,
    on_progress: Progress | None = None,
) -> list[Path]:
    """Index every feature of some z SAEs on a corpus, in one pass over it.

    Args:
        model: the model the SAEs were trained on.
        saes: SAEs of the z of its layers, with the manifest's records of their files.
        corpus: what to read; statistics are over its text tokens.
        folder: the index, or the parent folder of one index per SAE when there are several; written whole or not at
            all.
        overwrite: replace existing output and the partial results of a different build; a build of the same index is
            resumed.
        plan: what to store.
        workers: rank and number of processes; the first one returns when the index is complete.
        on_progress: called with progress.

    Returns:
        The index folders, in the order of the SAEs.

    Raises:
        SAEError: not a z SAE, or of a width other than that of the model's z; or two of one name.
        CorpusError, ModelError: the corpus or the layer does not fit the model, which must be in float32 or float64.
        OutputError: the folder is not empty, cannot be written, or is being built by another process.
        IndexFormatError: DFA does not sum to the pre-activation, or activations are not finite.
    """
    check_indexable(model)
    for sae, _ in saes:
        check_fits(sae, model)
        check_z(sae.site.hook_name)
    check_corpus(model, corpus)
    if corpus.n_text_tokens == 0:
        raise CorpusError(f"{corpus.blocks.size} tokens, none of them text", expected="text", do="index another corpus")
    check_output(folder, overwrite=overwrite)
    build = _Build(model, saes, corpus, Path(folder), plan or IndexPlan(), workers or Workers())
    try:
        with locked(build.partial, build.workers):
            build.claim(overwrite=overwrite)
            build.run(on_progress or (lambda _stage, _done, _total: None), overwrite=overwrite)
    except OSError as error:
        raise OutputError(
            f"cannot write {build.partial}: {error.strerror or error}",
            expected="a folder that can be written, on a disk with room",
            do="free some space and run the same command again: it goes on with what stands there",
        ) from error
    return build.outputs


class _Build:
    """A build and its folder."""

    def __init__(
        self,
        model: Model,
        saes: Sequence[tuple[SAE, SAERecord]],
        corpus: Corpus,
        folder: Path,
        plan: IndexPlan,
        workers: Workers,
    ) -> None:
        self.model, self.corpus, self.folder, self.plan, self.workers = model, corpus, folder, plan, workers
        self.given = [sae for sae, _ in saes]
        self.saes = [sae.to(model.device).to(model.module.dtype) for sae in self.given]
        self.records = [record for _, record in saes]
        self.partial = folder.with_name(f"{folder.name}.partial")
        self.final = self.partial / "final"
        self.names = [""] if len(saes) == 1 else [Path(record.name).name for record in self.records]
        if len(set(self.names)) < len(self.names):
            raise SAEError(
                f"SAEs named {', '.join(self.names)}", expected="different names", do="rename one of the folders"
            )
        self.outputs = [folder / name for name in self.names]
        self.model_hash, self.corpus_hash = model.fingerprint(), corpus.fingerprint()
        self._blocks_a_part = max(1, plan.part_tokens // corpus.block_size)
        self.n_parts = -(-len(corpus.blocks) // self._blocks_a_part)
        self._shared = Parts(self.partial / "shared", self.n_parts)
        self._checked: dict[int, SortedParts] = {}
        self._readers = Readers(model)

    def _parts(self, number: int, stage: str) -> Parts:
        return Parts(self.partial / str(number) / stage, 1 if stage == "sweep" else self.n_parts)

    def _pairs(self, number: int) -> SortedParts:
        """Return all pairs of an SAE; their checksums are read once."""
        if number not in self._checked:
            self._checked[number] = SortedParts(self._parts(number, "pairs"))
        return self._checked[number]

    # ---------------------------------------------------------------------------------------------------------- claim
    def claim(self, *, overwrite: bool) -> None:
        """Claim the build folder, or resume an interrupted build of the same plan in it."""
        wanted = {
            "format_version": FORMAT_VERSION,
            "headscope": version("headscope"),
            "model": self.model_hash,
            "saes": [[record.name, record.hash] for record in self.records],
            "corpus": self.corpus_hash,
            "plan": self.plan.as_dict(),
        }
        path = self.partial / "plan.json"
        if self.workers.rank:
            while not path.is_file() or read_json(path) != wanted:
                time.sleep(_POLL_SECONDS)
            return
        found = plan_of(self.partial)
        if found == wanted:
            return
        if found is not None and not overwrite:
            other = [name for name in wanted if found.get(name) != wanted[name]]
            raise OutputError(
                f"{self.partial} holds an interrupted build with another {', '.join(other)}",
                expected="none, or one of the same index",
                do="finish that one, choose another --out, or pass --overwrite to start again",
            )
        for child in self.partial.iterdir():
            if child.is_dir():
                shutil.rmtree(child)
        write_json(path, wanted)

    # ------------------------------------------------------------------------------------------------------------ run
    def run(self, report: Progress, *, overwrite: bool) -> None:
        """Run all stages; the first rank does what must be done once."""
        first = self.workers.rank == 0
        if not (self.final / "whole").is_file():
            subjects = subjects_of(self.model, self.saes, self.corpus)
            self._read_pairs(subjects, report)
            for number in range(len(subjects)):
                if first:
                    self._sweep(number, report)
                self._parts(number, "sweep").wait()
            self._read_examples(subjects, report)
            self._read_vocabulary({subject.layer for subject in subjects}, report)
            if first:
                for number, subject in enumerate(subjects):
                    self._write(number, subject, report)
                if len(self.names) > 1:
                    write_json(self.final / "manifest.json", {"indexes": self.names})
                (self.final / "whole").touch()
        if not first:
            leave_after_first(self.partial, self.workers, self.partial / "plan.json")
        else:
            leave_first(self.partial, self.workers)
            self._finish(overwrite=overwrite)

    def _finish(self, *, overwrite: bool) -> None:
        """Move the index to its place and clear the build folder."""
        check_output(self.folder, overwrite=overwrite)  # it may have been filled in the meantime
        for name, output in zip(self.names, self.outputs, strict=True):
            said = output / labels.FILE
            if said.is_file() and not said.is_symlink():  # made by people, who must not be asked again
                shutil.copyfile(said, self.final / name / labels.FILE)
        (self.final / "whole").unlink()
        try:
            move_into_place(self.final, self.folder)
        except OSError:
            (self.final / "whole").touch()
            raise
        for child in self.partial.iterdir():
            if child.is_dir():
                shutil.rmtree(child, ignore_errors=True)  # before the plan, which marks the rest as left by a build
        shutil.rmtree(self.partial, ignore_errors=True)

    def _blocks(self, part: int) -> np.ndarray:
        start = part * self._blocks_a_part
        return np.arange(start, min(start + self._blocks_a_part, len(self.corpus.blocks)))

    def _read_pairs(self, subjects: Sequence[Subject], report: Progress) -> None:
        stages = [self._parts(number, "pairs") for number in range(len(subjects))]
        for stage in stages:
            stage.discard_damaged(self.workers.own(self.n_parts))

        standing = set.intersection(*(set(stage.present()) for stage in stages))
        for part in self.workers.own(self.n_parts):
            if part not in standing:
                self._shared.discard(part)

        def read(model: Model, part: int, on_batch: OnBatch) -> None:
            found, shared = read_part(model, subjects, self.corpus, self._blocks(part), self.plan, on_batch)
            for stage, arrays in zip(stages, found, strict=True):
                stage.write(part, arrays)
            self._shared.write(part, shared)  # last: it exists only when all of the part does

        self._read("activations", self._shared, read, self._n_blocks, report)
        self._shared.wait()
        if self.workers.world > 1:  # a part found damaged by another process is missing until it is remade
            for stage in stages:
                stage.wait()

    def _n_blocks(self, part: int) -> int:
        return len(self._blocks(part))

    def _read(
        self,
        name: str,
        stage: Parts,
        read: Callable[[Model, int, OnBatch], None],
        size: Callable[[int], int],
        report: Progress,
    ) -> None:
        """Read the missing parts of a stage; `size` is the number of blocks, or tokens, of a part."""
        missing = stage.missing(self.workers)
        total = sum(map(size, missing))
        report(name, 0, total)
        self._readers.each(missing, read, lambda done: report(name, done, total))
        report(name, total, total)  # blocks without an example are not read again

    def _sweep(self, number: int, report: Progress) -> None:
        """Merge the pairs: `final/activations`, distributions, and the choice of examples."""
        stage = self._parts(number, "sweep")
        stage.discard_damaged([0])
        folder = self.final / self.names[number] / "activations"
        hashes = self.partial / str(number) / "activations.json"
        if stage.present() and hashes.is_file() and _hashes(folder) == read_json(hashes):
            return
        shutil.rmtree(stage.folder, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        pairs = self._pairs(number)
        writer = writing.ActivationWriter(folder, self.model.spec.n_heads)
        d_sae = self.saes[number].d_sae
        totals = self._totals(pairs)
        distributions, groups = sweep(
            pairs,
            totals.maximum,
            totals.mean,
            self.corpus.blocks,
            self.plan,
            writer,
            lambda done: report("features", done, d_sae),
        )
        writer.finish()
        write_json(hashes, _hashes(folder))
        stage.write(0, {**vars(distributions), **{f"group_{name}": column for name, column in vars(groups).items()}})

    def _swept(self, number: int) -> tuple[Distributions, Groups]:
        arrays = self._parts(number, "sweep").read(0)
        groups = {name.removeprefix("group_"): array for name, array in arrays.items() if name.startswith("group_")}
        plain = {name: array for name, array in arrays.items() if not name.startswith("group_")}
        return Distributions(**plain), Groups(**groups)

    def _read_examples(self, subjects: Sequence[Subject], report: Progress) -> None:
        for number, subject in enumerate(subjects):
            stage = self._parts(number, "examples")
            chosen = subject, stage, *chosen_pairs(self._swept(number)[1])
            self._read("sources", stage, partial(self._read_examples_of, chosen), self._n_blocks, report)
            if self.workers.rank == 0:
                stage.wait()

    def _read_examples_of(
        self, chosen: tuple[Subject, Parts, np.ndarray, np.ndarray], model: Model, part: int, on_batch: OnBatch
    ) -> None:
        subject, stage, latent, position = chosen
        blocks = self._blocks(part)
        bounds = np.array([blocks[0], blocks[-1] + 1]) * self.corpus.block_size
        own = slice(*np.searchsorted(position, bounds))
        found = read_examples(model, subject, self.corpus, latent[own], position[own], self.plan, on_batch)
        stage.write(part, found)

    def _values(self, layer: int) -> Parts:
        return Parts(self.partial / f"values-{layer}", n_parts_of(self.model.spec.d_vocab))

    def _read_vocabulary(self, layers: set[int], report: Progress) -> None:
        for layer in sorted(layers):
            stage = self._values(layer)
            self._read("vocabulary", stage, partial(self._read_values, layer), self._n_tokens, report)
            if self.workers.rank == 0:
                stage.wait()

    def _read_values(self, layer: int, model: Model, part: int, on_batch: OnBatch) -> None:
        self._values(layer).write(part, read_values(model, layer, part))
        on_batch(self._n_tokens(part))

    def _n_tokens(self, part: int) -> int:
        return len(tokens_of(part, self.model.spec.d_vocab))

    # ---------------------------------------------------------------------------------------------------------- write
    def _write(self, number: int, subject: Subject, report: Progress) -> None:
        """Write one index except for its activations, which the sweep wrote."""
        model, corpus, n_heads = self.model, self.corpus, self.model.spec.n_heads
        folder = self.final / self.names[number]
        for path in folder.iterdir():  # leftovers of an interrupted build must not enter the manifest
            if path.is_file():
                path.unlink()
        shutil.rmtree(folder / CARRIED, ignore_errors=True)
        shared = {name: self._total(name) for name in ("token_counts", "source_pairs")}
        pairs = self._pairs(number)
        totals = self._totals(pairs)
        distributions, groups = self._swept(number)
        correlated = most_correlated(
            pairs, *totals.over_all_tokens(), totals.n_tokens, N_CORRELATED, partial(report, "correlations")
        )
        example_tokens = top_tokens(groups, corpus.blocks, subject.sae.d_sae)
        values = TokenValues(self._values(subject.layer))
        features = tables.feature_table(
            model, subject, totals, distributions, correlated, example_tokens, values, report
        )
        report("write", number, len(self.names))
        sources, source_totals = tables.source_tables(model, pairs, shared, self.plan)
        nulls = tables.null_table(subject, pairs, n_heads)
        writing.write_corpus(folder, corpus, model, self._losses if self.plan.losses else None)
        writing.write_table(folder / "features.parquet", features)
        writing.write_table(folder / "sources.parquet", sources, small_groups=True)
        writing.write_table(folder / "source_totals.parquet", source_totals)
        writing.write_table(folder / "nulls.parquet", nulls)
        writing.write_table(folder / "groups.parquet", tables.group_table(groups, totals), small_groups=True)
        examples = SortedParts(self._parts(number, "examples"))
        tables.write_examples(folder, examples, corpus.block_size, self.plan.range_rows // 16, n_heads)
        model.tokenizer.save(str(folder / "tokenizer.json"))
        manifest: dict[str, Any] = self._manifest(number, subject, totals) | {"files": _hashes(folder)}
        if self.plan.carry_sae:
            carried = save_sae(self.given[number], folder / CARRIED, place=self.outputs[number] / CARRIED)
            manifest["sae"]["carried"] = file_hash(carried / WEIGHTS)
        write_json(folder / "manifest.json", manifest)
        report("write", number + 1, len(self.names))

    def _totals(self, pairs: SortedParts) -> tables.Totals:
        return tables.Totals.of(pairs, self.model.spec.n_heads, int(self._total("n_tokens")[0]))

    def _total(self, name: str) -> np.ndarray:
        return np.sum([self._shared.read(part, [name])[name] for part in range(self.n_parts)], axis=0)

    def _losses(self, start: int, stop: int) -> np.ndarray:
        """Return the losses of blocks start to stop - 1."""
        size = self._blocks_a_part
        pieces = []
        for part in range(start // size, (stop - 1) // size + 1):
            losses = self._shared.read(part, ["losses"])["losses"]
            pieces.append(losses[max(0, start - part * size) : stop - part * size])
        return np.concatenate(pieces)

    def _manifest(self, number: int, subject: Subject, totals: tables.Totals) -> dict[str, Any]:
        """Make the manifest of an index."""
        model, corpus, record, sae = self.model, self.corpus, self.records[number], subject.sae
        n_pairs = int(totals.n_active.sum())
        active = int(self._pairs(number).totals("n_active_tokens").sum())
        if n_pairs != active:
            raise IndexFormatError(
                f"{n_pairs} activations, but {active} were counted while reading",
                expected="the same number",
                do="build the index again; if it stays so, please report it",
            )
        return {
            "format_version": FORMAT_VERSION,
            "headscope": version("headscope"),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "site": sae.site.hook_name,
            "layer": sae.site.layer,
            "z_convention": _convention(sae),
            "special_tokens": "left out of all statistics",
            "bos": corpus.provenance()["bos"],
            "spelling": described(Spelling.of(model.tokenizer)),
            "dtype": str(model.module.dtype).removeprefix("torch."),
            "model": {
                "name": model.spec.name,
                "relative": relative(model.spec.name, self.outputs[number]),
                "hash": self.model_hash,
                "n_layers": model.spec.n_layers,
                "n_heads": model.spec.n_heads,
                "d_head": model.spec.d_head,
                "d_model": model.spec.d_model,
                "d_vocab": model.spec.d_vocab,
            },
            "sae": {
                "name": record.name,
                "relative": relative(record.name, self.outputs[number]),
                "hash": record.hash,
                "architecture": sae.activation.name,
                "kind": sae.kind,
                "d_in": sae.d_in,
                "d_sae": sae.d_sae,
                "trained_on": sae.metadata.get("corpus"),
            }
            | ({FORCED: sae.metadata[FORCED]} if FORCED in sae.metadata else {}),
            "corpus": {
                "name": corpus.name,
                "split": corpus.split,
                "hash": self.corpus_hash,
                "n_tokens": totals.n_tokens,
                "n_blocks": len(corpus.blocks),
                "block_size": corpus.block_size,
                "n_documents": len(corpus.documents),
                "reading": dict(corpus.reading),
            },
            "plan": self.plan.as_dict(),
            "thresholds": list(self.plan.thresholds),
            "n_alive": int((totals.n_active > 0).sum()),
            "n_pairs": n_pairs,
            "l0": n_pairs / totals.n_tokens,
            "quality": record.quality,
            "definitions": DEFINITIONS,
        }


def _convention(sae: SAE) -> str:
    """Return the convention of its activations according to its files."""
    said = sae.metadata.get("z_convention", "not stated; read as raw")
    converted = sae.metadata.get("converted")
    return f"{said}, converted from {converted['from']}" if converted else said


def _hashes(folder: Path) -> dict[str, list]:
    """Return bytes and SHA-256 of each file of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): [path.stat().st_size, file_hash(path)] for path in files}
