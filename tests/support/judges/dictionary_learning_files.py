"""Save an SAE of each class of dictionary_learning, load it as that library does, and encode: `ROOT`.

Writes `ROOT/dictionary_learning/NAME/{ae.pt,config.json}` and `ROOT/dictionary_learning/NAME.npz`.
"""

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

for name, member in (("nnsight", "LanguageModel"), ("datasets", "load_dataset"), ("zstandard", None)):
    stub = sys.modules[name] = ModuleType(name)  # imported by the package, and no part of its SAEs
    if member:
        setattr(stub, member, None)

from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder  # noqa: E402
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK  # noqa: E402
from dictionary_learning.utils import load_dictionary  # noqa: E402

K = 5


def main(root: Path) -> None:
    x = torch.from_numpy(np.load(root / "x.npz")["x"])
    torch.manual_seed(0)
    size = (x.shape[1], 48)
    made = {
        "AutoEncoder": AutoEncoder(*size),
        "AutoEncoder-unit": AutoEncoder(*size),
        "AutoEncoderNew": AutoEncoderNew(*size),
        "GatedAutoEncoder": GatedAutoEncoder(*size),
        "AutoEncoderTopK": AutoEncoderTopK(*size, K),
        "BatchTopKSAE": BatchTopKSAE(*size, K),
        "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE(*size, K, group_sizes=[16, 32]),
        "JumpReluAutoEncoder": JumpReluAutoEncoder(*size),
    }
    for name, sae in made.items():
        for p in sae.parameters():
            p.data = torch.randn_like(p) * (0.4 if p.ndim == 1 else p.shape[0] ** -0.5)
        if name == "AutoEncoder-unit":
            sae.decoder.weight.data /= sae.decoder.weight.norm(dim=0)
        if "BatchTopK" in name:
            sae.threshold.fill_(0.7)
        folder = root / "dictionary_learning" / name
        folder.mkdir(parents=True)
        torch.save(sae.state_dict(), folder / "ae.pt")
        trainer = {
            "dict_class": type(sae).__name__,
            "activation_dim": size[0],
            "dict_size": size[1],
            "layer": 1,
            "lm_name": "EleutherAI/pythia-70m",
            "submodule_name": "z_layer_1",
            **({"k": K} if "TopK" in name else {}),
        }
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
        loaded, _ = load_dictionary(str(folder), device="cpu")
        with torch.no_grad():
            f = loaded.encode(x)
            np.savez(root / "dictionary_learning" / f"{name}.npz", f=f.numpy(), x_hat=loaded.decode(f).numpy())


main(Path(sys.argv[1]))
