"""Other people's programs as judges of our numbers: they run in processes of their own, on files."""

import atexit
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import headscope.models
from headscope.models.hf import Model
from headscope.models.load import load_model
from headscope.site import Site
from shared import made_once

JUDGES = Path(__file__).parent / "judges"
TINY = Path(headscope.models.__file__).parent / "tiny"
PYTHIAS = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25}
LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
RANDOM: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-parallel": ("gpt_neox", {"use_parallel_residual": True, "rope_parameters": PYTHIAS}),
    "gpt2": ("gpt2", {}),
    **{name: (name, {}) for name in LIKE_LLAMA},
}
MODELS = [*RANDOM, "tiny"]


# ----------------------------------------------------------------------------------------------------------- processes
def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def judged_by(package: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark a test that asks this package, in a process of its own."""
    return lambda test: pytest.mark.judge(needs(package)(test))


@functools.cache
def _server() -> subprocess.Popen[str]:
    """The process that forks the judges of this test process; it ends when its input is closed."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(JUDGES / "server.py")]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    atexit.register(server.communicate)
    return server


def run_judge(name: str, *arguments: Path, library: str | None = "transformer_lens", path: Path | None = None) -> None:
    """Run a program of `judges/`, which asks a library; `path` is a folder of more packages."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.NamedTemporaryFile("r", prefix="headscope-judge-") as log:
        folders = [] if path is None else [str(path)]
        job = [str(JUDGES / name), [*map(str, arguments)], library, log.name, folders]
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        status = server.stdout.readline()
        assert status.strip() == "0", log.read()


# ------------------------------------------------------------------------------------------------------------- numbers
def assert_same_scale(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal within a share of the largest magnitude."""
    assert_close(got, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def random_tokens(model: Model, shape: tuple[int, int]) -> Tensor:
    tokens = torch.randint(1, model.spec.d_vocab, shape, generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = model.bos
    return tokens


# -------------------------------------------------------------------------------------------- TransformerLens' Bridge
@pytest.fixture(scope="module", params=MODELS, name="judged")
def of_transformerlens(
    request: pytest.FixtureRequest, random_model: Callable[..., Model], save_model: Callable[..., Path]
) -> tuple[Model, Tensor, dict[str, Tensor]]:
    """A model, tokens, and what TransformerLens computes with them: of all models in one process, once a run."""

    def make(root: Path) -> None:
        folders: list[Path] = []
        for name in MODELS:
            own = root / name
            own.mkdir()
            folder = TINY
            if name in RANDOM:
                family, changes = RANDOM[name]
                folder = save_model(random_model(family, **changes), own / "model")
            np.savez(own / "tokens.npz", tokens=random_tokens(load_model(str(folder)), (3, 48)).numpy())
            folders += [folder, own]
        run_judge("transformer_lens_bridge.py", *folders)

    own = made_once("transformer_lens_bridge", make) / request.param
    tokens = torch.from_numpy(np.load(own / "tokens.npz")["tokens"])
    theirs = {name: torch.from_numpy(value) for name, value in np.load(own / "judged.npz").items()}
    return load_model(str(own / "model" if request.param in RANDOM else TINY)), tokens, theirs


def named(site: Site, model: Model, judged: dict[str, Tensor]) -> Tensor | None:
    """What TransformerLens has at a site; unrotated queries and keys are not those that meet each other."""
    name = site.hook_name
    if site.kind in ("q", "k") and model.spec.family == "gpt2":
        name = name.replace("hook_rot_", "hook_")
    return judged.get(name)
