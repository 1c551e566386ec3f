"""Trainings in processes of their own: what is to be trained is a file, so that each process trains the same."""

import multiprocessing
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from headscope.corpus import Corpus
from headscope.models.hf import Model
from headscope.sae.config import TrainConfig
from headscope.sae.metrics import Status
from headscope.sae.model import SAE
from headscope.sae.training.ranks import Ranks, together
from headscope.sae.training.run import train_saes
from headscope.sae.training.trainer import Trainer
from headscope.site import Site

OnSteps = Callable[[Mapping[str, Status]], None]


def processes() -> multiprocessing.context.ForkServerContext:
    """Processes that have this module imported already, and share nothing else with the tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def tensors(sae: SAE) -> dict[str, Tensor]:
    """All that an SAE computes with."""
    found = {name: getattr(sae, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    threshold = getattr(sae.activation, "threshold", None)
    return found if threshold is None else found | {"threshold": threshold}


# ----------------------------------------------------------------------------------------------------- whole trainings
def save_job(path: Path, model: Model, corpus: Corpus, site: Site, configs: Mapping[str, TrainConfig]) -> Path:
    """Write what `run_job` trains."""
    job = (model.module, model.tokenizer.to_str(), model.bos, model.spec.name, corpus, site, configs)
    path.write_bytes(pickle.dumps(job))
    return path


def run_job(path: Path, folder: Path, out: Path, every: int, on_steps: OnSteps | None = None) -> None:
    """Train, or go on with training, and write weights and metrics to a folder; of several ranks the first writes."""
    torch.set_num_threads(1)
    module, tokenizer, bos, name, corpus, site, configs = pickle.loads(path.read_bytes())
    model = Model(module, Tokenizer.from_str(tokenizer), bos, name)
    results = train_saes(model, corpus, site, configs, on_steps, folder=folder, checkpoint_every=every)
    for trained, result in results.items() if Ranks.joined().rank == 0 else ():
        out.mkdir(exist_ok=True)
        save_file(tensors(result.sae), out / f"{trained}.safetensors")
        (out / f"{trained}.jsonl").write_text((folder / f"{trained}.jsonl").read_text())


# --------------------------------------------------------------------------------------------------------------- ranks
def run_rank(rank: int, size: int, meeting: Path, path: Path, out: Path) -> None:
    """Train several recipes on given rows, of which each rank takes its part of each batch."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    recipes, samples, batches, W_O, d_head = pickle.loads(path.read_bytes())  # noqa: N806 - the field's name
    for name, config in recipes.items():
        trainer = Trainer(samples, config, W_O=W_O, d_head=d_head, ranks=Ranks.joined())
        trainer.p["b_enc"][:5] = -1e6  # these cannot fire
        n_resampled, statuses = 0, []
        for x in batches:
            statuses.append(trainer.step(x.chunk(size)[rank]))
            if trainer.step_number in config.resampled_at:
                n_resampled += trainer.resample(samples)
        state = {key: value for key, value in trainer.state().items() if isinstance(value, Tensor)}
        numbers = {"coefficient": trainer.coefficient, "threshold": trainer.threshold, "n_resampled": n_resampled}
        numbers |= {f"{key} {i}": getattr(s, key) for i, s in enumerate(statuses) for key in ("squared_error", "l0")}
        state |= {key: torch.tensor(float(value), dtype=torch.float64) for key, value in numbers.items()}
        save_file(state, out / f"{name} {rank} of {size}.safetensors")
    if size > 1:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------ torchrun
def run_job_together(path: Path, folder: Path, out: Path, every: int, known: Path) -> None:
    """`run_job` by the processes of which this is one; what each is and began with is written to `known`."""
    rank = os.environ["RANK"]
    first = known / f"first-step-{rank}"
    first.unlink(missing_ok=True)

    def on_steps(statuses: Mapping[str, Status]) -> None:
        if not first.exists():
            first.write_text(str(min(status.step for status in statuses.values())))

    (known / rank).write_text(str(os.getpid()))
    with together("cpu"):
        run_job(path, folder, out, every, on_steps)


def run_job_as(environment: Mapping[str, str], path: Path, folder: Path, out: Path, every: int, known: Path) -> None:
    """The same in an environment such as torchrun makes."""
    os.environ |= environment
    run_job_together(path, folder, out, every, known)


if __name__ == "__main__":
    job, training, written, steps, known = sys.argv[1:]
    run_job_together(Path(job), Path(training), Path(written), int(steps), Path(known))
