"""Compile every Triton kernel for a Hopper GPU (sm_90), which takes none; `test_triton_kernels.py` runs this file.

The public functions run as they are, except that a launch compiles its kernel for the arguments that it was given.
Writes a line a kernel: its name and the number of tensor-core instructions in it.
"""

import sys
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from headscope.sae.training import triton_kernels
from headscope.sae.training.kernels import Pairs

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32"}
BATCH, D_IN, D_SAE, N_PAIRS = 256, 512, 1024, 64


def kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def aligned(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)


def compile_launch(kernel: Any, grid: Any, *given: Any, **constants: Any) -> None:
    options: dict[str, Any] = dict(triton_kernels._OPTIONS)
    if hasattr(kernel, "configs"):
        config = kernel.configs[0]
        constants |= config.kwargs
        options |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
        kernel = kernel.fn
    kinds = dict(zip(kernel.arg_names, map(kind, given), strict=False)) | dict.fromkeys(constants, "constexpr")
    attributes = {(i,): [["tt.divisibility", 16]] for i, value in enumerate(given) if aligned(value)}
    signature = {name: kinds[name] for name in kernel.arg_names}
    made = compile(ASTSource(kernel, signature, constants, attributes), target=HOPPER, options=options)
    assert made.asm["cubin"]
    sys.stdout.write(f"{kernel.__name__} {made.asm['ptx'].count('wgmma.mma_async')}\n")
    for value in given:
        if isinstance(value, Tensor) and value.dtype == torch.int32:
            value.zero_()  # counts: nothing was computed


triton_kernels._launch = compile_launch
x, w = torch.zeros(BATCH, D_IN), torch.zeros(D_SAE, D_IN)
pairs = Pairs(torch.arange(N_PAIRS), torch.arange(N_PAIRS), BATCH, D_SAE)
triton_kernels.candidates(x, w, torch.zeros(D_SAE), torch.zeros(BATCH))
triton_kernels.products(pairs, w, x)
triton_kernels.sum_by_row(pairs, torch.ones(N_PAIRS), w)
triton_kernels.sum_by_latent(pairs, torch.ones(N_PAIRS), x)
