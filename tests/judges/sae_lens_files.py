"""Open SAEs with SAELens and write SAEs of its own: `ROOT`.

For each folder `ROOT/ours/NAME`: load it, encode and decode `ROOT/x.npz`, write `ROOT/ours/NAME.npz`.
For each architecture: make a random SAE, save it to `ROOT/theirs/NAME`, write `ROOT/theirs/NAME.npz` likewise.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

D_HEAD = 8


def judge(sae: SAE, x: torch.Tensor, out: Path) -> None:
    if sae.cfg.reshape_activations == "hook_z":
        x = x.view(len(x), -1, D_HEAD)
    with torch.no_grad():
        f = sae.encode(x)
        x_hat = sae.decode(f)
    np.savez(out, f=f.numpy(), x_hat=x_hat.reshape(len(x), -1).numpy())


def their_own(d_in: int, d_sae: int) -> dict[str, SAE]:
    def options(reshape: str = "hook_z", *, centred: bool = True) -> dict:
        metadata = SAEMetadata(model_name="m", hook_name="blocks.1.attn.hook_z", hook_head_index=None)
        return {
            "d_in": d_in,
            "d_sae": d_sae,
            "metadata": metadata,
            "reshape_activations": reshape,
            "apply_b_dec_to_input": centred,
        }

    return {
        "standard": StandardSAE(StandardSAEConfig(**options())),
        "standard-flat-uncentred": StandardSAE(StandardSAEConfig(**options("none", centred=False))),
        "jumprelu": JumpReLUSAE(JumpReLUSAEConfig(**options())),
        "topk": TopKSAE(TopKSAEConfig(**options(), k=5, rescale_acts_by_decoder_norm=False)),
        "topk-rescaled": TopKSAE(TopKSAEConfig(**options(), k=5, rescale_acts_by_decoder_norm=True)),
    }


def main(root: Path) -> None:
    x = torch.from_numpy(np.load(root / "x.npz")["x"])
    for folder in sorted(p for p in (root / "ours").iterdir() if p.is_dir()):
        judge(SAE.load_from_disk(folder), x, root / "ours" / f"{folder.name}.npz")
    torch.manual_seed(0)
    for name, sae in their_own(x.shape[1], 48).items():
        for p in sae.parameters():
            p.data = torch.randn_like(p) * (0.4 if p.ndim == 1 else p.shape[0] ** -0.5)
        sae.save_model(root / "theirs" / name)
        judge(SAE.load_from_disk(root / "theirs" / name), x, root / "theirs" / f"{name}.npz")


main(Path(sys.argv[1]))
