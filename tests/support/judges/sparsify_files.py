"""Save an SAE of sparsify, load it as that library does, and encode: `ROOT`.

Writes `ROOT/sparsify/NAME/{cfg.json,sae.safetensors}` and `ROOT/sparsify/NAME.npz`.
"""

import os
import sys
from pathlib import Path

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # read when it is imported: there is no GPU

import numpy as np
import torch
from sparsify.config import SparseCoderConfig
from sparsify.sparse_coder import SparseCoder

CONFIGS = {
    "topk": SparseCoderConfig(expansion_factor=2, k=5),
    "topk-unnormalised": SparseCoderConfig(expansion_factor=2, k=5, normalize_decoder=False),
    "topk-num-latents": SparseCoderConfig(num_latents=48, k=5),
}


def main(root: Path) -> None:
    x = torch.from_numpy(np.load(root / "x.npz")["x"])
    torch.manual_seed(0)
    for name, config in CONFIGS.items():
        sae = SparseCoder(x.shape[1], config)
        for p in sae.parameters():
            p.data = torch.randn_like(p) * (0.4 if p.ndim == 1 else p.shape[0] ** -0.5)
        sae.save_to_disk(root / "sparsify" / name)
        loaded = SparseCoder.load_from_disk(root / "sparsify" / name)
        with torch.no_grad():
            values, latents, pre = loaded.encode(x)
            f = torch.zeros_like(pre).scatter_(-1, latents, values)
            x_hat = loaded.decode(values, latents)
        np.savez(root / "sparsify" / f"{name}.npz", f=f.numpy(), x_hat=x_hat.numpy())


main(Path(sys.argv[1]))
