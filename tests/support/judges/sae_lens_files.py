"""Open SAEs with SAELens and write SAEs of its own: `ROOT`.

For each folder `ROOT/ours/NAME`: load it, encode and decode `ROOT/x.npz`, write `ROOT/ours/NAME.npz`.
For each architecture, configuration and version: make a random SAE, save it to `ROOT/theirs/NAME`, write
`ROOT/theirs/NAME.npz` likewise.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig, JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata, TrainingSAE
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from safetensors.torch import save_file

D_HEAD = 8
SCALING = 1.7
HOOK = "blocks.1.attn.hook_z"


def judge(sae: SAE, x: torch.Tensor, out: Path) -> None:
    if sae.cfg.reshape_activations == "hook_z":
        x = x.view(len(x), -1, D_HEAD)
    with torch.no_grad():
        f = sae.encode(x)
        x_hat = sae.decode(f)
    np.savez(out, f=f.numpy(), x_hat=x_hat.reshape(len(x), -1).numpy())


def randomise(sae: SAE | TrainingSAE) -> None:
    for p in sae.parameters():
        p.data = torch.randn_like(p) * (0.4 if p.ndim == 1 else p.shape[0] ** -0.5)


def inference(d_in: int, d_sae: int) -> dict[str, SAE]:
    def options(reshape: str = "hook_z", *, centred: bool = True) -> dict:
        return {
            "d_in": d_in,
            "d_sae": d_sae,
            "metadata": SAEMetadata(model_name="m", hook_name=HOOK, hook_head_index=None),
            "reshape_activations": reshape,
            "apply_b_dec_to_input": centred,
        }

    return {
        "standard": StandardSAE(StandardSAEConfig(**options())),
        "standard-flat-uncentred": StandardSAE(StandardSAEConfig(**options("none", centred=False))),
        "jumprelu": JumpReLUSAE(JumpReLUSAEConfig(**options())),
        "gated": GatedSAE(GatedSAEConfig(**options())),
        "gated-uncentred": GatedSAE(GatedSAEConfig(**options(centred=False))),
        "topk": TopKSAE(TopKSAEConfig(**options(), k=5, rescale_acts_by_decoder_norm=False)),
        "topk-rescaled": TopKSAE(TopKSAEConfig(**options(), k=5, rescale_acts_by_decoder_norm=True)),
    }


def training(d_in: int, d_sae: int) -> dict[str, TrainingSAE]:
    def options() -> dict:
        return {"d_in": d_in, "d_sae": d_sae, "metadata": SAEMetadata(model_name="m", hook_name=HOOK)}

    scaled = {"normalize_activations": "expected_average_only_in"}
    matryoshka = MatryoshkaBatchTopKTrainingSAEConfig(**options(), k=5, matryoshka_widths=[16, d_sae])
    return {
        "training-topk": TopKTrainingSAE(TopKTrainingSAEConfig(**options(), k=5)),
        "training-jumprelu": JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**options())),
        "training-batchtopk": BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**options(), k=5)),
        "training-batchtopk-scaled": BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**options(), **scaled, k=5)),
        "training-matryoshka": MatryoshkaBatchTopKTrainingSAE(matryoshka),
    }


LEGACY = {
    "legacy-3-hook-point": {"hook_point": HOOK, "hook_point_head_index": None, "normalize_activations": False},
    "legacy-3-scaling-factor": {"hook_name": HOOK, "with_scaling_factor": True, "finetuning_scaling_factor": True},
    "legacy-4-jumprelu": {"hook_name": HOOK, "architecture": "jumprelu", "apply_b_dec_to_input": False},
    "legacy-5-topk": {
        "sae_lens_version": "5.3.0",
        "hook_name": HOOK,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 5},
        "normalize_activations": "none",
    },
    "legacy-5-scaled": {
        "sae_lens_version": "5.3.0",
        "hook_name": HOOK,
        "normalize_activations": "expected_average_only_in",
    },
}


def legacy(folder: Path, config: dict, d_in: int, d_sae: int) -> None:
    """A folder as SAELens 3 to 5 wrote it: everything in one flat cfg.json."""
    folder.mkdir()
    extra = {"threshold": torch.rand(d_sae) * 0.3} if config.get("architecture") == "jumprelu" else {}
    if config.pop("with_scaling_factor", False):
        extra["scaling_factor"] = torch.ones(d_sae)
    weights = {
        "W_enc": torch.randn(d_in, d_sae) * d_in**-0.5,
        "b_enc": torch.randn(d_sae) * 0.4,
        "W_dec": torch.randn(d_sae, d_in) * d_sae**-0.5,
        "b_dec": torch.randn(d_in) * 0.4,
    }
    save_file(weights | extra, folder / "sae_weights.safetensors")
    sizes = {"d_in": d_in, "d_sae": d_sae, "dtype": "torch.float32", "device": "cpu", "model_name": "m"}
    (folder / "cfg.json").write_text(json.dumps(sizes | config))


def keep_scaling(folder: Path) -> None:
    """As a training checkpoint has it beside the weights."""
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": SCALING}))


def main(root: Path) -> None:
    x = torch.from_numpy(np.load(root / "x.npz")["x"])
    for folder in sorted(p for p in (root / "ours").iterdir() if p.is_dir()):
        judge(SAE.load_from_disk(folder), x, root / "ours" / f"{folder.name}.npz")
    torch.manual_seed(0)
    theirs, sizes = root / "theirs", (x.shape[1], 48)
    for name, sae in inference(*sizes).items():
        randomise(sae)
        sae.save_model(theirs / name)
        judge(SAE.load_from_disk(theirs / name), x, theirs / f"{name}.npz")
    for name, sae in training(*sizes).items():
        randomise(sae)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold = torch.tensor(0.7, dtype=torch.float64)
        sae.save_model(theirs / name)
        if name.endswith("scaled"):
            keep_scaling(theirs / name)
            sae.fold_activation_norm_scaling_factor(SCALING)
        sae.save_inference_model(root / "inference" / name)
        judge(SAE.load_from_disk(root / "inference" / name), x, theirs / f"{name}.npz")
    for name, config in LEGACY.items():
        legacy(theirs / name, dict(config), *sizes)
        sae = SAE.load_from_disk(theirs / name)
        if name.endswith("scaled"):
            keep_scaling(theirs / name)
            sae.fold_activation_norm_scaling_factor(SCALING)
        judge(sae, x, theirs / f"{name}.npz")


main(Path(sys.argv[1]))
