"""Train many SAEs on one stream of activations and evaluate each on held-out text: Pareto curves of variants."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscope import jobs
from headscope.artefact import check_holds_only, check_run_folder, read_json
from headscope.errors import OutputError, TrainingError
from headscope.jobs.early import check_device, check_model, check_size, check_text
from headscope.jobs.inputs import loading
from headscope.limits import Layer, Name, Output, Tokens, checked
from headscope.sae.config import TrainConfig, Variant
from headscope.sae.metrics import Status
from headscope.sae.pareto import Pareto, Point
from headscope.sae.runs import METRICS, RUN, read_recipe, training_folder
from headscope.site import Kind, Site

if TYPE_CHECKING:
    from headscope.corpus import Corpus
    from headscope.models.hf import Model


@dataclass(frozen=True)
class SweepResult:
    """Result of a sweep; empty where it was interrupted."""

    pareto: Pareto | None
    interrupted: bool = False


def recipes(
    config: TrainConfig, variants: Sequence[Variant], target_l0s: Sequence[float | int]
) -> dict[str, TrainConfig]:
    """Make a recipe for each variant and target, by name: `relu-l0-8`.

    Raises:
        TrainingError: no variant or target, a fixed coefficient, which ignores the target, or an invalid recipe.
    """
    if not variants or not target_l0s:
        raise TrainingError(
            f"{len(variants)} variants and {len(target_l0s)} target L0s",
            expected="at least one of both",
            do="name them after --variants and --target-l0s",
        )
    if config.coefficient is not None:
        raise TrainingError(
            f"a coefficient of {config.coefficient:g} in a sweep over target L0s",
            expected="none: it is steered towards each target",
            do="pass --coefficient None",
        )
    return {
        f"{variant}-l0-{target:g}": replace(config, variant=variant, target_l0=float(target))
        for variant in variants
        for target in target_l0s
    }


@checked
def sweep(  # noqa: PLR0913 - one argument an option of the command
    out: Output,
    configs: Mapping[str, TrainConfig],
    *,
    model: Name = "tiny",
    text: jobs.CorpusChoice | None = None,
    eval_tokens: Tokens | None = None,
    site: Kind = "z",
    layer: Layer | None = None,
    hardware: jobs.Hardware | None = None,
    overwrite: bool = False,
    on_steps: Callable[[Mapping[str, Status]], None] | None = None,
    on_progress: jobs.Progress | None = None,
) -> SweepResult:
    """Train SAEs on one stream of activations, evaluate each on held-out text, and write `out/pareto.json`.

    The SAE of each recipe becomes the SAELens folder `out/NAME`, with its metrics and its quality. Checkpoints are in
    `out.training` until all are written: the same call resumes an interrupted sweep, and repeats no evaluation.

    Args:
        out: the parent folder of the SAE folders.
        configs: recipes by name, equal in everything that determines the stream. All are in memory together.
        model: the model that is read.
        text: training text; the evaluated text is the held-out part of the same.
        eval_tokens: number of tokens of that part; default: all.
        site: kind of activation.
        layer: layer of the site; default: the last.
        hardware: device and precision of the model.
        overwrite: start from scratch, replacing the SAEs of an earlier sweep.
        on_steps: called with the status of all SAEs after every step.
        on_progress: called as text is read and SAEs are evaluated.

    Raises:
        HeadscopeError: any of its kinds; nothing is computed before `out` is known to be free.
    """
    text = text or jobs.CorpusChoice(split="train")
    check_holds_only(out, {*configs, "pareto.json", "pareto.html"})
    check_model(model, layer)
    check_text(text, model)
    hardware = hardware or jobs.Hardware()
    with training_folder(out) as folder:
        going_on = set() if overwrite or not (folder / RUN).is_file() else set(read_recipe(folder)["names"])
        held = {} if overwrite else _held(out, configs, {*configs} - going_on)
        missing = {name: config for name, config in configs.items() if name not in held}
        if missing:
            check_size(missing.values(), model, site, hardware.device)
        check_device(hardware.device)
        for name in missing:
            check_run_folder(out / name, overwrite=overwrite or name in going_on, inputs=[model, text.corpus])

        with loading(model, on_progress):
            from headscope.sae.training.checkpoint import Checkpoints
            from headscope.sae.training.needs import check_memory
            from headscope.sae.training.ranks import Ranks

            kept = Checkpoints(folder, Ranks.joined())
            if not going_on:
                kept.clear()
            loaded = hardware.load(model)
        chosen = Site(site, loaded.spec.n_layers - 1 if layer is None else layer)
        loaded.check_layer(chosen.layer)
        if missing:
            check_memory(missing.values(), loaded.width(chosen), loaded.device)
        heldout = replace(text, split="heldout", max_tokens=eval_tokens).load(loaded, on_progress)
        corpus = text.load(loaded, on_progress)
        for name, metadata in held.items():
            _check_same(out / name, metadata, loaded, corpus, chosen)
        if missing and _train(out, loaded, corpus, chosen, missing, folder, on_steps, on_progress):
            return SweepResult(None, interrupted=True)
        kept.clear()
        if kept.ranks.rank:
            return SweepResult(None)
        del corpus
        points = []
        for i, (name, config) in enumerate(configs.items()):
            stage = f"{i + 1}/{len(configs)} {name}"
            points.append(_measured(out / name, loaded, heldout, config, on_progress, stage))
        pareto = Pareto(loaded.spec.name, chosen.hook_name, heldout.provenance(), tuple(points))
        pareto.write(out / "pareto.json")
        return SweepResult(pareto)


def _held(out: Path, configs: Mapping[str, TrainConfig], names: set[str]) -> dict[str, dict[str, Any]]:
    """Return the metadata of the finished SAEs of some recipes, by name."""
    return {name: metadata for name in names if (metadata := _trained(out / name, configs[name]))}


def _trained(folder: Path, config: TrainConfig) -> dict[str, Any] | None:
    """Return the metadata of a recipe's finished SAE in a folder; None where there is none."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        metadata = read_json(folder / "cfg.json")["metadata"]
        training = metadata["training"]
        if training["interrupted"] is False and _same(training["config"], config.as_dict()):
            return metadata
    return None


