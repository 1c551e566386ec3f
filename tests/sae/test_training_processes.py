"""Trainings that are killed, and trainings by several processes together."""

import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

import training_worker
from headscope.corpus import Corpus
from headscope.models.hf import Model
from headscope.sae.config import Variant
from headscope.sae.formats import load_sae
from headscope.sae.runs import METRICS
from headscope.site import Site
from small_training import BATCH, D_HEAD, RECIPES, config, data, w_o
from training_worker import processes, run_job, run_job_as, run_rank, save_job, tensors

N_KILLS = 6
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
RANK_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
pytestmark = pytest.mark.slow


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


# ------------------------------------------------------------------------------------------------------------- killing
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(
    random_model: Callable[..., Model], random_corpus: Callable[..., Corpus], tmp_path: Path
) -> None:
    model = random_model("gpt_neox")
    shared = {"batch": BATCH, "tokens": BATCH * 150, "buffer": 512, "d_sae": 90, "dead_after": 5 * BATCH, "lr": 1e-2}
    shared["resample"] = 3
    recipes = {variant: config(variant=variant, **shared) for variant in get_args(Variant)}
    corpus = random_corpus(model, n_blocks=40, block_size=17)
    job = save_job(tmp_path / "job", model, corpus, Site("z", 1), recipes)
    folder, context, rng = tmp_path / "run", processes(), random.Random(0)
    whole = context.Process(target=run_job, args=(job, tmp_path / "uninterrupted", tmp_path / "expected", 1000))
    whole.start()
    whole.join(300)
    assert whole.exitcode == 0
    killed_at: list[set[str]] = []
    for _ in range(30):
        process = context.Process(target=run_job, args=(job, folder, tmp_path / "got", 3))
        process.start()
        seen = names(folder)
        while process.is_alive() and not names(folder) - seen:
            time.sleep(0.002)  # until it writes: a checkpoint is begun
        if len(killed_at) < N_KILLS:
            process.join(rng.choice([0.0, 0.003, 0.01, 0.03, 0.1]))
            process.kill()
        process.join(300)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        killed_at.append(names(folder))
    assert len(killed_at) == N_KILLS
    assert any(name.startswith("step-") for names in killed_at for name in names)
    assert contents(tmp_path / "got") == contents(tmp_path / "expected")
    assert b'"dead": 0.1' in (tmp_path / "expected" / "batchtopk.jsonl").read_bytes()  # resampling had something to do


