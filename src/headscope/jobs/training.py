"""Train an SAE, from names and paths to a complete folder, resuming after interruptions."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from headscope.artefact import check_run_folder, read_json
from headscope.errors import OutputError
from headscope.jobs.early import check_device, check_model, check_size, check_text
from headscope.jobs.inputs import CorpusChoice, Hardware, Progress, loading
from headscope.limits import Layer, Name, Output, checked
from headscope.sae.config import TrainConfig
from headscope.sae.metrics import Status
from headscope.sae.runs import METRICS, RUN, training_folder
from headscope.site import Kind, Site

if TYPE_CHECKING:
    from headscope.sae.training.run import TrainResult


@checked
def train(  # noqa: PLR0913 - one argument an option of the command
    out: Output,
    *,
    model: Name = "tiny",
    text: CorpusChoice | None = None,
    site: Kind = "z",
    layer: Layer | None = None,
    config: TrainConfig | None = None,
    hardware: Hardware | None = None,
    overwrite: bool = False,
    on_step: Callable[[Status], None] | None = None,
    on_progress: Progress | None = None,
) -> "TrainResult":
    """Train an SAE and write it to `out`, a SAELens folder; `layer` None is the last.

    Checkpoints are kept in `out.training` until it is done: the same call resumes an interrupted run. After Ctrl-C or
    SIGTERM the partly trained SAE is written too, and the result says `interrupted`; before the first step,
    KeyboardInterrupt is raised. In a process group all ranks train one SAE, and the first writes it.

    Raises:
        HeadscopeError: any of its kinds; nothing is computed before `out` is known to be free and not being trained
            into by another process.
    """
    text, config = text or CorpusChoice(split="train"), config or TrainConfig()
    with training_folder(out) as folder:
        going_on = (folder / RUN).is_file() and not overwrite
        overwrite = overwrite or (going_on and _is_of_this_training(out, config))
        check_run_folder(out, overwrite=overwrite, inputs=[model, text.corpus])
        check_model(model, layer)
        check_text(text, model)
        hardware = hardware or Hardware()
        check_size([config], model, site, hardware.device)
        check_device(hardware.device)

        with loading(model, on_progress):
            from headscope.sae.training.checkpoint import Checkpoints
            from headscope.sae.training.needs import check_memory
            from headscope.sae.training.ranks import Ranks
            from headscope.sae.training.run import train_sae

            kept = Checkpoints(folder, Ranks.joined())
            if not going_on:
                kept.clear()
            loaded = hardware.load(model)
        chosen = Site(site, loaded.spec.n_layers - 1 if layer is None else layer)
        loaded.check_layer(chosen.layer)
        check_memory([config], loaded.width(chosen), loaded.device)
        corpus = text.load(loaded, on_progress)
        result = train_sae(loaded, corpus, chosen, config, on_step, folder=folder, on_progress=on_progress)
        if kept.ranks.rank == 0:
            _write(result, folder, out, overwrite=overwrite)
        if not result.interrupted:
            kept.clear()
        return result


def _write(result: "TrainResult", folder: Path, out: Path, *, overwrite: bool) -> None:
    """Write an SAE and its metrics to `out`, or else to the temporary folder, so that a training is not lost.

    Raises:
        OutputError: the latter; it says where the SAE is.
    """
    from headscope.sae.formats import save_sae

    try:
        save_sae(result.sae, out, overwrite=overwrite)
        shutil.copyfile(folder / f"{METRICS}.jsonl", out / f"{METRICS}.jsonl")
    except (OutputError, OSError) as error:
        rescue = save_sae(result.sae, Path(tempfile.mkdtemp(prefix="headscope-"), out.name))
        raise OutputError(
            f"{out} could not be written ({error.__cause__ or error})",
            expected="the folder to stay writable, on a disk with room",
            do=f"move what was trained from {rescue}",
        ) from error


def _is_of_this_training(sae: Path, config: TrainConfig) -> bool:
    """Whether a folder holds an SAE whose training was ended early, or before its checkpoints were removed."""
    try:
        held = read_json(sae / "cfg.json")["metadata"]["training"]
        return held["interrupted"] is True or held["config"] == config.as_dict()
    except (OSError, ValueError, KeyError, TypeError):
        return False
