"""The Triton kernels: interpreted and compiled, both in processes of their own, and on a GPU where there is one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from headscope.errors import TrainingError
from headscope.sae.training import kernels

HERE = Path(__file__).parents[1] / "support"
KERNELS = {"_round_rows", "_propose", "_write_pairs", "_dot_pairs", "_sum_bags"}
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (it exists for Linux alone)"
)


def run(*arguments: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env=os.environ | variables,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@needs_triton
def test_in_the_interpreter() -> None:
    """Every test of `interpreted_kernels.py`."""
    said = run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted_kernels.py"), TRITON_INTERPRET="1"
    )
    assert " passed" in said
    assert "skipped" not in said


@pytest.mark.slow
@needs_triton
def test_every_kernel_compiles_for_hopper(tmp_path) -> None:
    said = run(str(HERE / "compiled_kernels.py"), TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    n_tensor_core = {name: int(n) for name, n in (line.split() for line in said.splitlines())}
    assert set(n_tensor_core) == KERNELS
    assert n_tensor_core["_propose"] > 0


def test_without_triton_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "headscope.sae.training.triton_kernels", raising=False)
    with pytest.raises(TrainingError, match=r"headscope\[gpu\]"):
        importlib.import_module("headscope.sae.training.triton_kernels")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_says_that_it_needs_a_gpu() -> None:
    script = HERE.parents[1] / "benchmarks" / "gpu_step.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    assert done.stderr.startswith("no GPU\n  expected:")


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(("batch", "d_in", "d_sae"), [(4096, 512, 16_384), (4095, 130, 5_000)])
def test_on_a_gpu_they_give_what_the_eager_functions_give(batch, d_in, d_sae, monkeypatch) -> None:
    from headscope.sae.training import triton_kernels

    monkeypatch.setattr(kernels, "gpu_kernels", lambda _like: None)
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(batch, d_in, generator=g, device="cuda")
    w = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=g, device="cuda"), dim=1)
    bias = torch.full((d_sae,), -3.0, device="cuda")  # one pair in 740
    exact = torch.addmm(bias.double(), x.double(), w.double().T)
    got, pre = triton_kernels.select_above(x, w, bias)
    assert_close(pre.double(), exact[got.row, got.latent], rtol=1e-4, atol=1e-5)
    found = torch.zeros_like(exact, dtype=torch.bool)
    found[got.row, got.latent] = True
    assert not (found ^ (exact > 0))[exact.abs() > 1e-5].any()
    assert (got.latent * batch + got.row).diff().gt(0).all()
    again, values = triton_kernels.select_above(x, w, bias)
    assert_close([again.row, again.latent, values], [got.row, got.latent, pre], rtol=0, atol=0)
    for name, weights, vectors in [("sum_by_row", pre, w), ("sum_by_latent", pre, x), ("products", None, None)]:
        given = (got, w, x) if weights is None else (got, weights, vectors)
        mine, eager = getattr(triton_kernels, name), getattr(kernels, name)
        assert_close(mine(*given), eager(*given), rtol=1e-4, atol=1e-4)
        assert_close(mine(*given), mine(*given), rtol=0, atol=0)


def test_tensors_that_they_can_work_on_go_to_them(monkeypatch: pytest.MonkeyPatch, no_type_checks) -> None:
    called: list[str] = []

    class Recorder:
        def __getattr__(self, name: str):
            return lambda *_arguments: called.append(name)

    x, w = torch.randn(6, 4), torch.randn(50, 4)
    pairs, pre = kernels.select_above(x, w, torch.full((50,), -3.0))
    assert kernels.gpu_kernels(x) is None
    monkeypatch.setattr(kernels, "gpu_kernels", lambda _like: Recorder())
    kernels.select_above(x, w, torch.zeros(50))
    kernels.products(pairs, w, x)
    kernels.sum_by_row(pairs, pre, w)
    kernels.sum_by_latent(pairs, pre, x)
    assert called == ["select_above", "products", "sum_by_row", "sum_by_latent"]
