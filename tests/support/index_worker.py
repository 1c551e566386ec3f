"""Builds in processes of their own: what is to be built is a file, so that each process builds the same."""

import multiprocessing
import pickle
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

from headscope.index.build import SAERecord, build_index
from headscope.index.config import IndexPlan
from headscope.index.parts import Workers
from headscope.models.hf import Model


def save_job(path: Path, model: Model, saes: dict, corpus, plan: IndexPlan) -> Path:
    """Write what `run_job` builds."""
    job = (model.module, model.tokenizer.to_str(), model.bos, model.spec.name, saes, corpus, plan)
    path.write_bytes(pickle.dumps(job))
    return path


def run_job(path: Path, out: Path, workers: Workers | None = None, *, overwrite: bool = False) -> None:
    """Build it."""
    torch.set_num_threads(1)
    module, tokenizer, bos, name, saes, corpus, plan = pickle.loads(Path(path).read_bytes())
    model = Model(module, Tokenizer.from_str(tokenizer), bos, name)
    records = [(sae, SAERecord(sae_name, f"sha256:{sae_name}")) for sae_name, sae in saes.items()]
    build_index(model, records, corpus, out, plan=plan, workers=workers, overwrite=overwrite)


def processes() -> multiprocessing.context.ForkServerContext:
    """Processes that have this module imported already, and share nothing else with the tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


if __name__ == "__main__":
    run_job(Path(sys.argv[1]), Path(sys.argv[2]), Workers.of_environment())
