"""SAEs as files, against the programs whose formats they are: each opens the other's and computes the same."""

import fcntl
import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from headscope.models.hf import Model
from headscope.sae.formats import load_sae, save_sae
from headscope.sae.model import SAE
from headscope.site import Site
from judging import assert_same_scale, judged_by, run_judge

KINDS = ("relu", "jumprelu", "topk", "gated")


def assert_judged(root: Path, kind: str, name: str) -> None:
    """What is loaded of `root/kind/name` computes what stands in `root/kind/name.npz`, to 1e-6 of the largest."""
    x = torch.from_numpy(np.load(root / "x.npz")["x"])
    judged = np.load(root / kind / f"{name}.npz")
    sae = load_sae(root / kind / name, site=Site("z", 1))
    f = sae.encode(x)
    assert 0 < int((f > 0).sum()) < f.numel()
    assert_same_scale(f, torch.from_numpy(judged["f"]), 1e-6)
    assert_same_scale(sae.decode(f), torch.from_numpy(judged["x_hat"]), 1e-6)


def write_inputs(root: Path) -> None:
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    np.savez(root / "x.npz", x=x.numpy())


# --------------------------------------------------------------------------------------------------------- SAELens 6.54
@pytest.fixture(scope="module")
def judged_saes(
    random_model: Callable[..., Model], random_sae: Callable[..., SAE], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder of our SAEs and theirs, each with what SAELens encodes and decodes."""
    root = tmp_path_factory.mktemp("saes")
    model = random_model("gpt_neox")
    write_inputs(root)
    for activation in KINDS:
        for centred in (True, False):
            sae = random_sae(model, activation=activation, apply_b_dec_to_input=centred)
            save_sae(sae, root / "ours" / f"{activation}-{'centred' if centred else 'uncentred'}")
    save_sae(random_sae(model, activation="jumprelu"), root / "ours" / "jumprelu-bfloat16", dtype=torch.bfloat16)
    save_sae(random_sae(model, site=Site("mlp_out", 0)), root / "ours" / "mlp_out")
    run_judge("sae_lens_files.py", root, library="sae_lens")
    return root


OURS = [f"{a}-{c}" for a in KINDS for c in ("centred", "uncentred")]
THEIRS = [
    "standard",
    "standard-flat-uncentred",
    "jumprelu",
    "gated",
    "gated-uncentred",
    "topk",
    "topk-rescaled",
    "training-topk",
    "training-jumprelu",
    "training-batchtopk",
    "training-batchtopk-scaled",
    "training-matryoshka",
    "legacy-3-hook-point",
    "legacy-3-scaling-factor",
    "legacy-4-jumprelu",
    "legacy-5-topk",
    "legacy-5-scaled",
]


@judged_by("sae_lens")
@pytest.mark.parametrize("name", [*OURS, "jumprelu-bfloat16"])
def test_saelens_opens_what_is_saved_here(judged_saes: Path, name: str) -> None:
    assert_judged(judged_saes, "ours", name)


@judged_by("sae_lens")
def test_saelens_opens_an_sae_of_another_site(judged_saes: Path) -> None:
    judged = np.load(judged_saes / "ours" / "mlp_out.npz")
    x = torch.from_numpy(np.load(judged_saes / "x.npz")["x"])
    assert_same_scale(load_sae(judged_saes / "ours" / "mlp_out").encode(x), torch.from_numpy(judged["f"]), 1e-6)


@judged_by("sae_lens")
@pytest.mark.parametrize("name", THEIRS)
def test_what_saelens_saves_opens_here(judged_saes: Path, name: str) -> None:
    assert_judged(judged_saes, "theirs", name)


# -------------------------------------------------------------------------------- dictionary_learning 0.1, sparsify 1.3
PACKAGES = ("dictionary-learning==0.1.0", "eai-sparsify==1.3.3", "natsort==8.4.0", "schedulefree==1.4.1")
"""With the few packages they import that are not installed; what they pin clashes with what is, so it is left out."""


@pytest.fixture(scope="module")
def foreign_packages() -> Path:
    """A folder of packages for a process of its own, kept for other runs; skips where it cannot be made."""
    key = hashlib.sha256(repr((PACKAGES, sys.version_info[:2])).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir(), f"headscope-judges-{key}")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix="headscope-judges-"))
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(scratch), *PACKAGES]
            done = subprocess.run(pip, capture_output=True, text=True, check=False, timeout=300)
            if done.returncode != 0:
                pytest.skip(f"pip cannot install {', '.join(PACKAGES)}: {done.stderr.strip().splitlines()[-1:]}")
            scratch.rename(folder)
    return folder


@pytest.fixture(scope="module")
def judged_foreign(foreign_packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of SAEs of both libraries, each with what it encodes and decodes."""
    root = tmp_path_factory.mktemp("foreign")
    write_inputs(root)
    for name in ("dictionary_learning_files.py", "sparsify_files.py"):
        run_judge(name, root, library=None, path=foreign_packages)
    return root


@pytest.mark.judge
@pytest.mark.parametrize(
    "name",
    [
        "AutoEncoder",
        "AutoEncoder-unit",
        "AutoEncoderNew",
        "GatedAutoEncoder",
        "AutoEncoderTopK",
        "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
        "JumpReluAutoEncoder",
    ],
)
def test_what_dictionary_learning_saves_opens_here(judged_foreign: Path, name: str) -> None:
    assert_judged(judged_foreign, "dictionary_learning", name)


@pytest.mark.judge
@pytest.mark.parametrize("name", ["topk", "topk-unnormalised", "topk-num-latents"])
def test_what_sparsify_saves_opens_here(judged_foreign: Path, name: str) -> None:
    assert_judged(judged_foreign, "sparsify", name)