def _check_same(folder: Path, metadata: Mapping[str, Any], model: "Model", corpus: "Corpus", site: Site) -> None:
    """Check that an SAE of an earlier sweep was trained on the same model, corpus and site."""
    same = {
        "model": model.matches(metadata["model_hash"]),
        "text": metadata["corpus"]["hash"] == corpus.fingerprint(),
        "site": metadata["hook_name"] == site.hook_name,
    }
    for what, fits in same.items():
        if not fits:
            raise OutputError(
                f"{folder} holds an SAE of another {what}",
                expected=f"none, or one of this {what}",
                do="choose another folder, or pass --overwrite to train again",
            )


def _same(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return {**held, "cache": None} == {**wanted, "cache": None}


def _train(
    out: Path,
    model: "Model",
    corpus: "Corpus",
    site: Site,
    configs: Mapping[str, TrainConfig],
    folder: Path,
    on_steps: Callable[[Mapping[str, Status]], None] | None,
    on_progress: jobs.Progress | None,
) -> bool:
    """Train all SAEs and write them; return whether it was interrupted, and nothing was written."""
    from headscope.sae.formats import save_sae
    from headscope.sae.training.ranks import Ranks
    from headscope.sae.training.run import train_saes

    results = train_saes(model, corpus, site, configs, on_steps, folder=folder, on_progress=on_progress)
    if any(result.interrupted for result in results.values()):
        return True
    if Ranks.joined().rank == 0:
        for name, result in results.items():
            save_sae(result.sae, out / name, overwrite=True)
            shutil.copyfile(folder / f"{name}.jsonl", out / name / f"{METRICS}.jsonl")
    return False


def _measured(
    folder: Path,
    model: "Model",
    corpus: "Corpus",
    config: TrainConfig,
    on_progress: jobs.Progress | None,
    stage: str,
) -> Point:
    """Evaluate a trained SAE as a point of the curve; an existing measurement on the same text is reused."""
    from headscope.sae.formats import load_sae

    quality = jobs.measured_quality(folder, model, corpus)
    if quality is None:
        on_tokens = None if on_progress is None else lambda done, total: on_progress(stage, done, total)
        quality = jobs.measure(folder, load_sae(folder), model, corpus, on_tokens).as_dict()
    return Point.of(folder.name, quality, config.as_dict())