# --------------------------------------------------------------------------------------------------------------- ranks
OF_RANKS: dict[str, dict[str, Any]] = RECIPES | {
    "relu after W_O": {"variant": "relu", "error_in": "output"},
    "relu, rare": {"variant": "relu", "dead_below": 0.03},
}


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Tensor]]]:
    """Of each recipe, the end of a training by one process, and by each of two."""
    folder = tmp_path_factory.mktemp("ranks")
    options = {"d_sae": 60, "dead_after": 4 * BATCH, "resample": 2, "tokens": 24 * BATCH, "lr": 1e-2, "warmup_steps": 4}
    recipes = {name: config(**options | changes) for name, changes in OF_RANKS.items()}
    batches = [data(BATCH, seed=step + 1) for step in range(24)]
    path = folder / "job"
    path.write_bytes(pickle.dumps((recipes, data(512), batches, w_o(), D_HEAD)))
    for size in (1, 2):
        started = [
            processes().Process(target=run_rank, args=(rank, size, folder / "meeting", path, folder))
            for rank in range(size)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(300)
            assert process.exitcode == 0
    runs = ((0, 1), (0, 2), (1, 2))
    return {name: [load_file(folder / f"{name} {r} of {n}.safetensors") for r, n in runs] for name in recipes}


@pytest.mark.parametrize("name", OF_RANKS)
def test_two_ranks_with_half_a_batch_each_are_one_with_the_whole(
    by_ranks: dict[str, list[dict[str, Tensor]]], name: str
) -> None:
    alone, first, second = by_ranks[name]
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key
    for key, tensor in alone.items():
        assert_close(first[key], tensor, **CLOSE, msg=lambda m, key=key: f"{key}: {m}")
    assert alone["n_resampled"] >= 5


def test_torchrun_trains_one_sae_and_ended_early_goes_on_with_it(
    random_model: Callable[..., Model], save_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = save_model(random_model("gpt_neox"), tmp_path / "model")
    text = tmp_path / "text"
    text.mkdir()
    for i in range(12):
        (text / f"{i}.txt").write_text("".join(chr(33 + (i * 7 + j * j) % 90) for j in range(300)))
    recipe = {"tokens": 64 * 400, "batch": 64, "buffer": 512, "d-sae": 24, "target-l0": 3, "block-size": 32}

    def start(out: str) -> subprocess.Popen[str]:
        options = {"model": model, "corpus": text, "out": tmp_path / out} | recipe
        arguments = ["train", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]
        command, pipe = [*TORCHRUN, "-m", "headscope", *arguments], subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=os.environ | RANK_ENVIRONMENT)

    first = start("out")
    metrics = tmp_path / "out.training" / f"{METRICS}.jsonl"
    while first.poll() is None and not metrics.exists():
        time.sleep(0.01)
    first.terminate()  # as a cluster does, some time before it kills
    said, errors = first.communicate(timeout=300)
    assert said.count("what was trained is saved, and the same command goes on") == 1, errors
    assert first.returncode != 0
    stopped_at = load_sae(tmp_path / "out").metadata["training"]["curve"][-1]["tokens"]
    assert 0 < stopped_at < 64 * 400
    assert names(tmp_path / "out.training")
    for out in ("out", "uninterrupted"):
        done = start(out)
        said, errors = done.communicate(timeout=300)
        assert done.returncode == 0, errors
        assert said.count("SAE: ") == 1
    resumed, whole = (load_sae(tmp_path / out) for out in ("out", "uninterrupted"))
    assert resumed.metadata["training"] == whole.metadata["training"]
    assert whole.metadata["training"]["curve"][-1]["tokens"] == 64 * 400
    for name, tensor in tensors(whole).items():
        assert tensor.isfinite().all()
        assert torch.equal(tensors(resumed)[name], tensor)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "text", "uninterrupted"]


def test_torchrun_goes_on_where_both_ranks_were_killed(
    random_model: Callable[..., Model], random_corpus: Callable[..., Corpus], tmp_path: Path
) -> None:
    model = random_model("gpt_neox")
    shared = {"batch": BATCH, "tokens": BATCH * 60, "buffer": 512, "d_sae": 90, "dead_after": 5 * BATCH, "lr": 1e-2}
    options = {"batchtopk": {}, "relu": {"dead_below": 0.03}}
    recipes = {variant: config(variant=variant, resample=3, **shared | more) for variant, more in options.items()}
    job = save_job(tmp_path / "job", model, random_corpus(model, n_blocks=40, block_size=17), Site("z", 1), recipes)
    known, folder, got = tmp_path / "known", tmp_path / "run", tmp_path / "got"
    known.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"} | RANK_ENVIRONMENT
    uninterrupted = (job, tmp_path / "uninterrupted", tmp_path / "expected", 1000, tmp_path)
    ranks = [processes().Process(target=run_job_as, args=(environment | {"RANK": r}, *uninterrupted)) for r in "01"]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        assert process.exitcode == 0
    arguments = [Path(training_worker.__file__), job, folder, got, 10, known]
    command = [*TORCHRUN, *map(str, arguments)]
    first = subprocess.Popen(command, env=os.environ | RANK_ENVIRONMENT, stderr=subprocess.DEVNULL)
    while first.poll() is None and not any(name.startswith("step-") for name in names(folder)):
        time.sleep(0.002)  # until there is a checkpoint
    assert first.poll() is None
    for rank in "01":
        os.kill(int((known / rank).read_text()), signal.SIGKILL)
    assert first.wait(300) != 0
    assert not got.exists()
    assert any(name.startswith("step-") for name in names(folder))
    saved = max(int(name.removeprefix("step-")) for name in names(folder) if name.startswith("step-"))
    subprocess.run(command, env=os.environ | RANK_ENVIRONMENT, timeout=300, check=True)
    assert {int((known / f"first-step-{rank}").read_text()) for rank in "01"} == {saved}
    assert contents(got) == contents(tmp_path / "expected")
